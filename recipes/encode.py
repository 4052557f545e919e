"""Tokenize a whole image data set once, into a folder of ids from which `t2i.py` trains without decoding images.

    accelerate launch --num_cpu_threads_per_process 2 recipes/encode.py --config configs/emoji/encode.yaml
    torchrun --nproc_per_node 2 recipes/encode.py --config configs/emoji/encode.yaml

Processes, on one machine or on several that share a folder, take the shards in turn and never wait for each other.
Rerunning the command encodes the missing shards only.
"""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from unimm.config.loading import parse_recipe_args, save_config
from unimm.encoding import EncodeConfig, Encoder
from unimm.errors import require_place, run_main
from unimm.tokenizer.loading import load_with_processor


@dataclass
class EncodeModelConfig:
    """The tokenizer to encode with; `image_tokenizer` is a folder or hub id."""

    image_tokenizer: str


@dataclass
class EncodeRecipe:
    model: EncodeModelConfig
    data: EncodeConfig
    output_dir: str


def device_of(local_rank: int) -> torch.device:
    """Return the accelerator of this process, or the CPU."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu") if found is None else torch.device(found.type, local_rank)


def main() -> None:
    recipe = parse_recipe_args(EncodeRecipe)
    require_place("The image tokenizer model.image_tokenizer", recipe.model.image_tokenizer)
    recipe.data.rows()  # fail on an unreadable source before the tokenizer is loaded
    rank, world_size, local_rank = (int(os.environ.get(name, d)) for name, d in PLACES.items())
    tokenizer, processor = load_with_processor(recipe.model.image_tokenizer)
    folder = Path(recipe.output_dir)
    encoder = Encoder(
        tokenizer.to(device_of(local_rank)), processor, recipe.data, folder, rank=rank, world_size=world_size
    )
    if rank == 0:
        save_config(recipe, folder)
    start = time.perf_counter()
    done = encoder.run()
    seconds = time.perf_counter() - start
    print(f"process {rank + 1} of {world_size}: {done} images in {seconds:.1f} s, {done / seconds:.1f} images/s")


PLACES = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}
"""Environment variables of torchrun and accelerate, with their defaults for a single process."""


if __name__ == "__main__":
    sys.exit(run_main(main, name="encode"))
