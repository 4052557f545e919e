"""Encode labeled images into the files of ids that a class-conditional model is trained and evaluated on."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from unimm.class_conditional.ids import ClassIds, read_class_ids, read_class_ids_folder, write_class_ids
from unimm.config.schema import Count, Range
from unimm.data.held_out import DEFAULT_SHARE, check_share, refuse_overlaps
from unimm.data.image_streams import WORLD
from unimm.data.resizing import views_of
from unimm.data.shapes.prompts import Split
from unimm.data.sources.ids import IdsInfo, holds_ids
from unimm.data.sources.labelled import LabelledImages, LabelledShapes, labelled_images
from unimm.data.sources.storage import filled
from unimm.errors import UserError
from unimm.tokenizer import ImageTokenizer


@dataclass
class ClassIdsConfig:
    """The labeled images of both splits, their augmentation, and the folder of ids.

    Args:
        source, eval_source: labeled parquet files (columns image and label), "shapes", or folders of ids with labels
            that `recipes/encode.py` made, to which none of the other settings of images apply.
        folder: the output folder of the ids.
        num_images, num_eval_images: rows to read; None reads all.
        flip: also encode the mirror image of every training image.
        crop_scales: encode each training image as five crops (the corners and the center) per scale, the side of the
            image over that of the crop. LlamaGen's "ten-crop" is [1.1, 1.05] with `flip`, 20 rows per image.
        batch_size: images per forward pass.
        seed: of the stream of ids, and of the shapes data set.
        eval_share: without `eval_source`, the share of the rows of `source` that is held out, before augmentation.
    """

    FORMER: ClassVar[dict[str, str]] = {"num_pictures": "num_images", "num_eval_pictures": "num_eval_images"}

    source: str
    eval_source: str | None = None
    folder: str = ""
    num_images: Count | None = None
    num_eval_images: Count | None = None
    flip: bool = True
    crop_scales: list[Annotated[float, Range(least=1)]] = field(default_factory=list)
    batch_size: Count = 64
    seed: Annotated[int, Range(least=0, most=2**31 - 1)] = 0
    eval_share: Annotated[float, Range(least=0, most=0.5)] = DEFAULT_SHARE

    def __post_init__(self) -> None:
        if any(scale < 1 for scale in self.crop_scales):
            raise UserError(
                f"data.crop_scales are sides of the image over those of a crop, at least 1: {min(self.crop_scales)}."
            )
        if not self.folder:
            raise UserError("data.folder is missing: the folder that the ids are kept in.")
        check_share(self.eval_share)
        if WORLD in (self.source, self.eval_source):
            return
        if holds_ids(self.source) and self.eval_source is None:
            raise UserError(f"{self.source} holds ids, not images to hold out: give data.eval_source, ids or images.")
        if self.eval_source is not None:
            refuse_overlaps([(self.source, False)], [self.eval_source])
        elif self.eval_share == 0:
            raise UserError("data.eval_share 0 holds nothing out to evaluate on: give data.eval_source.")

    def images_of(self, split: Split) -> LabelledImages | LabelledShapes:
        """Return the labeled images of one split. Raises UserError if they cannot be read."""
        source, count, part = self._reads(split)
        return labelled_images(source, count, seed=self._seed(split), part=part)

    def require_sources(self) -> None:
        """Raise UserError if images without a file of ids are missing; called before a model is built."""
        for name, split in (("train", "train"), ("eval", "test")):
            part: Split = "test" if split == "test" else "train"
            if self.ids_of(part) is None and not (Path(self.folder) / f"{name}.parquet").is_file():
                self.images_of(part)

    def ids_of(self, split: Split) -> str | None:
        """Return the folder of ids of one split, None if its source is images."""
        source = self._reads(split)[0]
        return filled(source) if holds_ids(source) else None

    def made_from(self, split: Split) -> str:
        """Describe what a split's ids are made from; a file with another description is not reused."""
        source, count, part = self._reads(split)
        words = f"{'all' if count is None else count} images of {source}"
        if part is not None:
            words += f", {'of' if split == 'test' else 'without'} the held-out share {self.eval_share:g}"
        if split == "train":
            words += " and their mirror images" if self.flip else ""
            words += f", five ADM crops at {', '.join(map(str, self.crop_scales))}" if self.crop_scales else ""
        return words + (f", seed {self._seed(split)}" if source == WORLD else "")

    def _reads(self, split: Split) -> tuple[str, int | None, tuple[float, Split] | None]:
        """Return the source of a split, its number of rows, and its held-out part (share, split)."""
        count = self.num_images if split == "train" else self.num_eval_images
        part = None if self.eval_source is not None or self.source == WORLD else (self.eval_share, split)
        own = split == "test" and self.eval_source is not None
        return str(self.eval_source) if own else self.source, count, part

    def _seed(self, split: Split) -> int:
        # Even for training and odd for evaluation, so that no two seeds share images of the shapes data set.
        return 2 * self.seed + (split == "test")


def prepare_ids(
    config: ClassIdsConfig, split: Literal["train", "eval"], tokenizer: ImageTokenizer, image_processor: Any
) -> ClassIds:
    """Read the ids of one split, encoding the images first if the file is absent.

    Raises:
        UserError: the images cannot be read, or the file was made by another tokenizer or from other images.
    """
    path = Path(config.folder) / f"{split}.parquet"
    part: Split = "test" if split == "eval" else "train"
    if (folder := config.ids_of(part)) is not None:
        found = read_class_ids_folder(folder)
        found.info.require(tokenizer_fingerprint=tokenizer.fingerprint)
        return found
    made_from = config.made_from(part)
    if not path.is_file():
        training = part == "train"
        extract_ids(
            tokenizer,
            image_processor,
            config.images_of(part),
            path,
            made_from=made_from,
            batch_size=config.batch_size,
            flip=config.flip and training,
            crop_scales=config.crop_scales if training else (),
        )
    ids = read_class_ids(path)
    ids.info.require(tokenizer_fingerprint=tokenizer.fingerprint)
    if ids.info.made_from != made_from:
        raise UserError(
            f"{path} holds {ids.info.made_from}, and the run asks for {made_from}: choose another data.folder."
        )
    return ids


def extract_ids(
    tokenizer: ImageTokenizer,
    image_processor: Any,
    images: Dataset,
    path: Path,
    *,
    made_from: str,
    flip: bool = False,
    crop_scales: Sequence[float] = (),
    batch_size: int = 64,
) -> None:
    """Encode labeled images into the file `path`, one row for each of their `views_of`.

    Raises:
        UserError: the codebook does not fit 16 bits, or the file cannot be written.
    """
    config = tokenizer.config
    views = partial(views_of, size=config.image_size, scales=crop_scales, flip=flip)
    info = IdsInfo(tokenizer.fingerprint, config.codebook_size, config.grid, made_from)
    write_class_ids(path, info, _encoded(tokenizer.eval(), image_processor, images, views, batch_size))


@torch.inference_mode()
def _encoded(
    tokenizer: ImageTokenizer,
    image_processor: Any,
    raw_images: Any,
    views: Callable[[Image.Image], list[Image.Image]],
    batch_size: int,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (ids [b, M], class_labels [b]) batch by batch."""
    for start in tqdm(range(0, len(raw_images), batch_size), desc="ids", unit="batch"):
        rows = [raw_images[i] for i in range(start, min(start + batch_size, len(raw_images)))]
        images = [views(row["image"]) for row in rows]
        labels = np.asarray([row["label"] for row in rows]).repeat(len(images[0]))
        flat = [view for each in images for view in each]
        ids = []
        for begin in range(0, len(flat), batch_size):
            batch = image_processor(images=flat[begin : begin + batch_size], return_tensors="pt")
            ids.append(tokenizer.encode(batch.pixel_values.to(tokenizer.device)).ids.cpu().numpy())
        yield np.concatenate(ids), labels
