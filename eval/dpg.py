"""Run DPG-Bench: generate images of dense prompts and score them with a VQA model that answers its questions.

    python eval/dpg.py --model PATH --dpg-csv dpg_bench.csv --vqa-model BLIP_DIR --output runs/dpg/mine
    python eval/dpg.py --images GRIDS --resolution 512 --dpg-csv dpg_bench.csv --vqa-model mplug --output runs/theirs
    python eval/dpg.py --model PATH --prompts dpg_prompts.jsonl --output runs/dpg/images      # generate only

Scores are computed by the published rule and by a corrected one. The VQA model (`--vqa-model`) must first pass a sanity
check on known images: photographs that ship with scikit-image, or your own (`--sanity-images DIR`);
`--no-sanity-check` skips it, and the manifest records that. Run the same command again to resume.
`--output DIR` holds the images, records.jsonl
(every answer as written), summary.json and the official grids. Scores of different VQA models are not comparable; only
mplug's compare with published ones.
"""

import sys

from unimm.errors import run_main
from unimm.evaluation.dpg.command import main

if __name__ == "__main__":
    sys.exit(run_main(lambda: main(description=__doc__), name="dpg"))
