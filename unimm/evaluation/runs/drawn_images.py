"""Images that a model under test draws for a benchmark, kept in the run's folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from unimm.data.image_files import save_image_atomically
from unimm.data.images import load_image
from unimm.errors import UserError
from unimm.evaluation.runs.bad_images import each_or_error
from unimm.evaluation.runs.store import Key, RunStore, sample_seed
from unimm.mllm.draw_prompts import draw_prompts


class DrawnImages:
    """`num_images` images of each prompt, drawn by a unified model; existing files are kept.

    Args:
        texts: item -> prompt.
        store: its folder keeps the images, its manifest has the seed.
        sampling: settings of `ImageSampling` that override the checkpoint's defaults.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        texts: Mapping[str, str],
        num_images: int,
        store: RunStore,
        sampling: Mapping[str, Any],
    ) -> None:
        self.model, self.processor, self.texts, self.store = model, processor, texts, store
        self.sampling = sampling
        self.keys: list[Key] = [(item, sample) for item in texts for sample in range(num_images)]

    def paths(self, block: Sequence[Key]) -> list[Path]:
        """Return the files of these images, drawing those that are missing."""
        paths = [self.store.image_path(*key) for key in block]
        if not all(path.exists() for path in paths):
            # Draw the whole block even if one file is missing: another batch could change the last bits.
            texts, seeds = [self.texts[item] for item, _ in block], [self.seed(key) for key in block]
            images = draw_prompts(self.model, self.processor, texts, seeds, **self.sampling)
            for image, path in zip(images, paths, strict=True):
                if not path.exists():
                    save_image_atomically(image, path)
        return paths

    def load(self, block: Sequence[Key]) -> list[tuple[Path, Image.Image | UserError]]:
        """Return each image's file together with the image, or with the error if it cannot be read."""
        paths = self.paths(block)
        return list(zip(paths, each_or_error(paths, load_image), strict=True))

    def seed(self, key: Key) -> int:
        """Return the seed that the image is drawn with."""
        return sample_seed(self.store.manifest.seed, self.store.manifest.bench, *key)
