"""Feature spaces for comparing sets of images: Inception or EfficientNet-Lite0 (from a local file), any vision encoder,
or an image tokenizer's own encoder.

Distances carry the name of their space (`fid` is reserved for Inception, `fd_dinov2_cls_224` is on another scale). A
space's description holds the sha256 of the weights, the layer and the preprocessing. All spaces take the same 8-bit
images.
"""

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unimm.networks import efficientnet_lite
from unimm.networks.efficientnet_lite import EfficientNetLite0, load_efficientnet_lite0
from unimm.networks.inception import FidInception, load_inception
from unimm.runs.provenance import file_sha256, model_fingerprint
from unimm.tokenizer import ImageTokenizer
from unimm.tokenizer.encoders import build_encoder, encoder_family, final_norm
from unimm.tokenizer.pretrained import find_encoder, load_encoder

POOL, SPATIAL, PROBABILITIES = "pool", "spatial", "probabilities"


class FeatureSpace(Protocol):
    """A feature space. `features` takes images uint8 [B, H, W, 3] and returns `pool` [B, D]; Inception also returns
    `spatial` and `probabilities`."""

    name: str

    def features(self, images: np.ndarray) -> dict[str, Tensor]: ...

    def describe(self) -> dict[str, Any]: ...


class InceptionSpace:
    """The features of FID's Inception network."""

    name = "inception"

    def __init__(self, network: FidInception, sha256: str) -> None:
        self.network, self.sha256 = network, sha256

    @torch.inference_mode()
    def features(self, images: np.ndarray) -> dict[str, Tensor]:
        device = self.network.fc.weight.device
        found = self.network(torch.from_numpy(images).permute(0, 3, 1, 2).to(device))
        return {name: value.cpu() for name, value in found._asdict().items()}

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "sha256": self.sha256, "layer": "pool3", "resize": "tensorflow1 bilinear to 299"}


class EncoderSpace:
    """The features of a pretrained vision encoder: the CLS token after the final norm, or the mean patch without CLS.

    Images are resized to the encoder's own size (bicubic, no crop), as dgm-eval does for DINOv2.
    """

    def __init__(self, path: str | Path, device: torch.device) -> None:
        source = find_encoder(str(path))
        self.encoder = build_encoder(source.config)
        load_encoder(self.encoder, source)
        self.encoder.to(device).eval()
        self.side, self.mean, self.std = source.covered_size, source.image_mean, source.image_std
        self.family = encoder_family(self.encoder.config)
        self.layer = "cls" if self.family.cls_token else "mean"
        self.name = f"{self.encoder.config.model_type}_{self.layer}_{self.side}"

    @torch.inference_mode()
    def features(self, images: np.ndarray) -> dict[str, Tensor]:
        size = {"interpolate_pos_encoding": True} if self.family.asks_to_interpolate else {}
        pixel_values = _normalised(_resized(images, self.side), self.mean, self.std, self.encoder.device)
        states = self.encoder(pixel_values, output_hidden_states=True, **size).hidden_states[-1]
        tokens = final_norm(self.encoder)(states)
        return {POOL: (tokens[:, 0] if self.family.cls_token else tokens.mean(dim=1)).cpu()}

    def describe(self) -> dict[str, Any]:
        described = {"name": self.name, "sha256": model_fingerprint(self.encoder), "layer": self.layer}
        return described | {"resize": f"bicubic to {self.side}"}


class EfficientNetSpace:
    """The pooled features of EfficientNet-Lite0, trained on ImageNet alone: no tokenizer here learned from it."""

    name = "efficientnet_lite0"

    def __init__(self, network: EfficientNetLite0, sha256: str) -> None:
        self.network, self.sha256 = network, sha256

    @torch.inference_mode()
    def features(self, images: np.ndarray) -> dict[str, Tensor]:
        pixels = torch.from_numpy(_resized(images, efficientnet_lite.SIDE)).permute(0, 3, 1, 2)
        device = next(self.network.parameters()).device
        pixel_values = (pixels.to(device).float() - efficientnet_lite.MEAN) / efficientnet_lite.SCALE
        return {POOL: self.network.features(pixel_values).cpu()}

    def describe(self) -> dict[str, Any]:
        resize = f"bicubic to {efficientnet_lite.SIDE}"
        return {"name": self.name, "sha256": self.sha256, "layer": "pooled", "resize": resize}


class TokenizerSpace:
    """The mean patch feature of an image tokenizer's encoder.

    It is biased in favor of the tokenizer: a decoder trained toward these features matches them before it matches the
    image. `original` means that the encoder is the one from which the tokenizer's training started.
    """

    def __init__(self, tokenizer: ImageTokenizer, *, original: bool) -> None:
        self.tokenizer = tokenizer
        self.name = "original_encoder" if original else "own_encoder"

    @torch.inference_mode()
    def features(self, images: np.ndarray) -> dict[str, Tensor]:
        config = self.tokenizer.config
        resized = _resized(images, config.image_size)
        pixel_values = _normalised(resized, config.image_mean, config.image_std, self.tokenizer.device)
        return {POOL: self.tokenizer.features(pixel_values).mean(dim=1).float().cpu()}

    def describe(self) -> dict[str, Any]:
        sha256, side = model_fingerprint(self.tokenizer.encoder), self.tokenizer.config.image_size
        described = {"name": self.name, "sha256": sha256, "layer": "mean", "resize": f"bicubic to {side}"}
        return described | {"note": "biased towards tokenizers that were trained on this encoder"}


def load_space(
    inception: str | Path | None,
    encoder: str | Path | None,
    device: str | torch.device | None = None,
    *,
    efficientnet: str | Path | None = None,
) -> FeatureSpace | None:
    """Load the space of an Inception or EfficientNet-Lite0 file or of an encoder's folder; None if none is given.

    Raises:
        UserError: the file or folder cannot be read, or holds another network.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if inception is not None:
        return InceptionSpace(load_inception(inception).to(place), file_sha256(inception))
    if efficientnet is not None:
        return EfficientNetSpace(load_efficientnet_lite0(efficientnet).to(place), file_sha256(efficientnet))
    return None if encoder is None else EncoderSpace(encoder, place)


def space_settings(described: dict[str, Any]) -> dict[str, Any]:
    """Return `FeatureSpace.describe` without the sha256 of the weights, which a manifest keeps under `weights`."""
    return {name: value for name, value in described.items() if name != "sha256"}


def _resized(images: np.ndarray, side: int) -> np.ndarray:
    if images.shape[1:3] == (side, side):
        return images
    resized = [Image.fromarray(raw_image).resize((side, side), Image.Resampling.BICUBIC) for raw_image in images]
    return np.stack([np.asarray(image) for image in resized])


def _normalised(images: np.ndarray, mean: Any, std: Any, device: torch.device) -> Tensor:
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).to(device).float() / 255
    channels = [torch.tensor(values, device=device, dtype=torch.float32).view(1, 3, 1, 1) for values in (mean, std)]
    return (pixels - channels[0]) / channels[1]
