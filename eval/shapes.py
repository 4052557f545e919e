"""Evaluate a model on the shapes data set: reconstruction, visual question answering and image generation.

    python eval/shapes.py                                                       # the embedded default
    python eval/shapes.py --model runs/shapes/t2i --json shapes.json
    python eval/shapes.py --model runs/shapes/stage1 --parts reconstruction     # an image tokenizer alone

`--json FILE` writes reconstruction {agreement, psnr, psnr_mean_color, ssim, codebook_use, perplexity}, chat
{existence, color, count, position}, generation {the six GenEval tags, overall, withheld}, strict {the same scores by a
second detector, which accepts only crisp shapes and nothing else}, seconds, seed and commit; `--rows FILE` writes every
single verdict. `--output DIR` saves every image and answer: run the same command again to resume, and
`unimm eval report DIR --output report.html` writes an HTML report.
"""

import sys
from collections.abc import Sequence

from unimm.errors import run_main
from unimm.evaluation.shapes import command as shapes


def main(argv: Sequence[str] | None = None) -> None:
    shapes.main(argv, __doc__)


if __name__ == "__main__":
    sys.exit(run_main(main, name="shapes"))
