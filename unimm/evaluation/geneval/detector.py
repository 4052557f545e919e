"""Instance detection with Mask2Former (https://arxiv.org/abs/2112.01527), post-processed as GenEval's scorer does.

The post-processing of transformers scores masks at 384 x 384 and returns one label per query. The benchmark's detector
does neither, so its steps are implemented here: the 100 best (query, class) pairs, masks at the image's own size, class
probability times mask quality, boxes from masks. Preprocessing follows it too: bilinear without antialiasing, short
side 800 and long side at most 1333, zero padding on the right and below to a multiple of 32.

The published transformers weights come from another training run of the same architecture than the official scorer's,
hence the name `geneval-hf`: absolute scores shift, and `--calibrate` measures the agreement with people.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import Mask2FormerForUniversalSegmentation

from unimm.data.image_streams import to_array
from unimm.errors import UserError, reading
from unimm.evaluation.geneval.rules import COCO_CLASSES
from unimm.runs.provenance import model_fingerprint
from unimm.saving import no_load_report, refuse_holes

DETECTOR_ID = "facebook/mask2former-swin-small-coco-instance"
SHORT_SIDE, LONG_SIDE, MULTIPLE = 800, 1333, 32
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
CANDIDATES = 100  # (query, class) pairs that are considered
# COCO's names, used by the checkpoint, of the three classes that the benchmark renames.
_RENAMED = {"computer mouse": "mouse", "tv remote": "remote", "computer keyboard": "keyboard"}


class Segment(NamedTuple):
    """An object: `label` indexes COCO_CLASSES, `box` is (x1, y1, x2, y2) in whole pixels, `mask` bool [H, W]."""

    label: int
    box: tuple[float, float, float, float]
    score: float
    mask: np.ndarray


class Geometry(NamedTuple):
    """(height, width) of an image, after resizing, and after padding (the network's input)."""

    original: tuple[int, int]
    resized: tuple[int, int]
    padded: tuple[int, int]

    @classmethod
    def of(cls, height: int, width: int) -> "Geometry":
        """Compute the geometry of an image of this size."""
        scale = min(SHORT_SIDE / min(height, width), LONG_SIDE / max(height, width))
        resized = (int(height * scale + 0.5), int(width * scale + 0.5))
        padded = (-(-resized[0] // MULTIPLE) * MULTIPLE, -(-resized[1] // MULTIPLE) * MULTIPLE)
        return cls((height, width), resized, padded)


class InstanceDetector:
    """A Mask2Former that detects objects of COCO's 80 classes.

    Args:
        model: a Mask2Former for those classes, in evaluation mode.
        name: name of the checkpoint.
        min_score: segments with a lower score are dropped; keep it below every threshold that will be used.
        batch_size: images (of one size) per forward.
    """

    def __init__(self, model: Any, name: str, *, min_score: float = 0.05, batch_size: int = 4) -> None:
        self.model, self.name, self.min_score, self.batch_size = model, name, min_score, batch_size
        self.fingerprint = model_fingerprint(model)

    @torch.inference_mode()
    def detect(self, images: Sequence[Image.Image]) -> list[list[Segment]]:
        """Return the segments of each upright RGB image, best first.

        Raises:
            UserError: the network returned scores that are not finite.
        """
        found: dict[int, list[Segment]] = {}
        by_size: dict[tuple[int, int], list[int]] = {}
        for index, image in enumerate(images):
            by_size.setdefault(image.size, []).append(index)
        for (width, height), indices in by_size.items():
            geometry = Geometry.of(height, width)
            for start in range(0, len(indices), self.batch_size):
                batch = indices[start : start + self.batch_size]
                output = self._forward([images[index] for index in batch], geometry)
                for index, classes, masks in zip(batch, *output, strict=True):
                    found[index] = segments_of(classes, masks, geometry, self.min_score)
        return [found[index] for index in range(len(images))]

    def describe(self) -> dict[str, Any]:
        """Return name, weights, dtype and device, to be recorded with every result."""
        kind = str(self.model.dtype).removeprefix("torch.")
        return {"name": self.name, "sha256": self.fingerprint, "dtype": kind, "device": self.model.device.type}

    def _forward(self, images: Sequence[Image.Image], geometry: Geometry) -> tuple[Tensor, Tensor]:
        """Return class logits [B, Q, 81] and mask logits [B, Q, H/4, W/4], in float32."""
        pixel_values = prepare(images, geometry).to(self.model.device, self.model.dtype)
        output = self.model(pixel_values=pixel_values)
        classes, masks = output.class_queries_logits.float(), output.masks_queries_logits.float()
        if not (torch.isfinite(classes).all() and torch.isfinite(masks).all()):
            raise UserError(
                f"{self.name} gave scores that are not finite on {self.model.device} in {self.model.dtype}: nothing is "
                "scored with it. Try another --dtype or --device, or fetch the checkpoint anew."
            )
        return classes, masks


def prepare(images: Sequence[Image.Image], geometry: Geometry) -> Tensor:
    """Convert images of one size to the network's input [B, 3, H, W]: resize, round to 8 bits, normalize, pad."""
    pixels = torch.from_numpy(to_array(images)).permute(0, 3, 1, 2).float()
    resized = F.interpolate(pixels, geometry.resized, mode="bilinear", align_corners=False).round()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    below, right = (p - r for p, r in zip(geometry.padded, geometry.resized, strict=True))
    return F.pad((resized - mean) / std, (0, right, 0, below))


def segments_of(class_logits: Tensor, mask_logits: Tensor, geometry: Geometry, min_score: float) -> list[Segment]:
    """Return the segments of one image, best first.

    Args:
        class_logits: [Q, 81], the last column for "no object".
        mask_logits: [Q, h, w] over the padded input.
    """
    labels = class_logits.shape[-1] - 1
    probabilities = class_logits.softmax(-1)[:, :-1].flatten()  # [Q * 80]
    best = probabilities.topk(min(CANDIDATES, len(probabilities)))
    # Mask quality is at most 1: a class probability below min_score can be dropped before any mask is resized.
    kept = best.values > min_score
    scores, queries, classes = best.values[kept], best.indices[kept] // labels, best.indices[kept] % labels
    found = []
    for query in queries.unique().tolist():
        logits = _at_image_size(mask_logits[query], geometry)
        mask = logits > 0
        quality = (logits.sigmoid() * mask).sum() / (mask.sum() + 1e-6)
        box = box_of(mask)
        chosen = queries == query
        for probability, label in zip(scores[chosen], classes[chosen].tolist(), strict=True):
            if (score := float(probability * quality)) > min_score:
                found.append(Segment(label, box, score, mask.cpu().numpy()))
    return sorted(found, key=lambda segment: -segment.score)


def box_of(mask: Tensor) -> tuple[float, float, float, float]:
    """Return the box of a mask [H, W]: first column and row, and one past the last; zeros for an empty mask."""
    columns, rows = mask.any(0).nonzero()[:, 0], mask.any(1).nonzero()[:, 0]
    if not len(columns):
        return (0.0, 0.0, 0.0, 0.0)
    return (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))


def load_detector(
    path: str | Path | None,
    *,
    device: torch.device,
    dtype: torch.dtype,
    min_score: float = 0.05,
    batch_size: int = 4,
) -> InstanceDetector:
    """Load the detector from a local folder.

    Raises:
        UserError: the folder is not given or missing, the checkpoint is broken, or its classes are not COCO's 80.
    """
    folder = checkpoint_folder(path, "--detector", DETECTOR_ID, "an instance segmentation of COCO, about 280 MB")
    with reading("The detector", folder), no_load_report():
        model, info = Mask2FormerForUniversalSegmentation.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, local_files_only=True
        )
        refuse_holes(model, info, folder, refuse_unexpected=False)
    check_classes(model.config.id2label, folder)
    return InstanceDetector(model.to(device).eval(), folder.name, min_score=min_score, batch_size=batch_size)


def checkpoint_folder(path: str | Path | None, option: str, hub_id: str, what: str) -> Path:
    """Return the folder of a checkpoint given by a command line option.

    Raises:
        UserError: none is given, or it holds no checkpoint; the message says what to download and where to put it.
    """
    advice = (
        f"Get {hub_id} ({what}) with `hf download {hub_id} --local-dir FOLDER` and give that folder as {option} "
        "FOLDER; the sha256 of its weights is stored with the result."
    )
    if path is None:
        raise UserError(f"{option} is not given, and nothing is fetched unasked. {advice}")
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise UserError(f"{option} {folder} holds no checkpoint: it has no config.json. {advice}")
    return folder


def check_classes(names: dict[int, str], source: Path) -> None:
    """Check that a checkpoint's labels are COCO's 80 classes in COCO's order; they are matched by index.

    Raises:
        UserError: another number of classes, or another name at an index.
    """
    if len(names) != len(COCO_CLASSES):
        raise UserError(
            f"{source} knows {len(names)} classes, COCO's instances are {len(COCO_CLASSES)}: take a checkpoint of "
            f"instance segmentation, such as {DETECTOR_ID}."
        )
    for index, expected in enumerate(COCO_CLASSES):
        name = names[index]
        if name not in (expected, _RENAMED.get(expected), f"LABEL_{index}"):
            raise UserError(f"{source} calls class {index} {name!r}, in COCO's order it is {expected!r}.")


def _at_image_size(mask_logits: Tensor, geometry: Geometry) -> Tensor:
    """Resize mask logits [h, w] over the padded input to [H, W] over the image."""
    padded = F.interpolate(mask_logits[None, None], geometry.padded, mode="bilinear", align_corners=False)
    inside = padded[..., : geometry.resized[0], : geometry.resized[1]]
    return F.interpolate(inside, geometry.original, mode="bilinear", align_corners=False)[0, 0]
