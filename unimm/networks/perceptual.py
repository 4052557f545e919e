"""The frozen networks of the perceptual loss (LPIPS is also reported as a metric), in plain torch.

- `LPIPS`: five stages of VGG-16 and one linear head each (Zhang et al., https://arxiv.org/abs/1801.03924);
- `ConvNeXt`: torchvision's ConvNeXt, Small by default (Liu et al., https://arxiv.org/abs/2201.03545), whose logits are
  compared.

Implemented here because torchvision is not a dependency; parameters have the names of the published weight files
(torchvision's and LPIPS'), which load without conversion.
"""

from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unimm.networks.weight_files import load_exactly, read_weights

VGG16_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
CONVNEXT_SMALL_DEPTHS, CONVNEXT_SMALL_WIDTHS = (3, 3, 27, 3), (96, 192, 384, 768)
GET_VGG16 = "torchvision's vgg16 weights (vgg16-397923af.pth)"
GET_HEADS = "the LPIPS v0.1 heads for VGG (vgg.pth, which the Python package `lpips` carries)"
GET_CONVNEXT = "torchvision's convnext_small weights (convnext_small-0c510722.pth)"


class LPIPS(nn.Module):
    """LPIPS with VGG-16: two batches of pixels [B, 3, H, W] in [0, 1], sides at least 16 -> mean distance (scalar).

    `stages` are the channels of the convolutions of each stage. The heads have no dropout, since the network is frozen.
    """

    def __init__(self, stages: tuple[tuple[int, ...], ...] = VGG16_STAGES) -> None:
        super().__init__()
        # The published shift and scale, for pixels in [-1, 1].
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1), persistent=False)
        self.features = nn.Sequential()
        self.taps: list[int] = []  # index of the last ReLU of each stage
        before = 3
        for stage in stages:
            if before != 3:
                self.features.append(nn.MaxPool2d(2))
            for channels in stage:
                self.features.extend([nn.Conv2d(before, channels, 3, padding=1), nn.ReLU()])
                before = channels
            self.taps.append(len(self.features) - 1)
        for index, stage in enumerate(stages):
            # An identity in place of the published head's dropout keeps the parameter name lin0.model.1.
            head = nn.Sequential(nn.Identity(), nn.Conv2d(stage[-1], 1, 1, bias=False))
            self.add_module(f"lin{index}", nn.ModuleDict({"model": head}))
        self.requires_grad_(False).eval()

    def forward(self, predicted: Tensor, target: Tensor) -> Tensor:
        return self.distances(predicted, target).mean()

    def distances(self, predicted: Tensor, target: Tensor) -> Tensor:
        """Compute the distance of each pair of images, [B]. Raises ValueError for sides below 16 px."""
        if min(predicted.shape[-2:]) < 16:
            raise ValueError(f"LPIPS needs images of at least 16 px and got {tuple(predicted.shape[-2:])}.")
        with torch.no_grad():
            target_levels = self._levels(target)
        distance = predicted.new_zeros(len(predicted))
        for index, (ours, theirs) in enumerate(zip(self._levels(predicted), target_levels, strict=True)):
            head = self.get_submodule(f"lin{index}.model")
            distance = distance + head((unit_length(ours, dim=1) - unit_length(theirs, dim=1)).square()).mean((1, 2, 3))
        return distance

    def _levels(self, pixels: Tensor) -> list[Tensor]:
        x = (2 * pixels - 1 - self.shift) / self.scale
        levels = []
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in self.taps:
                levels.append(x)
        return levels


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of [B, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """A ConvNeXt block (depth-wise 7x7, norm, MLP, layer scale, residual): [B, C, H, W] -> [B, C, H, W]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer_scale = nn.Parameter(torch.full((width, 1, 1), 1e-6))
        # The identity at index 1 replaces torchvision's permutation, so that 2 to 5 keep the published indices.
        self.block = nn.Sequential(
            nn.Conv2d(width, width, 7, padding=3, groups=width),
            nn.Identity(),
            nn.LayerNorm(width, eps=1e-6),
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.block[0](x).permute(0, 2, 3, 1)  # [B, H, W, C]
        return x + self.layer_scale * self.block[2:](y).permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """A ConvNeXt-Small logit loss: two batches of pixels in [0, 1] -> mean squared difference of their logits.

    It has 50.2 M parameters. Both batches are resized to 224 px (bilinear, antialiased) and ImageNet-normalized first,
    as in TA-TiTok (https://arxiv.org/abs/2501.07730).
    """

    def __init__(
        self,
        depths: tuple[int, ...] = CONVNEXT_SMALL_DEPTHS,
        widths: tuple[int, ...] = CONVNEXT_SMALL_WIDTHS,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1), persistent=False)
        self.features = nn.Sequential(
            nn.Sequential(nn.Conv2d(3, widths[0], 4, stride=4), ChannelNorm(widths[0], eps=1e-6))
        )
        for index, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            if index:
                before = widths[index - 1]
                self.features.append(
                    nn.Sequential(ChannelNorm(before, eps=1e-6), nn.Conv2d(before, width, 2, stride=2))
                )
            self.features.append(nn.Sequential(*(ConvNeXtBlock(width) for _ in range(depth))))
        self.classifier = nn.Sequential(
            ChannelNorm(widths[-1], eps=1e-6), nn.Flatten(1), nn.Linear(widths[-1], num_classes)
        )
        self.requires_grad_(False).eval()

    def forward(self, predicted: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            target_logits = self.logits(target)
        return F.mse_loss(self.logits(predicted), target_logits)

    def logits(self, pixels: Tensor) -> Tensor:
        """Compute ImageNet class logits [B, 1000] of pixels [B, 3, H, W] in [0, 1]."""
        x = F.interpolate(pixels, size=(224, 224), mode="bilinear", antialias=True)
        x = self.features((x - self.mean) / self.std)
        return self.classifier(x.mean((2, 3), keepdim=True))


def unit_length(x: Tensor, dim: int) -> Tensor:
    """Return x / (|x| + 1e-10) along `dim`. Its gradient at 0 is 0; LPIPS' own square root has NaN there."""
    return x / (torch.linalg.vector_norm(x, dim=dim, keepdim=True) + 1e-10)


def load_lpips(vgg16: str | Path | None, heads: str | Path | None = None) -> LPIPS:
    """Load LPIPS from torchvision's VGG-16 file and the heads' file (None: those of an installed `lpips` package).

    Raises UserError, naming the file to get, if a file is absent or belongs to another network.
    """
    trunk = read_weights(vgg16, name="The LPIPS trunk", get=GET_VGG16, setting="vgg16")
    linear = read_weights(heads or _packaged_heads(), name="LPIPS", get=GET_HEADS, setting="lpips_heads")
    state = {key: value for key, value in trunk.items() if key.startswith("features.")} | linear
    network = LPIPS()
    load_exactly(network, state, name="LPIPS", get=f"{GET_VGG16} and {GET_HEADS}")
    return network


def load_convnext(path: str | Path | None) -> ConvNeXt:
    """Load ConvNeXt-Small from torchvision's file. Raises UserError, naming what to get, if it is absent or wrong."""
    network = ConvNeXt()
    state = read_weights(path, name="ConvNeXt-S", get=GET_CONVNEXT, setting="convnext_s")
    load_exactly(network, state, name="ConvNeXt-S", get=GET_CONVNEXT)
    return network


def _packaged_heads() -> Path | None:
    """Find the heads of an installed `lpips` package without importing it (its import needs torchvision)."""
    package = find_spec("lpips")
    if package is None or package.origin is None:
        return None
    return Path(package.origin).parent / "weights" / "v0.1" / "vgg.pth"
