"""Labelled pictures -> the files of ids that a class-conditional model is trained and judged on."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from unimm.class_conditional.ids import ClassIds, read_class_ids, write_class_ids
from unimm.data.ids import IdsInfo
from unimm.data.labelled import labelled_pictures
from unimm.data.pictures import crop
from unimm.errors import UserError
from unimm.tokenizer import ImageTokenizer


@dataclass
class ClassIdsConfig:
    """`source` and `eval_source` are labelled parquet files (columns image and label) or "shapes", read up to
    `num_pictures` and `num_eval_pictures` (None: all); their ids go into `folder`. `flip` adds the mirror image of
    every training image. With `crop_scales` a training image gives five crops for each of them, the corners and the
    centre of the image at that scale of the crop; LlamaGen's "ten-crop" is [1.1, 1.05] with `flip`, 20 rows an image.
    `seed` is that of the stream of ids, and of the shapes world."""

    source: str
    eval_source: str
    folder: str
    num_pictures: int | None = None
    num_eval_pictures: int | None = None
    flip: bool = True
    crop_scales: list[float] = field(default_factory=list)
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if any(scale < 1 for scale in self.crop_scales):
            raise UserError(
                f"data.crop_scales are sides of the image over those of a crop, at least 1: {min(self.crop_scales)}."
            )


def prepare_ids(
    config: ClassIdsConfig, split: Literal["train", "eval"], tokenizer: ImageTokenizer, image_processor: Any
) -> ClassIds:
    """The ids of one split, extracted where their file is absent.

    Raises:
        UserError: the pictures cannot be read, or the file was made by another tokenizer or from other pictures.
    """
    training = split == "train"
    source, count = (config.source, config.num_pictures) if training else (config.eval_source, config.num_eval_pictures)
    flip, scales = config.flip and training, config.crop_scales if training else []
    seed = 2 * config.seed + (not training)
    path = Path(config.folder) / f"{split}.parquet"
    made_from = f"{'all' if count is None else count} pictures of {source}" + (
        " and their mirror images" if flip else ""
    )
    made_from += f", five crops at {', '.join(map(str, scales))}" if scales else ""
    made_from += f", seed {seed}" if source == "shapes" else ""
    if not path.is_file():
        pictures = labelled_pictures(source, count, seed=seed)
        extract_ids(
            tokenizer,
            image_processor,
            pictures,
            path,
            made_from=made_from,
            batch_size=config.batch_size,
            flip=flip,
            crop_scales=scales,
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
    pictures: Dataset,
    path: Path,
    *,
    made_from: str,
    flip: bool = False,
    crop_scales: Sequence[float] = (),
    batch_size: int = 64,
) -> None:
    """Encode labelled images into the file `path`, each of their `views_of` as a row of its own.

    Raises:
        UserError: the codebook does not fit 16 bits, or the file cannot be written.
    """
    config = tokenizer.config
    views = partial(views_of, size=config.image_size, scales=crop_scales, flip=flip)
    info = IdsInfo(tokenizer.fingerprint, config.codebook_size, config.grid, made_from)
    write_class_ids(path, info, _encoded(tokenizer.eval(), image_processor, pictures, views, batch_size))


@torch.inference_mode()
def _encoded(
    tokenizer: ImageTokenizer,
    image_processor: Any,
    pictures: Any,
    views: Callable[[Image.Image], list[Image.Image]],
    batch_size: int,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(ids [b, M], class_labels [b]), batch by batch."""
    for start in tqdm(range(0, len(pictures), batch_size), desc="ids", unit="batch"):
        rows = [pictures[i] for i in range(start, min(start + batch_size, len(pictures)))]
        images = [views(row["image"]) for row in rows]
        labels = np.asarray([row["label"] for row in rows]).repeat(len(images[0]))
        flat = [view for each in images for view in each]
        ids = []
        for begin in range(0, len(flat), batch_size):
            batch = image_processor(images=flat[begin : begin + batch_size], return_tensors="pt")
            ids.append(tokenizer.encode(batch.pixel_values.to(tokenizer.device)).ids.cpu().numpy())
        yield np.concatenate(ids), labels


def views_of(image: Image.Image, *, size: int, scales: Sequence[float] = (), flip: bool = False) -> list[Image.Image]:
    """What an image is learned as: the centre, cut out at `size` pixels a side, or the corners and the centre of the
    image at each of the `scales` of that size; with `flip` each with its mirror image behind it."""
    views = [] if scales else [crop(image, size)]
    for scale in scales:
        whole = crop(image, int(size * scale))
        rest = whole.width - size
        corners = [(0, 0), (rest, 0), (0, rest), (rest, rest), (round(rest / 2), round(rest / 2))]
        views += [whole.crop((left, top, left + size, top + size)) for left, top in corners]
    if not flip:
        return views
    return [each for view in views for each in (view, view.transpose(Image.Transpose.FLIP_LEFT_RIGHT))]
