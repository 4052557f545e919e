"""Layers shared by VFMTok and IDEAL: attention, pre-norm blocks, MLPs, deformable attention, resized position tables.

A layer whose initialization differs from transformers' default subclasses `OwnStart`; `ImageTokenizer._init_weights`
calls its `start`. Shapes: B batch, L or S tokens, W width.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention

Grid = tuple[int, int]


class OwnStart(nn.Module):
    """A module that initializes its own weights, after its children have initialized theirs."""

    def start(self) -> None:
        """Initialize in place, with `transformers.initialization` (which leaves loaded tensors alone)."""
        raise NotImplementedError


def start_linear(module: nn.Module) -> None:
    """Initialize every linear layer in `module` with Xavier-uniform weights and zero biases."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                init.zeros_(layer.bias)


def start_torch(module: nn.Module) -> None:
    """Initialize every linear and convolutional layer in `module` as torch does: uniform, bounded by fan_in^-0.5."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            init.kaiming_uniform_(layer.weight, a=5**0.5)
            if layer.bias is not None:
                bound = layer.weight[0].numel() ** -0.5
                init.uniform_(layer.bias, -bound, bound)


class Attention(nn.Module):
    """Multi-head attention of `queries` [B, L, W] over `memory` [B, S, W] (None: self-attention), optionally causal."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.output = nn.Linear(width, width)

    def forward(self, queries: Tensor, memory: Tensor | None = None, causal: bool = False) -> Tensor:
        memory = queries if memory is None else memory
        q, k, v = (
            layer(tokens).unflatten(2, (self.heads, -1)).transpose(1, 2)  # [B, heads, L, W / heads]
            for layer, tokens in ((self.query, queries), (self.key, memory), (self.value, memory))
        )
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=causal)
        return self.output(mixed.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """SwiGLU MLP, W2 (silu(a) * b) with [a, b] = W1 x, of two thirds of `inner`, rounded up to a multiple of 8."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        inner = math.ceil(inner * 2 / 3 / 8) * 8
        self.gate_and_value = nn.Linear(width, 2 * inner)
        self.output = nn.Linear(inner, width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        gate, value = self.gate_and_value(hidden_states).chunk(2, dim=-1)
        return self.output(F.silu(gate) * value)


class GeluMLP(nn.Sequential):
    """GELU MLP, dropout(W2 dropout(gelu(W1 x)))."""

    def __init__(self, width: int, inner: int, dropout: float) -> None:
        super().__init__(
            nn.Linear(width, inner), nn.GELU(), nn.Dropout(dropout), nn.Linear(inner, width), nn.Dropout(dropout)
        )


class PreNormBlock(nn.Module):
    """A pre-norm transformer block, x + Attention(LN x), then x + MLP(LN x): [B, L, W] -> [B, L, W].

    `dropout` applies to the attention probabilities, `output_dropout` to the attention output.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mlp: nn.Module,
        *,
        dropout: float,
        causal: bool,
        output_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.causal = causal
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads, dropout)
        self.output_dropout = nn.Dropout(output_dropout)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = mlp

    def forward(self, hidden_states: Tensor) -> Tensor:
        attended = self.attention(self.attention_norm(hidden_states), causal=self.causal)
        hidden_states = hidden_states + self.output_dropout(attended)
        return hidden_states + self.mlp(self.mlp_norm(hidden_states))


class DeformableAttention(OwnStart):
    """Multi-scale deformable attention (Deformable DETR, https://arxiv.org/abs/2010.04159, section 4.1).

    Every query samples a few points of each level, at learned offsets from its reference point, with transformers'
    pure-torch kernel. At initialization the points of head h lie in the h-th of `heads` directions, 1 to `points` cells
    away, with equal weights.
    """

    def __init__(self, width: int, heads: int, levels: int, points: int) -> None:
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.offsets = nn.Linear(width, heads * levels * points * 2)
        self.weights = nn.Linear(width, heads * levels * points)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)
        self.sample = MultiScaleDeformableAttention()

    def forward(self, queries: Tensor, references: Tensor, values: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Attend from queries to values.

        Args:
            queries: [B, L, W].
            references: [L, 2], (x, y) in [0, 1].
            values: [B, S, W], the levels concatenated.
            grids: (rows, columns) of each level.

        Returns:
            [B, L, W].
        """
        batch, length, _ = queries.shape
        places = (batch, length, self.heads, self.levels, self.points)
        sizes = torch.tensor([(columns, rows) for rows, columns in grids], device=queries.device)
        offsets = self.offsets(queries).view(*places, 2) / sizes[:, None]
        weights = self.weights(queries).view(*places[:3], -1).softmax(dim=-1).view(places)
        starts = torch.tensor([0, *(rows * columns for rows, columns in grids)]).cumsum(0)[:-1]
        sampled = self.sample(
            self.value(values).unflatten(2, (self.heads, -1)),
            sizes.flip(1),
            list(grids),
            starts.to(queries.device),
            references[None, :, None, None, None] + offsets,
            weights,
            64,  # im2col_step, which the pure-torch implementation ignores
        )
        return self.output(sampled)

    def start(self) -> None:
        angles = torch.arange(self.heads) * (2 * math.pi / self.heads)
        compass = torch.stack([angles.cos(), angles.sin()], dim=1)
        compass = compass / compass.abs().amax(dim=1, keepdim=True)  # [heads, 2], on the edge of a square
        steps = compass[:, None, None] * torch.arange(1, self.points + 1)[:, None]  # [heads, 1, points, 2]
        init.zeros_(self.offsets.weight)
        init.copy_(self.offsets.bias, steps.expand(-1, self.levels, -1, -1).flatten())
        init.zeros_(self.weights.weight)
        init.zeros_(self.weights.bias)
        start_linear(self.value)
        start_linear(self.output)


def cell_centers(grid: Grid, device: torch.device | None = None) -> Tensor:
    """Return the centers (x, y) of a grid's cells in raster order, [rows * columns, 2] in [0, 1]."""
    rows, columns = grid
    y, x = torch.meshgrid(
        (torch.arange(rows, device=device) + 0.5) / rows,
        (torch.arange(columns, device=device) + 0.5) / columns,
        indexing="ij",
    )
    return torch.stack([x, y], dim=-1).flatten(0, 1)


def resized_table(table: Tensor, old: Grid, new: Grid, *, nudge: float = 0.0) -> Tensor:
    """Resize a position table [1, rows * columns, W] to another grid by bicubic interpolation.

    With a `nudge` the interpolation uses the scale (new + nudge) / old instead of the size, as DINO (0.1) and VFMTok's
    code do.
    """
    if old == new:
        return table
    maps = table.unflatten(1, old).permute(0, 3, 1, 2).float()
    if nudge:
        scale = tuple((n + nudge) / o for n, o in zip(new, old, strict=True))
        maps = F.interpolate(maps, scale_factor=scale, mode="bicubic", align_corners=False)
    else:
        maps = F.interpolate(maps, size=new, mode="bicubic", align_corners=False)
    assert maps.shape[-2:] == new
    return maps.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)
