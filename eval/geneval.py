"""Run GenEval: generate images of its 553 prompts, detect objects and colors, and score by the official rules.

    python eval/geneval.py --shapes --output runs/geneval/shapes      # small models, in the shapes data set
    python eval/geneval.py --model PATH --detector DIR --clip DIR --output runs/geneval/mine
    python eval/geneval.py --images DIR --detector DIR --clip DIR --output runs/geneval/theirs
    python eval/geneval.py --prompts evaluation_metadata_long.jsonl ...     # reported separately, not as GenEval
    python eval/geneval.py --calibrate annotations_sdv2.csv.gz --verdicts runs/geneval/sdv2
    python eval/geneval.py --contamination captions.jsonl

Run the same command again to resume. `--output DIR` holds the images, records.jsonl, summary.json and
geneval_results.jsonl, which the official summary_scores.py reads.
"""

import sys

from unimm.errors import run_main
from unimm.evaluation.geneval.command import main

if __name__ == "__main__":
    sys.exit(run_main(lambda: main(description=__doc__), name="geneval"))
