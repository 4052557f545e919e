"""Samplers: modules from encoder features to latents, [B, N, D] -> [B, M, C], in float32 because ids depend on them."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from unimm.tokenizer.layers import (
    Attention,
    DeformableAttention,
    GeluMLP,
    Grid,
    OwnStart,
    cell_centers,
    start_linear,
    start_torch,
)
from unimm.tokenizer.precision import Float32Module


class GridSampler(Float32Module):
    """VQRAE's sampler: one latent per patch (M = N), by a linear projection to the codebook width (section 3.2)."""

    def __init__(self, hidden_size: int, codebook_dim: int, pre_norm: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size) if pre_norm else nn.Identity()
        self.projection = nn.Linear(hidden_size, codebook_dim)

    def forward(self, features: Tensor) -> Tensor:
        return self.projection(self.norm(features))


class LevelAdapter(OwnStart):
    """An MLP from one level's features to the sampler's width, [B, N, D] -> [B, N, W]."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(hidden_size, width, bias=False),
            nn.LayerNorm(width),
            nn.ReLU(),
            nn.Linear(width, width, bias=False),
            nn.LayerNorm(width),
            nn.LayerNorm(width),
        )

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features)

    def start(self) -> None:
        start_torch(self)


class AnchorLayer(OwnStart):
    """A post-norm layer: deformable attention to the levels, causal self-attention of the anchors, and an MLP."""

    def __init__(self, width: int, heads: int, levels: int, points: int, inner: int) -> None:
        super().__init__()
        self.reading = DeformableAttention(width, heads, levels, points)
        self.reading_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.attention_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, inner), nn.ReLU(), nn.Linear(inner, width))
        self.mlp_norm = nn.LayerNorm(width)

    def forward(self, anchors: Tensor, positions: Tensor, places: Tensor, values: Tensor, grids: list[Grid]) -> Tensor:
        anchors = self.reading_norm(anchors + self.reading(anchors + positions, places, values, grids))
        anchors = self.attention_norm(anchors + self.attention(anchors + positions, causal=True))
        return self.mlp_norm(anchors + self.mlp(anchors))

    def start(self) -> None:
        start_torch(self.attention)
        start_torch(self.mlp)


class AnchorSampler(Float32Module, OwnStart):
    """VFMTok's region-adaptive sampling (arXiv 2507.08441).

    Learned anchors on their own grid, in raster order, sample several encoder levels by deformable attention, so M is
    independent of N.

    Args:
        hidden_size, width, codebook_dim: D, W and C.
        heads, depth, points, inner: of the layers; `points` per head and level.
        levels: number of encoder levels.
        anchor_grid, patch_grid: (rows, columns) of the anchors and of the patches.
    """

    def __init__(
        self,
        hidden_size: int,
        width: int,
        codebook_dim: int,
        *,
        heads: int,
        depth: int,
        points: int,
        inner: int,
        levels: int,
        anchor_grid: Grid,
        patch_grid: Grid,
    ) -> None:
        super().__init__()
        self.anchor_grid, self.patch_grid = anchor_grid, patch_grid
        anchors = anchor_grid[0] * anchor_grid[1]
        self.adapters = nn.ModuleList(LevelAdapter(hidden_size, width) for _ in range(levels))
        self.anchors = nn.Parameter(torch.zeros(1, anchors, width))
        self.positions = nn.Parameter(torch.zeros(1, anchors, width))
        self.norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(AnchorLayer(width, heads, levels, points, inner) for _ in range(depth))
        self.projection = nn.Linear(width, codebook_dim)

    def forward(self, *levels: Tensor) -> Tensor:
        """Sample encoder levels, each [B, N, D], into latents [B, M, C]."""
        values = torch.cat([adapter(level) for adapter, level in zip(self.adapters, levels, strict=True)], dim=1)
        places = cell_centers(self.anchor_grid, values.device)
        anchors = self.norm(self.anchors).expand(values.shape[0], -1, -1)
        for layer in self.layers:
            anchors = layer(anchors, self.positions, places, values, [self.patch_grid] * len(levels))
        return self.projection(anchors)

    def start(self) -> None:
        for table in (self.anchors, self.positions):
            init.normal_(table, std=table.shape[-1] ** -0.5)
        start_linear(self.projection)


class FusionSampler(Float32Module, OwnStart):
    """IDEAL's fusion of a shallow and a deep level (arXiv 2606.11096; M = N).

    Deep tokens cross-attend to all shallow tokens for detail, followed by an MLP and the projection to latents.

    Args:
        hidden_size, codebook_dim: D and C.
        heads, inner, dropout: of the attention and the MLP; dropout also applies to the MLP's output.
    """

    def __init__(self, hidden_size: int, codebook_dim: int, *, heads: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.deep_norm = nn.LayerNorm(hidden_size)
        self.shallow_norm = nn.LayerNorm(hidden_size)
        self.attention = Attention(hidden_size, heads, dropout)
        self.mlp_norm = nn.LayerNorm(hidden_size)
        self.mlp = GeluMLP(hidden_size, inner, dropout)
        self.projection = nn.Linear(hidden_size, codebook_dim)

    def forward(self, shallow: Tensor, deep: Tensor) -> Tensor:
        """Fuse two levels, each [B, N, D], into latents [B, N, C]."""
        fused = deep + self.attention(self.deep_norm(deep), self.shallow_norm(shallow))
        fused = fused + self.mlp(self.mlp_norm(fused))
        return self.projection(fused)

    def start(self) -> None:
        start_linear(self)


def plain_norm(features: Tensor) -> Tensor:
    """Apply a layer norm without weights in float32, as IDEAL does to the shallow level (eps 1e-6)."""
    return F.layer_norm(features.float(), features.shape[-1:], eps=1e-6)
