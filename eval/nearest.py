"""Draw captioned images by their captions, and say how many drawings are nearest to their own image.

    python eval/nearest.py --model runs/emoji/t2i --source '$UNIMM_DATA/data/emoji/train.parquet' \\
        --guidance-scale 1 --temperature 0 --output runs/emoji/nearest --page runs/emoji/nearest.html

Each drawing is compared, pixel by pixel, with every image of the source. The tokenizer's own copies of the images
are measured in the same way, as the most that a drawing can reach. An interrupted run goes on; `--page` shows prompts,
drawings and originals, the wrong ones first.
"""

import sys
from collections.abc import Sequence

from unimm.errors import run_main
from unimm.evaluation.nearest import command as nearest


def main(argv: Sequence[str] | None = None) -> None:
    nearest.main(argv, __doc__)


if __name__ == "__main__":
    sys.exit(run_main(main, name="nearest"))
