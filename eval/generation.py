"""Compare drawn images with real ones: FID, sFID, inception score, KID, precision and recall.

    python eval/generation.py --samples samples.npz --reference VIRTUAL_imagenet256_labeled.npz --inception FILE
    python eval/generation.py --samples DRAWN_DIR --reference REAL_DIR --encoder DINOV2_DIR --json generation.json

A set is a folder, a parquet file or the ADM evaluator's npz (`arr_0`, or statistics for a reference). FID, sFID and the
inception score need FID's Inception weights, whose file you name; every other space has figures of its own.
`accelerate launch` shares the images. `--output DIR` keeps the figures with the sha256 of weights and images, for
`unimm eval report DIR`; `--write-npz` and `--write-statistics` keep the samples in ADM's formats.
"""

import sys
from collections.abc import Sequence

from unimm.errors import run_main
from unimm.evaluation.generation import command as generation


def main(argv: Sequence[str] | None = None) -> None:
    generation.main(argv, __doc__)


if __name__ == "__main__":
    sys.exit(run_main(main, name="generation"))
