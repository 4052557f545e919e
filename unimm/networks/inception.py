"""The Inception network that defines FID, sFID and the inception score, in plain torch.

This is the TensorFlow network of 2015-12-05 as in FID's ports (Szegedy et al., https://arxiv.org/abs/1512.00567), not
torchvision's `inception_v3`: average pooling excludes padding, the last block max-pools, there are 1008 classes, and
images are resized by TensorFlow 1's bilinear filter, which has no half-pixel centers. Parameters have the names of the
published files: the ports `pt_inception-2015-12-05-6726825d.pth` (pytorch-fid) and
`weights-inception-2015-12-05-6726825d.pth` (torch-fidelity) hold the same tensors.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unimm.networks.weight_files import load_exactly, read_weights

GET_INCEPTION = (
    "pt_inception-2015-12-05-6726825d.pth (pytorch-fid's release fid_weights) or torch-fidelity's "
    "weights-inception-2015-12-05-6726825d.pth"
)
INPUT_SIDE = 299
SPATIAL_CHANNELS = 7  # sFID uses the first 7 of the layer's 192 channels
Step = tuple[str, int, int | tuple[int, int]]  # name, channels, kernel
Fork = tuple[Step, Step]  # two parallel convolutions of one input


class InceptionFeatures(NamedTuple):
    """Features of an image batch: `pool` [B, 2048] for FID, `spatial` [B, 2023] for sFID, and `probabilities` [B, 1008]
    for the inception score."""

    pool: Tensor
    spatial: Tensor
    probabilities: Tensor


class Convolution(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(
        self, before: int, channels: int, kernel: int | tuple[int, int], stride: int = 1, *, same: bool = True
    ) -> None:
        super().__init__()
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (height // 2, width // 2) if same and stride == 1 else (0, 0)
        self.conv = nn.Conv2d(before, channels, (height, width), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(channels, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """An Inception block: parallel branches of convolutions and a pooling branch, concatenated.

    Args:
        before: input channels.
        chains: the branches; with "shrink" the last convolution of each has stride 2.
        pool: "average" or "maximum" (then a 1 x 1 convolution to `pool_channels`), or "shrink" (max pooling at stride
            2, which halves the sides).
    """

    def __init__(
        self, before: int, chains: Sequence[Sequence[Step | Fork]], pool: str, pool_channels: int | None = None
    ) -> None:
        super().__init__()
        self.pool = pool
        self.chains: list[list[tuple[str, ...]]] = []
        width = 0
        for chain in chains:
            inside, names = before, []
            for index, step in enumerate(chain):
                stride = 2 if pool == "shrink" and index == len(chain) - 1 else 1
                forks: Sequence[Step] = (step,) if isinstance(step[0], str) else step
                for name, channels, kernel in forks:
                    self.add_module(name, Convolution(inside, channels, kernel, stride))
                names.append(tuple(name for name, *_ in forks))
                inside = sum(channels for _, channels, _ in forks)
            self.chains.append(names)
            width += inside
        if pool_channels is not None:
            self.branch_pool = Convolution(before, pool_channels, 1)
        self.channels = width + (pool_channels or before)

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for names in self.chains:
            y = x
            for forks in names:
                y = torch.cat([self.get_submodule(name)(y) for name in forks], dim=1)
            outputs.append(y)
        if self.pool == "shrink":
            return torch.cat([*outputs, F.max_pool2d(x, 3, stride=2)], dim=1)
        if self.pool == "average":
            pooled = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        else:
            pooled = F.max_pool2d(x, 3, stride=1, padding=1)
        return torch.cat([*outputs, self.branch_pool(pooled)], dim=1)


def _wide(before: int, pool_channels: int) -> Mixed:
    double: list[Step] = [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)]
    five: list[Step] = [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)]
    return Mixed(before, [[("branch1x1", 64, 1)], five, double], "average", pool_channels)


def _sevens(inner: int) -> Mixed:
    across, down = (1, 7), (7, 1)
    seven: list[Step] = [("branch7x7_1", inner, 1), ("branch7x7_2", inner, across), ("branch7x7_3", 192, down)]
    double: list[Step] = [("branch7x7dbl_1", inner, 1), ("branch7x7dbl_2", inner, down)]
    double += [("branch7x7dbl_3", inner, across), ("branch7x7dbl_4", inner, down), ("branch7x7dbl_5", 192, across)]
    return Mixed(768, [[("branch1x1", 192, 1)], seven, double], "average", 192)


def _forked(before: int, pool: str) -> Mixed:
    three: list[Step | Fork] = [
        ("branch3x3_1", 384, 1),
        (("branch3x3_2a", 384, (1, 3)), ("branch3x3_2b", 384, (3, 1))),
    ]
    double: list[Step | Fork] = [
        ("branch3x3dbl_1", 448, 1),
        ("branch3x3dbl_2", 384, 3),
        (("branch3x3dbl_3a", 384, (1, 3)), ("branch3x3dbl_3b", 384, (3, 1))),
    ]
    return Mixed(before, [[("branch1x1", 320, 1)], three, double], pool, 192)


class FidInception(nn.Module):
    """FID's Inception network: uint8 images [B, 3, H, W] -> `InceptionFeatures`, in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = Convolution(32, 32, 3, same=False)
        self.Conv2d_2b_3x3 = Convolution(32, 64, 3)
        self.Conv2d_3b_1x1 = Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = Convolution(80, 192, 3, same=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _wide(192, 32), _wide(256, 64), _wide(288, 64)
        double: list[Step] = [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)]
        self.Mixed_6a = Mixed(288, [[("branch3x3", 384, 3)], double], "shrink")
        self.Mixed_6b, self.Mixed_6c = _sevens(128), _sevens(160)
        self.Mixed_6d, self.Mixed_6e = _sevens(160), _sevens(192)
        three: list[Step] = [("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3)]
        seven: list[Step] = [("branch7x7x3_1", 192, 1), ("branch7x7x3_2", 192, (1, 7))]
        seven += [("branch7x7x3_3", 192, (7, 1)), ("branch7x7x3_4", 192, 3)]
        self.Mixed_7a = Mixed(768, [three, seven], "shrink")
        self.Mixed_7b, self.Mixed_7c = _forked(1280, "average"), _forked(2048, "maximum")
        self.fc = nn.Linear(2048, 1008)
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> InceptionFeatures:
        x = (tensorflow1_resize(images.float(), INPUT_SIDE) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))
        x = F.max_pool2d(x, 3, stride=2)
        for name in ("5b", "5c", "5d", "6a", "6b", "6c"):
            x = self.get_submodule(f"Mixed_{name}")(x)
        spatial = self.Mixed_6d.branch1x1(x)[:, :SPATIAL_CHANNELS]  # [B, 7, 17, 17]
        for name in ("6d", "6e", "7a", "7b", "7c"):
            x = self.get_submodule(f"Mixed_{name}")(x)
        pool = x.mean(dim=(2, 3))
        probabilities = F.softmax(pool @ self.fc.weight.T, dim=1)  # the published score leaves the bias out
        return InceptionFeatures(pool, spatial.permute(0, 2, 3, 1).flatten(1), probabilities)


def tensorflow1_resize(x: Tensor, side: int) -> Tensor:
    """Resize [B, C, H, W] to [B, C, side, side] as TensorFlow 1's resize_bilinear: row i samples at i * H / side."""
    for dim in (2, 3):
        size = x.shape[dim]
        place = torch.arange(side, dtype=x.dtype, device=x.device) * (size / side)
        low = place.floor().long()
        first, second = x.index_select(dim, low), x.index_select(dim, (low + 1).clamp(max=size - 1))
        share = (place - low).view((1, 1, -1, 1) if dim == 2 else (1, 1, 1, -1))
        x = first + (second - first) * share
    return x


def load_inception(path: str | Path) -> FidInception:
    """Load the network from a weight file. Raises UserError, naming the file to get, if it is absent or wrong."""
    network = FidInception()
    state = read_weights(path, name="The Inception network of FID", get=GET_INCEPTION, setting="--inception")
    for key in network.state_dict():
        if key.endswith("num_batches_tracked"):  # absent in old files, unused in evaluation mode
            state.setdefault(key, torch.tensor(0))
    load_exactly(network, state, name="The Inception network of FID", get=GET_INCEPTION)
    return network
