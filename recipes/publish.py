"""Convert a trained model to the small checkpoint that ships with the package.

    python recipes/publish.py --config configs/shapes/publish.yaml

Weights are stored in float16, except the codebook and its projections, which stay float32 (half precision there would
flip ids). The output folder is replaced as a whole.
"""

import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from unimm.config.loading import parse_recipe_args
from unimm.config.schema import Rate
from unimm.errors import UserError, run_main
from unimm.mllm import load
from unimm.mllm.swap_tokenizer import take_decoder
from unimm.sampling import ImageSampling
from unimm.saving import save_whole

CARD = "README.md"


@dataclass
class PublishRecipe:
    """Settings of the published checkpoint.

    Args:
        model: folder or hub id of the trained unified model.
        output_dir: folder to write.
        card: the model card, a Markdown file that is copied beside the weights.
        image_generation: default sampling settings to store; None keeps the model's.
        image_editing: those for edits; None keeps the model's.
        max_megabytes: limit on the size of the weights.
        image_tokenizer: a tokenizer with the same ids whose decoder (trained in stage 3) replaces the model's own.
    """

    model: str
    output_dir: str
    card: str
    image_generation: ImageSampling | None = None
    image_editing: ImageSampling | None = None
    max_megabytes: Rate = 20.0
    image_tokenizer: str | None = None


def main() -> None:
    recipe = parse_recipe_args(PublishRecipe)
    model, processor = load(recipe.model, device="cpu", dtype=torch.float32)
    if recipe.image_tokenizer is not None:
        take_decoder(model, recipe.image_tokenizer)
    model.half()
    if recipe.image_generation is not None:
        model.generation_config.image_generation = asdict(recipe.image_generation)
    if recipe.image_editing is not None:
        model.generation_config.image_editing = asdict(recipe.image_editing)
    output = Path(recipe.output_dir)
    # Written beside the target and renamed at the end, so that an error never leaves half a checkpoint.
    staging = output.with_name(f".{output.name}.tmp")
    try:
        save_whole(staging, model, processor)
        shutil.copy(recipe.card, staging / CARD)
        megabytes = (staging / "model.safetensors").stat().st_size / 1e6
        if megabytes > recipe.max_megabytes:
            raise UserError(
                f"The weights take {megabytes:.1f} MB, more than the {recipe.max_megabytes} MB that the package may "
                "ship."
            )
        shutil.rmtree(output, ignore_errors=True)
        staging.replace(output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    print(f"{output}: {megabytes:.1f} MB")


if __name__ == "__main__":
    sys.exit(run_main(main, name="publish"))
