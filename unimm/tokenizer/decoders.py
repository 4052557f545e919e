"""From codes to pixels: a ViT that mirrors the encoder, and the head that paints one patch a token."""

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig

from unimm.tokenizer.encoders import encoder_family


class SymmetricViTDecoder(nn.Module):
    """The encoder's own block stack on the token grid, [B, M, C] -> [B, M, D].

    Bidirectional, randomly initialised, learned positions, a final norm and no CLS. The out-projection is also the
    "patch size 1"
    embedding: a 1x1 convolution after a linear layer is the same map (VQRAE, section 3.2).
    """

    def __init__(self, blocks_config: PreTrainedConfig, codebook_dim: int, grid: tuple[int, int]) -> None:
        super().__init__()
        width = blocks_config.hidden_size
        self.grid = grid
        self.projection = nn.Linear(codebook_dim, width)
        self.positions = nn.Parameter(Tensor(1, grid[0] * grid[1], width).normal_(std=0.02))
        self.blocks = encoder_family(blocks_config).blocks(blocks_config)
        self.norm = nn.LayerNorm(width, eps=blocks_config.layer_norm_eps)

    def forward(self, codes: Tensor, grid: tuple[int, int]) -> Tensor:
        hidden_states = self.projection(codes.to(self.projection.weight.dtype)) + self.positions_for(grid)
        return self.norm(self.blocks(hidden_states).last_hidden_state)

    def positions_for(self, grid: tuple[int, int]) -> Tensor:
        """The position table, resized bicubically where the grid is another one than in training."""
        if grid == self.grid:
            return self.positions
        table = self.positions.unflatten(1, self.grid).permute(0, 3, 1, 2)
        table = F.interpolate(table.float(), size=grid, mode="bicubic", align_corners=False)
        return table.permute(0, 2, 3, 1).flatten(1, 2).to(self.positions.dtype)


class PatchHead(nn.Module):
    """One linear layer a token, then the patches side by side: [B, M, D] -> [B, 3, rows*q, columns*q], layout (row,
    column, channel)."""

    def __init__(self, hidden_size: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.projection = nn.Linear(hidden_size, 3 * patch_size**2)

    def forward(self, hidden_states: Tensor, grid: tuple[int, int]) -> Tensor:
        (rows, columns), q = grid, self.patch_size
        patches = self.projection(hidden_states).unflatten(2, (q, q, 3)).unflatten(1, (rows, columns))
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(-1, 3, rows * q, columns * q)
