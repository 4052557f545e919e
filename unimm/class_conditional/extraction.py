"""Labelled pictures -> the files of ids that a class-conditional model is trained and judged on."""

from collections.abc import Iterator
from dataclasses import dataclass
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
    every training picture. `seed` is that of the stream of ids, and of the picture world."""

    source: str
    eval_source: str
    folder: str
    num_pictures: int | None = None
    num_eval_pictures: int | None = None
    flip: bool = True
    batch_size: int = 64
    seed: int = 0


def prepare_ids(
    config: ClassIdsConfig, split: Literal["train", "eval"], tokenizer: ImageTokenizer, image_processor: Any
) -> ClassIds:
    """The ids of one split, extracted where their file is absent.

    Raises:
        UserError: the pictures cannot be read, or the file was made by another tokenizer or from other pictures.
    """
    training = split == "train"
    source, count = (config.source, config.num_pictures) if training else (config.eval_source, config.num_eval_pictures)
    flip, seed = config.flip and training, 2 * config.seed + (not training)
    path = Path(config.folder) / f"{split}.parquet"
    made_from = f"{'all' if count is None else count} pictures of {source}" + (
        " and their mirror images" if flip else ""
    )
    made_from += f", seed {seed}" if source == "shapes" else ""
    if not path.is_file():
        pictures = labelled_pictures(source, count, seed=seed)
        extract_ids(
            tokenizer, image_processor, pictures, path, made_from=made_from, flip=flip, batch_size=config.batch_size
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
    batch_size: int = 64,
) -> None:
    """Encode labelled pictures (their centre, cut out) into the file `path`; with `flip` each also mirrored, as a row
    of its own behind it.

    Raises:
        UserError: the codebook does not fit 16 bits, or the file cannot be written.
    """
    config = tokenizer.config
    info = IdsInfo(tokenizer.fingerprint, config.codebook_size, config.grid, made_from)
    write_class_ids(path, info, _encoded(tokenizer.eval(), image_processor, pictures, flip, batch_size))


@torch.inference_mode()
def _encoded(
    tokenizer: ImageTokenizer, image_processor: Any, pictures: Any, flip: bool, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(ids [b, M], class_labels [b]), batch by batch."""
    for start in tqdm(range(0, len(pictures), batch_size), desc="ids", unit="batch"):
        rows = [pictures[i] for i in range(start, min(start + batch_size, len(pictures)))]
        images = [crop(row["image"], tokenizer.config.image_size) for row in rows]
        labels = np.asarray([row["label"] for row in rows])
        if flip:
            images = [each for image in images for each in (image, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))]
            labels = labels.repeat(2)
        pixel_values = image_processor(images=images, return_tensors="pt").pixel_values.to(tokenizer.device)
        yield tokenizer.encode(pixel_values).ids.cpu().numpy(), labels
