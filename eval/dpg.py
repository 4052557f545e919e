"""DPG-Bench: draw dense prompts, ask a judge the benchmark's questions, count by the published rule and by a fixed one.

    python eval/dpg.py --model PATH --dpg-csv dpg_bench.csv --judge BLIP_DIR --output runs/dpg/mine
    python eval/dpg.py --images GRIDS --resolution 512 --dpg-csv dpg_bench.csv --judge mplug --output runs/dpg/theirs
    python eval/dpg.py --model PATH --prompts dpg_prompts.jsonl --output runs/dpg/images      # draw only

The judge is asked about known images first and refused where it fails on them: photographs that come with
scikit-image, or your own (`--canary DIR`); `--no-canary` goes without, and the manifest says so.
An interrupted run goes on with the same command. `--output DIR` holds the images, records.jsonl (every answer as
written), summary.json and the official grids. Figures of different judges are no one scale; only mplug's compare with
published ones.
"""

import sys

from unimm.errors import run_main
from unimm.evaluation.dpg.command import main

if __name__ == "__main__":
    sys.exit(run_main(lambda: main(description=__doc__), name="dpg"))
