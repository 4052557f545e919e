"""Sample a class-conditional model into the file format of the ADM evaluator (arXiv 2105.05233, its `evaluations/`):
one npz whose `arr_0` is uint8 [N, H, W, 3].

Images are streamed to the file, so that the N images are never all in memory, and the file appears complete or not at
all. Image k is of class k modulo the number of classes and depends on (seed, k) only.
"""

import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from unimm.class_conditional.drawing import ClassDrawer
from unimm.data.image_streams import to_array
from unimm.errors import UserError
from unimm.runs.provenance import appearing
from unimm.sampling import ImageSampling


@dataclass(frozen=True)
class SamplesPlan:
    """The settings of a sampling run.

    `image_size` is the side length in the file, resized (bicubic, on 8 bits) from the tokenizer's output; None keeps
    the output size. The evaluator's reference statistics of ImageNet are at 256.
    """

    num_images: int = 50_000
    batch_size: int = 50
    seed: int = 0
    image_size: int | None = None


@dataclass(frozen=True)
class SamplesProtocol:
    """A paper's sampling run, a file of `configs/c2i/protocols`."""

    plan: SamplesPlan = field(default_factory=SamplesPlan)
    sampling: ImageSampling = field(default_factory=ImageSampling)


def write_samples(drawer: ClassDrawer, path: str | Path, plan: SamplesPlan, sampling: ImageSampling) -> tuple[int, ...]:
    """Generate `plan.num_images` images into the npz at `path`; return the array's shape.

    Raises:
        UserError: the plan has fewer than one image, or `path` cannot be written (raised before sampling starts).
    """
    if min(plan.num_images, plan.batch_size) < 1:
        raise UserError(f"{plan.num_images} images in batches of {plan.batch_size}: both must be at least 1.")
    size = plan.image_size or drawer.tokenizer.config.grid[0] * drawer.tokenizer.config.decoded_patch_size
    shape = (plan.num_images, size, size, 3)
    write_npz(Path(path), shape, drawn_batches(drawer, plan, sampling))
    return shape


def drawn_batches(drawer: ClassDrawer, plan: SamplesPlan, sampling: ImageSampling) -> Iterable[np.ndarray]:
    """Yield the generated images as batches, uint8 [b, H, W, 3]."""
    classes = drawer.model.config.num_classes
    for start in tqdm(range(0, plan.num_images, plan.batch_size), desc="images", unit="batch"):
        labels = [k % classes for k in range(start, min(start + plan.batch_size, plan.num_images))]
        images = drawer.draw(labels, sampling, seed=plan.seed, first_image=start)
        if plan.image_size is not None:
            side = (plan.image_size, plan.image_size)
            images = [image.resize(side, Image.Resampling.BICUBIC) for image in images]
        yield to_array(images)


def write_npz(path: Path, shape: tuple[int, ...], batches: Iterable[np.ndarray]) -> None:
    """Stream uint8 batches [b, H, W, 3] into `arr_0` of an npz, in a temporary file that is renamed at the end.

    Raises:
        UserError: the file cannot be written, or the batches do not fill `shape` (nothing is left behind).
    """
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.uint8)), "fortran_order": False, "shape": shape}
    written = 0
    with appearing(path, "samples") as temporary:
        archive = zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED)
        # zip64: the size is unknown when the entry is opened, and may exceed 2 GiB
        with archive, archive.open("arr_0.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for batch in batches:
                if batch.shape[1:] != shape[1:] or batch.dtype != np.uint8:
                    raise UserError(f"Images of {batch.shape[1:]} do not fit a file of {shape[1:]}.")
                file.write(np.ascontiguousarray(batch).tobytes())
                written += len(batch)
        if written != shape[0]:
            raise UserError(f"{written} images do not fill a file of {shape[0]}.")
