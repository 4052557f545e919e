"""Evaluate an image tokenizer's reconstructions of real images.

    python eval/reconstruction.py --model runs/cifar10/stage2 --source '$UNIMM_DATA/data/cifar10/test.parquet' \\
        --kmeans-source '$UNIMM_DATA/data/cifar10/train.parquet' --reference runs/cifar10/stage1 --json
        reconstruction.json

Prints PSNR, SSIM, codebook use and perplexity next to two baselines: every patch replaced by its mean color, and by the
nearest of 1024 k-means centers of raw patches. `--reference` names a tokenizer with the original encoder, to compare
the features with. The distributions of originals and reconstructions are also compared, in the features of FID's
Inception (`--inception FILE`: rFID), of EfficientNet-Lite0 (`--efficientnet FILE`) or any vision encoder (`--fd-encoder
PATH`), or by default of the tokenizer's own encoder, which is biased in its favor.
`--output DIR` saves every image with its metrics: run the same command again to resume, and
`unimm eval report DIR --output report.html` writes an HTML report.
"""

import sys
from collections.abc import Sequence

from unimm.errors import run_main
from unimm.evaluation.reconstruction import command as reconstruction


def main(argv: Sequence[str] | None = None) -> None:
    reconstruction.main(argv, __doc__)


if __name__ == "__main__":
    sys.exit(run_main(main, name="reconstruction"))
