"""Ask a model what MME, POPE, GQA, TextVQA, MMBench, SEED, MMMU and AI2D ask, through lmms-eval (extra `lmms`).

    python eval/lmms.py --model PATH --output runs/und --json und.json
    python eval/lmms.py --tasks mme,pope --data /data/benchmarks          # local folders instead of the hub
    python eval/lmms.py --tasks shapes_pope,shapes_mme --questions 300    # questions about the shapes data set
    python eval/lmms.py --from runs/und/mme --output runs/again           # the whole run that this task was part of
    torchrun --nproc_per_node 2 eval/lmms.py --tasks shapes_pope          # a share of the questions for each process

The same as `unimm eval und`. `--output DIR` gets a run folder per task; an interrupted run goes on. Papers count
differently: each count is named (POPE by three readings, SEED's images and all, MME's two halves), and lmms-eval's
own figures stand beside them.
"""

import sys

from unimm.errors import run_main
from unimm.evaluation.understanding.command import main

if __name__ == "__main__":
    sys.exit(run_main(lambda: main(description=__doc__), name="lmms"))
