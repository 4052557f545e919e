"""Measure an image tokenizer on real images.

    python eval/reconstruction.py --model runs/cifar10/stage2 --source '$UNIMM_DATA/data/cifar10/test.parquet' \\
        --kmeans-source '$UNIMM_DATA/data/cifar10/train.parquet' --reference runs/cifar10/stage1 --json
        reconstruction.json

Prints PSNR, SSIM, codebook use and perplexity beside two baselines: every patch painted in its mean color, and in the
nearest of 1024 k-means centres of raw patches. `--reference` names a tokenizer that still has the original encoder: the
features are compared with its. The sets of originals and reconstructions are compared too, in the features of FID's
Inception (`--inception FILE`: rFID), of any vision encoder (`--fd-encoder PATH`), or, unless one is named, of the
tokenizer's own encoder, which flatters it.
`--output DIR` keeps every image with its figures: an interrupted run goes on, and
`unimm eval report DIR --output report.html` makes a page of it.
"""

import sys
from collections.abc import Sequence

from unimm.errors import run_main
from unimm.evaluation.reconstruction import command as reconstruction


def main(argv: Sequence[str] | None = None) -> None:
    reconstruction.main(argv, __doc__)


if __name__ == "__main__":
    sys.exit(run_main(main, name="reconstruction"))
