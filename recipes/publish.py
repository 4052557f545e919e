"""Make the small checkpoint that the package ships from the one that was trained.

    python recipes/publish.py --config configs/shapes/publish.yaml

Weights are stored in half precision, except the codebook and its projections, which stay float32 (bfloat16 or float16
there would flip ids). The output folder is replaced as a whole.
"""

import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

from unimm.config import parse_recipe_args
from unimm.errors import UserError, run_main
from unimm.mllm import load

CARD = "README.md"


@dataclass
class PublishRecipe:
    """`card` is the model card, a Markdown file that travels with the weights; `image_generation` are the defaults of
    drawing that the checkpoint keeps (guidance_scale, temperature, top_k, top_p).
    """

    model: str
    output_dir: str
    card: str
    image_generation: dict = field(default_factory=dict)
    max_megabytes: float = 20.0


def main() -> None:
    recipe = parse_recipe_args(PublishRecipe)
    model, processor = load(recipe.model, device="cpu", dtype=torch.float32)
    model.half()
    model.generation_config.image_generation.update(recipe.image_generation)
    output = Path(recipe.output_dir)
    staging = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    model.save_pretrained(staging)
    processor.save_pretrained(staging)
    shutil.copy(recipe.card, staging / CARD)
    megabytes = (staging / "model.safetensors").stat().st_size / 1e6
    if megabytes > recipe.max_megabytes:
        raise UserError(
            f"The weights take {megabytes:.1f} MB, more than the {recipe.max_megabytes} MB that the package may ship."
        )
    shutil.rmtree(output, ignore_errors=True)
    staging.replace(output)
    print(f"{output}: {megabytes:.1f} MB")


if __name__ == "__main__":
    sys.exit(run_main(main, name="publish"))
