"""Zero-shot color classification of objects with CLIP (https://arxiv.org/abs/2103.00020), as in GenEval's scorer.

Pixels outside the object's mask become gray, the box is cropped, and CLIP's center crop cuts off the ends of elongated
boxes; all three are part of the benchmark. Each class has its own text classifier over ten colors, the normalized mean
of three prompt templates.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer, CLIPModel

from unimm.data.resizing import resized_crop
from unimm.errors import UserError, reading
from unimm.evaluation.geneval.detector import Segment, checkpoint_folder
from unimm.evaluation.geneval.rules import COLORS, GRAY
from unimm.runs.provenance import model_fingerprint
from unimm.saving import no_load_report, refuse_holes

CLIP_ID = "openai/clip-vit-large-patch14"
CLIP_SHA256 = "a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb"
"""sha256 of the published model.safetensors of CLIP_ID."""
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
KEEP = "original"
LOGIT_SCALE = 100.0  # affects the shares of the vote, not which color wins


class Vote(NamedTuple):
    """The color of an object, and each color's share of the vote (softmax over the ten colors)."""

    color: str
    shares: dict[str, float]


class ColorVoter:
    """A CLIP that classifies the colors of objects.

    Args:
        model: a CLIP, in evaluation mode.
        text_tokenizer: the CLIP's text tokenizer.
        name: name of the checkpoint.
        background: color of the pixels outside the mask; "original" keeps them.
        crop: whether to crop to the object's box.
        batch_size: objects per forward.
    """

    def __init__(
        self,
        model: Any,
        text_tokenizer: Any,
        name: str,
        *,
        background: str = GRAY,
        crop: bool = True,
        batch_size: int = 16,
    ) -> None:
        self.model, self.text_tokenizer, self.name = model, text_tokenizer, name
        self.background, self.crop, self.batch_size = background, crop, batch_size
        self.fingerprint = model_fingerprint(model)
        self._classifiers: dict[str, Tensor] = {}

    @torch.inference_mode()
    def vote(self, image: Image.Image, segments: Sequence[Segment], class_name: str) -> list[Vote]:
        """Classify the color of each segment of `class_name`.

        Raises:
            UserError: the network returned scores that are not finite.
        """
        views = [object_view(image, segment, self.background, crop=self.crop) for segment in segments]
        votes = []
        for start in range(0, len(views), self.batch_size):
            logits = self._logits(views[start : start + self.batch_size], class_name)
            for row, index in zip(logits.softmax(-1).tolist(), logits.argmax(-1).tolist(), strict=True):
                votes.append(Vote(COLORS[index], dict(zip(COLORS, row, strict=True))))
        return votes

    def describe(self) -> dict[str, Any]:
        """Return name, weights, dtype and device, to be recorded with every result."""
        kind = str(self.model.dtype).removeprefix("torch.")
        return {"name": self.name, "sha256": self.fingerprint, "dtype": kind, "device": self.model.device.type}

    def _logits(self, views: Sequence[Image.Image], class_name: str) -> Tensor:
        """Return the color logits [B, 10] in float32."""
        size = self.model.config.vision_config.image_size
        pixel_values = torch.stack([prepare_view(view, size) for view in views])
        features = self.model.get_image_features(pixel_values=pixel_values.to(self.model.device, self.model.dtype))
        images = F.normalize(features.pooler_output.float(), dim=-1)
        logits: Tensor = LOGIT_SCALE * images @ self._classifier(class_name).T
        if not torch.isfinite(logits).all():
            raise UserError(
                f"{self.name} gave scores that are not finite on {self.model.device} in {self.model.dtype}: no color "
                "is named with it. Try another --dtype or --device, or fetch the checkpoint anew."
            )
        return logits

    def _classifier(self, class_name: str) -> Tensor:
        """Return the text classifier [10, D]: per color the mean over the templates, L2-normalized."""
        if class_name not in self._classifiers:
            texts = [template.format(color=color, name=class_name) for color in COLORS for template in TEMPLATES]
            tokens = self.text_tokenizer(texts, padding=True, return_tensors="pt").to(self.model.device)
            features = self.model.get_text_features(**tokens).pooler_output.float()
            each = F.normalize(features, dim=-1).unflatten(0, (len(COLORS), len(TEMPLATES)))
            self._classifiers[class_name] = F.normalize(each.mean(1), dim=-1)
        return self._classifiers[class_name]


def object_view(image: Image.Image, segment: Segment, background: str = GRAY, *, crop: bool = True) -> Image.Image:
    """Mask and crop one object of an upright RGB image, as CLIP receives it."""
    blank = image if background == KEEP else Image.new("RGB", image.size, color=background)
    alone = Image.composite(image, blank, Image.fromarray(segment.mask))
    return alone.crop(segment.box) if crop else alone  # Pillow rounds fractional corners, halves to even


def prepare_view(view: Image.Image, size: int) -> Tensor:
    """Preprocess as the original CLIP: short side to `size` (bicubic), center crop, normalize; [3, size, size].

    A crop offset of half a pixel is rounded to even, as in the original code; transformers rounds it down.
    """
    width, height = view.size
    resized = (size, int(size * height / width)) if width <= height else (int(size * width / height), size)
    corner = [int(round((side - size) / 2)) for side in resized]
    square = resized_crop(view, resized, corner, size, Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (pixels.float() / 255 - mean) / std


def load_color_voter(
    path: str | Path | None,
    *,
    device: torch.device,
    dtype: torch.dtype,
    background: str = GRAY,
    crop: bool = True,
) -> ColorVoter:
    """Load the CLIP from a local folder.

    Raises:
        UserError: the folder is not given or missing, or the checkpoint is broken.
    """
    what = f"its model.safetensors has the sha256 {CLIP_SHA256}"
    folder = checkpoint_folder(path, "--clip", CLIP_ID, what)
    with reading("The colour classifier", folder), no_load_report():
        model, info = CLIPModel.from_pretrained(folder, dtype=dtype, output_loading_info=True, local_files_only=True)
        refuse_holes(model, info, folder, refuse_unexpected=False)
        text_tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return ColorVoter(model.to(device).eval(), text_tokenizer, folder.name, background=background, crop=crop)
