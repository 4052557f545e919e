"""Pixel heads from a grid of tokens to an image: a linear layer per patch (VQRAE) or convolutions (VFMTok, IDEAL)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unimm.tokenizer.configuration import GROUPS
from unimm.tokenizer.layers import OwnStart, start_torch


class PatchHead(nn.Module):
    """A linear layer from each token to a patch, then unpatchify: [B, M, D] -> [B, 3, rows*q, columns*q].

    A patch's output vector has the layout (row, column, channel).
    """

    def __init__(self, hidden_size: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.projection = nn.Linear(hidden_size, 3 * patch_size**2)

    def forward(self, hidden_states: Tensor, grid: tuple[int, int]) -> Tensor:
        (rows, columns), q = grid, self.patch_size
        patches = self.projection(hidden_states).unflatten(2, (q, q, 3)).unflatten(1, (rows, columns))
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(-1, 3, rows * q, columns * q)


class Float32GroupNorm(nn.GroupNorm):
    """A group norm in float32, under autocast and in a model that was cast.

    CUDA's autocast does so anyway; on a CPU the backward in bfloat16 takes 3.5 times as long.
    """

    def __init__(self, channels: int, groups: int = GROUPS) -> None:
        super().__init__(groups, channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        return F.group_norm(wide, self.num_groups, self.weight.to(wide), self.bias.to(wide), self.eps).to(x.dtype)


class ResidualConv(nn.Module):
    """A residual block, x + conv(silu(norm(conv(silu(norm(x)))))), [B, C, h, w]; x passes a 1x1 if C changes."""

    def __init__(self, before: int, after: int, groups: int = GROUPS) -> None:
        super().__init__()
        self.norm1, self.conv1 = Float32GroupNorm(before, groups), nn.Conv2d(before, after, 3, padding=1)
        self.norm2, self.conv2 = Float32GroupNorm(after, groups), nn.Conv2d(after, after, 3, padding=1)
        self.shortcut = nn.Identity() if before == after else nn.Conv2d(before, after, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(hidden)))


class SpatialAttention(nn.Module):
    """Single-head self-attention over all positions, x + attention(norm(x)), [B, C, h, w]."""

    def __init__(self, channels: int, groups: int = GROUPS) -> None:
        super().__init__()
        self.norm = Float32GroupNorm(channels, groups)
        self.query, self.key, self.value, self.output = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (layer(normed).flatten(2).transpose(1, 2) for layer in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]  # [B, h * w, C]
        return x + self.output(mixed.transpose(1, 2).view_as(x))


class Upsample(nn.Module):
    """Nearest-neighbor upsampling by 2, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class ConvHead(OwnStart):
    """LlamaGen's convolutional decoder in VFMTok's light form: two residual blocks per level, attention only in the
    middle.

    [B, h * w, W] -> RGB in about [-1, 1], not clamped, [B, 3, h * s, w * s] with s = 2^(levels - 1).

    Args:
        width: of the tokens.
        channels: base number of channels.
        multipliers: of the channels, one per level, from full resolution down.
        groups: of the group norms.
    """

    def __init__(self, width: int, channels: int, multipliers: Sequence[int], groups: int = GROUPS) -> None:
        super().__init__()
        sizes = [channels * m for m in reversed(multipliers)]
        self.inlet = nn.Conv2d(width, sizes[0], 3, padding=1)
        self.middle = nn.Sequential(
            ResidualConv(sizes[0], sizes[0], groups),
            SpatialAttention(sizes[0], groups),
            ResidualConv(sizes[0], sizes[0], groups),
        )
        levels: list[nn.Module] = []
        for before, after in zip([sizes[0], *sizes], sizes, strict=False):
            levels += [Upsample(before)] if levels else []
            levels += [ResidualConv(before, after, groups), ResidualConv(after, after, groups)]
        self.levels = nn.Sequential(*levels)
        self.norm, self.outlet = Float32GroupNorm(sizes[-1], groups), nn.Conv2d(sizes[-1], 3, 3, padding=1)

    def forward(self, hidden_states: Tensor, grid: tuple[int, int]) -> Tensor:
        x = hidden_states.transpose(1, 2).unflatten(2, grid)
        traced = torch.compiler.is_compiling() or torch.compiler.is_exporting()  # the batch may have no size then
        if x.is_cpu and not traced and not torch.is_grad_enabled():
            # a CPU's convolutions round differently in batches of other sizes: one by one, no image depends on others
            return torch.cat([self._paint(each) for each in x.split(1)])
        return self._paint(x)

    def _paint(self, x: Tensor) -> Tensor:
        x = self.levels(self.middle(self.inlet(x)))
        return self.outlet(F.silu(self.norm(x)))

    def start(self) -> None:
        start_torch(self)
