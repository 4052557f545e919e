"""Transformer decoders from codes to the input tokens of a pixel head, one for each of the three tokenizers.

Shapes: B batch, M image tokens, C codebook width, D encoder width, W decoder width.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers import initialization as init

from unimm.tokenizer.encoders import encoder_family
from unimm.tokenizer.layers import GeluMLP, Grid, OwnStart, PreNormBlock, SwiGLU, resized_table, start_linear


class SymmetricViTDecoder(OwnStart):
    """VQRAE's decoder: the encoder's transformer blocks on the token grid, [B, M, C] -> [B, M, D].

    Bidirectional and randomly initialized, with learned positions, a final norm and no CLS token. The out-projection
    includes the paper's "patch size 1" embedding: a linear layer followed by a 1x1 convolution is one linear map
    (section 3.2).
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
        """Return the position embeddings, resized bicubically if the grid differs from that of training."""
        return resized_table(self.positions, self.grid, grid)

    def start(self) -> None:
        init.normal_(self.positions, std=0.02)


class CausalDecoder(OwnStart):
    """VFMTok's shared ViT decoder (arXiv 2507.08441, in the layout of the released code).

    The same causal layers decode mask tokens that follow the codes into pixel tokens on one grid and the encoder's
    features on another. A sequence is codes, CLS, the mask tokens of one branch, registers. The registers come last, as
    in the released code, so under the causal mask no other token attends to them.

    Args:
        codebook_dim, width, hidden_size: C, W and D.
        heads, depth, inner: of the layers; SwiGLU uses two thirds of `inner`.
        anchors: M.
        pixel_grid, feature_grid: (rows, columns) of the two branches' mask tokens.
        registers: number of register tokens.
        share_mask_token: one mask token for both branches (the paper's default) or one each (the released code).
        dropout: of the attention.
    """

    def __init__(
        self,
        codebook_dim: int,
        width: int,
        hidden_size: int,
        *,
        heads: int,
        depth: int,
        inner: int,
        anchors: int,
        pixel_grid: Grid,
        feature_grid: Grid,
        registers: int,
        share_mask_token: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        self.pixel_grid, self.feature_grid = pixel_grid, feature_grid
        self.projection = nn.Linear(codebook_dim, width)
        self.code_positions = nn.Parameter(torch.zeros(1, anchors, width))
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.cls_position = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, feature_grid[0] * feature_grid[1], width))
        self.mask_tokens = nn.Parameter(torch.zeros(1 if share_mask_token else 2, 1, width))  # pixels, features
        self.registers = nn.Parameter(torch.zeros(1, registers, width))
        self.pixel_norm = nn.LayerNorm(width)  # also of the codes
        self.feature_norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(
            PreNormBlock(width, heads, SwiGLU(width, inner), dropout=dropout, causal=True) for _ in range(depth)
        )
        self.feature_head = nn.Linear(width, hidden_size)

    def forward(self, codes: Tensor) -> Tensor:
        """Decode codes [B, M, C] into P pixel tokens on `pixel_grid`, [B, P, W]."""
        positions = resized_table(self.positions, self.feature_grid, self.pixel_grid, nudge=0.1)
        return self._branch(codes, self.mask_tokens[:1] + positions, self.pixel_norm)

    def features(self, codes: Tensor) -> Tensor:
        """Predict the encoder's features [B, N, D] from codes [B, M, C]."""
        return self.feature_head(self._branch(codes, self.mask_tokens[-1:] + self.positions, self.feature_norm))

    def _branch(self, codes: Tensor, masks: Tensor, norm: nn.Module) -> Tensor:
        memory = self.pixel_norm(self.projection(codes.to(self.projection.weight.dtype)) + self.code_positions)
        asked = norm(torch.cat([self.cls + self.cls_position, masks, self.registers], dim=1))
        hidden_states = torch.cat([memory, asked.expand(codes.shape[0], -1, -1)], dim=1)
        for block in self.blocks:
            hidden_states = block(hidden_states)
        start = memory.shape[1] + 1  # after the codes and CLS
        return hidden_states[:, start : start + masks.shape[1]]

    def start(self) -> None:
        start_linear(self)
        for table in (self.code_positions, self.cls, self.cls_position, self.positions, self.mask_tokens):
            init.normal_(table, std=table.shape[-1] ** -0.5)
        init.zeros_(self.registers)


class FeatureDecoder(OwnStart):
    """IDEAL's decoder (arXiv 2606.11096): bidirectional pre-norm layers that predict deep and shallow features.

    The pixel head decodes the deep features. CLS and register tokens are attended to, and their outputs are dropped.

    Args:
        codebook_dim, hidden_size: C and D.
        heads, depth, inner: of the layers.
        grid: (rows, columns) of the codes in training.
        registers: number of register tokens.
        dropout: of the attention, inside the MLP, and of the outputs of both.
    """

    def __init__(
        self,
        codebook_dim: int,
        hidden_size: int,
        *,
        heads: int,
        depth: int,
        inner: int,
        grid: Grid,
        registers: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.grid = grid
        self.projection = nn.Linear(codebook_dim, hidden_size)
        self.positions = nn.Parameter(torch.zeros(1, grid[0] * grid[1], hidden_size))
        self.cls = nn.Parameter(torch.zeros(1, 1, hidden_size))
        self.cls_position = nn.Parameter(torch.zeros(1, 1, hidden_size))
        self.registers = nn.Parameter(torch.zeros(1, registers, hidden_size))
        self.norm = nn.LayerNorm(hidden_size)
        self.blocks = nn.ModuleList(
            PreNormBlock(
                hidden_size,
                heads,
                GeluMLP(hidden_size, inner, dropout),
                dropout=dropout,
                output_dropout=dropout,
                causal=False,
            )
            for _ in range(depth)
        )
        self.deep_head = nn.Linear(hidden_size, hidden_size)
        self.shallow_head = nn.Linear(hidden_size, hidden_size)

    def forward(self, codes: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """Predict the deep and the shallow features, each [B, M, D], from codes [B, M, C]."""
        tokens = self.projection(codes.to(self.projection.weight.dtype))
        tokens = tokens + resized_table(self.positions, self.grid, grid)
        around = [table.expand(codes.shape[0], -1, -1) for table in (self.cls + self.cls_position, self.registers)]
        hidden_states = self.norm(torch.cat([around[0], tokens, around[1]], dim=1))
        for block in self.blocks:
            hidden_states = block(hidden_states)
        hidden_states = hidden_states[:, 1 : 1 + tokens.shape[1]]
        return self.deep_head(hidden_states), self.shallow_head(hidden_states)

    def start(self) -> None:
        start_linear(self)
        for table in (self.positions, self.cls, self.cls_position):
            init.normal_(table, std=table.shape[-1] ** -0.5)
        init.zeros_(self.registers)
