"""Ask a model what MME, POPE, GQA, TextVQA, MMBench, SEED, MMMU and AI2D ask, through lmms-eval (extra `lmms`).

    python eval/lmms.py --model PATH --output runs/und --json und.json
    python eval/lmms.py --tasks mme,pope --data /data/benchmarks          # local folders instead of the hub
    torchrun --nproc_per_node 2 eval/lmms.py --tasks shapes_pope          # a share of the questions for each process

The same as `unimm eval und`; `--help` lists the options, unimm/benchmarks/understanding.py says what is special.
"""

import sys

from unimm.benchmarks.understanding import main
from unimm.errors import run_main

if __name__ == "__main__":
    sys.exit(run_main(main, name="lmms"))
