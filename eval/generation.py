"""Compare generated images with real ones: FID, sFID, inception score, KID, precision and recall.

    python eval/generation.py --samples samples.npz --reference VIRTUAL_imagenet256_labeled.npz --inception FILE
    python eval/generation.py --samples DRAWN_DIR --reference REAL_DIR --encoder DINOV2_DIR --json generation.json

A set is a folder, a parquet file or the ADM evaluator's npz (`arr_0`, or statistics for a reference). FID, sFID and the
inception score need the file of FID's Inception weights; scores in other feature spaces are not comparable with it.
`accelerate launch` splits the images over processes. `--output DIR` saves the scores with the sha256 of weights and
images, for `unimm eval report DIR`; `--write-npz` and `--write-statistics` save the samples in ADM's formats.
"""

import sys
from collections.abc import Sequence

from unimm.errors import run_main
from unimm.evaluation.generation import command as generation


def main(argv: Sequence[str] | None = None) -> None:
    generation.main(argv, __doc__)


if __name__ == "__main__":
    sys.exit(run_main(main, name="generation"))
