"""Average the weights of a unified model and of one trained from it, which keeps most of what either can do.

    python recipes/average.py runs/shapes/rewards runs/shapes/more_edits --share 0.5 --output runs/shapes/average

Fine-tuning moves a model along a line on which, often, all points are good: the new skill is there before the old ones
are lost (WiSE-FT, https://arxiv.org/abs/2109.01903). Both must have the same layout and the same image ids; the image
tokenizer stays that of the first, or takes the decoder of a third (`--image-tokenizer`).
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from unimm.errors import UserError, require_place, run_main
from unimm.mllm import load
from unimm.mllm.swap_tokenizer import take_decoder
from unimm.saving import save_whole


@torch.no_grad()
def interpolate(first: Any, second: Any, share: float) -> None:
    """Move the weights of `first` towards those of `second`, by `share` of the way, all but the image tokenizer's.

    Raises:
        UserError: the models have other weights, or other image tokenizers.
    """
    own, other = learned(first), learned(second)
    if wrong := [name for name in own if name not in other or own[name].shape != other[name].shape]:
        raise UserError(f"The models differ in {len(wrong)} weights ({wrong[0]}, ...): average models of one layout.")
    if first.image_tokenizer.fingerprint != second.image_tokenizer.fingerprint:
        raise UserError("The models have image tokenizers with other codebooks: their image ids mean other things.")
    for name, weight in own.items():
        weight.lerp_(other[name].to(weight), share)


def learned(model: Any) -> dict[str, torch.nn.Parameter]:
    """Return the parameters of a unified model without those of its image tokenizer, by name."""
    tokenizer = {id(each) for each in model.image_tokenizer.parameters()}
    return {name: each for name, each in model.named_parameters() if id(each) not in tokenizer}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", help="folder or hub id of a unified model")
    parser.add_argument("second", help="of one trained from it")
    parser.add_argument("--share", type=float, required=True, help="of the second, between 0 and 1")
    parser.add_argument("--image-tokenizer", help="take the decoder of this one, which has the same ids")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    arguments = parser.parse_args(argv)
    if not 0 < arguments.share < 1:
        raise UserError(f"--share is {arguments.share:g}: give a number between 0 and 1.")
    for name in ("first", "second"):
        require_place(f"The {name} model", getattr(arguments, name))
    (model, processor), (other, _) = (
        load(getattr(arguments, name), device="cpu", dtype=torch.float32) for name in ("first", "second")
    )
    interpolate(model, other, arguments.share)
    if arguments.image_tokenizer is not None:
        take_decoder(model, arguments.image_tokenizer)
    save_whole(arguments.output, model, processor)
    print(
        f"{arguments.output}: {1 - arguments.share:g} of {arguments.first}, {arguments.share:g} of {arguments.second}"
    )


if __name__ == "__main__":
    sys.exit(run_main(main, name="average"))
