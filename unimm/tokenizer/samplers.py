"""Samplers: how features become latents, [B, N, D] -> [B, M, C]."""

from torch import Tensor, nn

from unimm.tokenizer.precision import Float32Module


class GridSampler(Float32Module):
    """Every patch keeps its place (M = N): a linear in-projection to the codebook's width (VQRAE, section 3.2)."""

    def __init__(self, hidden_size: int, codebook_dim: int, pre_norm: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size) if pre_norm else nn.Identity()
        self.projection = nn.Linear(hidden_size, codebook_dim)

    def forward(self, features: Tensor) -> Tensor:
        return self.projection(self.norm(features))
