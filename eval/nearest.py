"""Generate images from a data set's captions and count how many are nearest to the image of their caption.

    python eval/nearest.py --model runs/emoji/t2i --source '$UNIMM_DATA/data/emoji/train.parquet' \\
        --guidance-scale 1 --temperature 0 --output runs/emoji/nearest --page runs/emoji/nearest.html

Each generated image is compared, pixel by pixel, with every image of the source. The tokenizer's reconstructions are
measured in the same way, as an upper bound. Run the same command again to resume; `--page` writes an HTML report of
prompts, generated and original images, the wrong ones first.
"""

import sys
from collections.abc import Sequence

from unimm.errors import run_main
from unimm.evaluation.nearest import command as nearest


def main(argv: Sequence[str] | None = None) -> None:
    nearest.main(argv, __doc__)


if __name__ == "__main__":
    sys.exit(run_main(main, name="nearest"))
