"""Evaluate a model on MME, POPE, GQA, TextVQA, MMBench, SEED, MMMU and AI2D with lmms-eval (extra `lmms`).

    python eval/lmms.py --model PATH --output runs/und --json und.json
    python eval/lmms.py --tasks mme,pope --data /data/benchmarks          # local folders instead of the hub
    python eval/lmms.py --tasks shapes_pope,shapes_mme --questions 300    # questions about the shapes data set
    python eval/lmms.py --from runs/und/mme --output runs/again           # repeat the whole run of this task
    torchrun --nproc_per_node 2 eval/lmms.py --tasks shapes_pope          # split the questions over processes

The same as `unimm eval und`. `--output DIR` receives a run folder per task; run the same command again to resume.
Papers score these benchmarks differently, so every variant is reported by name (three ways to parse POPE's answers,
SEED on images and on all questions, MME's two halves), next to lmms-eval's own scores.
"""

import sys

from unimm.errors import run_main
from unimm.evaluation.understanding.command import main

if __name__ == "__main__":
    sys.exit(run_main(lambda: main(description=__doc__), name="lmms"))
