"""`ClassConditionalGPT`, an autoregressive model of image ids given a class (LlamaGen, arXiv 2406.06525, section 2.2).

    [class | id_0 ... id_{M-2}] -> embed -> n x (norm, attention, norm, SwiGLU) -> norm -> head -> [id_0 ... id_{M-1}]

Rotary position embeddings are two-dimensional: one half of each head rotates with the row, the other with the column.
At the class token cosine and sine are both 0, so its query and key vanish: every token attends to it with a logit of 0,
and it acts only through its value and the residual stream. The head is zero-initialized, so the first loss is ln K.

Shapes: B batch, M image tokens, L sequence (the class and L - 1 ids), K codebook size, D width, h heads of width d.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRMSNorm, eager_attention_forward
from transformers.utils import ModelOutput

from unimm.class_conditional.configuration import ClassConditionalConfig
from unimm.class_conditional.generation import draw_ids
from unimm.errors import UserError
from unimm.sampling import SAMPLED, ImageSampling
from unimm.saving import WholeCheckpointMixin
from unimm.tokenizer.precision import Float32Module


@dataclass
class ClassConditionalOutput(ModelOutput):
    """`loss`, the mean cross entropy in nats, and `logits` [B, M, K] in float32: row m predicts id m."""

    loss: Tensor = None
    logits: Tensor = None


class ClassConditionalGPT(WholeCheckpointMixin, PreTrainedModel):
    """A GPT from classes to image ids. `forward` is teacher-forced, in training and evaluation; `generate` samples."""

    config_class = ClassConditionalConfig
    base_model_prefix = "gpt"
    main_input_name = "class_labels"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["Block"]
    _keep_in_fp32_modules_strict = ["rotation"]

    def __init__(self, config: ClassConditionalConfig) -> None:
        super().__init__(config)
        self.class_embedding = nn.Embedding(config.num_classes + 1, config.hidden_size)
        self.id_embedding = nn.Embedding(config.codebook_size, config.hidden_size)
        self.dropout = nn.Dropout(config.token_dropout)
        self.rotation = GridRotation(config)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = nn.Linear(config.hidden_size, config.codebook_size, bias=False)
        self.post_init()

    def forward(self, class_labels: Tensor, ids: Tensor) -> ClassConditionalOutput:
        """Predict every id from the class and the ids before it.

        Args:
            class_labels: [B]; `num_classes` means "no class". In training a share of them is set to it.
            ids: [B, M] in raster order.

        Raises:
            UserError: the number of ids is not M, or, in evaluation mode, a class or id is out of range (a training
                set is checked once, when it is read).
        """
        self._check(class_labels, ids)
        if self.training:
            class_labels = self.drop_classes(class_labels)
        classes = self.class_embedding(class_labels)[:, None]
        logits = self.logits(torch.cat([classes, self.id_embedding(ids[:, :-1])], dim=1))
        return ClassConditionalOutput(F.cross_entropy(logits.flatten(0, 1), ids.flatten().long()), logits)

    def logits(self, embedded: Tensor, cache: Cache | None = None) -> Tensor:
        """Compute logits [B, L, K] in float32 from embeddings [B, L, D] that continue the tokens in `cache`."""
        past = 0 if cache is None else cache.get_seq_length()
        positions = torch.arange(past, past + embedded.shape[1], device=embedded.device)
        hidden = self.dropout(embedded)
        mask = create_causal_mask(self.config, inputs_embeds=hidden, attention_mask=None, past_key_values=cache)
        rotation = self.rotation(positions)
        for block in self.blocks:
            hidden = block(hidden, rotation, mask, cache)
        return self.head(self.norm(hidden)).float()

    def drop_classes(self, class_labels: Tensor) -> Tensor:
        """Return class_labels [B] with a share of `class_dropout` replaced by "no class"."""
        dropped = torch.rand(len(class_labels), device=class_labels.device) < self.config.class_dropout
        return class_labels.masked_fill(dropped, self.config.num_classes)

    @torch.no_grad()
    def generate(
        self,
        class_labels: Tensor | Sequence[int],
        sampling: ImageSampling = SAMPLED,
        *,
        seed: int = 0,
        first_image: int = 0,
        guidance_interval: tuple[int, int] | None = None,
    ) -> Tensor:
        """Sample the ids of one image per class.

        Args:
            class_labels: [B], each 0..num_classes - 1.
            sampling: guidance scale (one or one per image), temperature, top-k and top-p.
            seed, first_image: image b has index k = first_image + b, and its noise depends on (seed, k) only.
            guidance_interval: guidance applies to ids start <= m < stop, the others are sampled from the conditional
                logits; None guides all. LlamaGen's `cfg_interval` k is (0, k + 2).

        Returns:
            ids [B, M].

        Raises:
            UserError: a class is out of range, or the interval is invalid.
        """
        labels = torch.as_tensor(class_labels, dtype=torch.int64, device=self.device)
        refuse_outside("Class labels", labels, self.config.num_classes)
        return draw_ids(self, labels, sampling, seed, first_image, guidance_interval)

    def _check(self, class_labels: Tensor, ids: Tensor) -> None:
        wanted = self.config.num_image_tokens
        if ids.ndim != 2 or ids.shape[1] != wanted or class_labels.shape != ids.shape[:1]:
            rows, columns = self.config.grid
            raise UserError(
                f"This model takes {rows} x {columns} = {wanted} ids and one class an image; given are ids "
                f"{list(ids.shape)} and class labels {list(class_labels.shape)}."
            )
        if not self.training:
            refuse_outside("Class labels", class_labels, self.config.num_classes + 1)
            refuse_outside("Image ids", ids, self.config.codebook_size)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self.head:
            init.zeros_(module.weight)
        elif isinstance(module, GridRotation):
            init.copy_(module.table, grid_rotation(module.grid, module.head_dim, module.theta))


class Block(GradientCheckpointingLayer):
    """A pre-norm transformer block: x + attention(norm(x)), then x + SwiGLU(norm(x))."""

    def __init__(self, config: ClassConditionalConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config, layer)
        self.attention_dropout = nn.Dropout(config.residual_dropout)
        self.feed_forward_norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.feed_forward = SwiGLU(config)
        self.feed_forward_dropout = nn.Dropout(config.feed_forward_dropout)

    def forward(self, hidden: Tensor, rotation: Tensor, mask: Any, cache: Cache | None) -> Tensor:
        hidden = hidden + self.attention_dropout(self.attention(self.attention_norm(hidden), rotation, mask, cache))
        return hidden + self.feed_forward_dropout(self.feed_forward(self.feed_forward_norm(hidden)))


class Attention(nn.Module):
    """Causal self-attention with a fused qkv projection and rotary query and key."""

    num_key_value_groups = 1
    is_causal = True

    def __init__(self, config: ClassConditionalConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.out = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor, rotation: Tensor, mask: Any, cache: Cache | None) -> Tensor:
        heads, width = self.config.num_attention_heads, self.config.head_dim
        query, key, value = self.qkv(hidden).unflatten(-1, (3, heads, width)).permute(2, 0, 3, 1, 4)  # [B, h, L, d]
        query, key = rotate(query, rotation), rotate(key, rotation)
        if cache is not None:
            key, value = cache.update(key, value, self.layer)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.config.attention_dropout if self.training else 0.0
        output, _ = attend(self, query, key, value, mask, dropout=dropout, scaling=width**-0.5)  # [B, L, h, d]
        return self.out(output.flatten(-2))


class SwiGLU(nn.Module):
    """SwiGLU MLP without biases, down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    def __init__(self, config: ClassConditionalConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(hidden)) * self.up(hidden))


class GridRotation(Float32Module):
    """A table of cosine and sine by position, [M + 1, d / 2, 2]: the class, then the grid cells in raster order."""

    def __init__(self, config: ClassConditionalConfig) -> None:
        super().__init__()
        self.grid, self.head_dim, self.theta = config.grid, config.head_dim, config.rope_theta
        # Persistent, because transformers leaves other buffers uninitialized after `from_pretrained`.
        self.register_buffer("table", grid_rotation(self.grid, self.head_dim, self.theta))

    def forward(self, positions: Tensor) -> Tensor:
        """Return the cosine and sine of positions [L], [L, d / 2, 2]."""
        return self.table[positions]


def grid_rotation(grid: Sequence[int], head_dim: int, theta: float) -> Tensor:
    """Compute the table of `GridRotation`, [M + 1, d / 2, 2].

    Of each head's d / 2 pairs the first half rotates with the row, the second with the column; the class token's entry
    is zero, cosine included.
    """
    rows, columns = grid
    frequencies = theta ** -(torch.arange(0, head_dim // 2, 2, dtype=torch.float32) / (head_dim // 2))  # [d / 4]
    by_row = torch.arange(rows)[:, None, None] * frequencies
    by_column = torch.arange(columns)[None, :, None] * frequencies
    shape = (rows, columns, head_dim // 4)
    angles = torch.cat([by_row.expand(shape), by_column.expand(shape)], dim=-1).flatten(0, 1)  # [M, d / 2]
    return F.pad(torch.stack([angles.cos(), angles.sin()], dim=-1), (0, 0, 0, 0, 1, 0))


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate neighboring pairs of x [B, h, L, d] by `rotation` [L, d / 2, 2], in float32."""
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotation.unbind(-1)
    return torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2).to(x.dtype)


def refuse_outside(what: str, values: Tensor, count: int) -> None:
    """Raise UserError unless all values lie in 0..count - 1."""
    if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < count:
        raise UserError(f"{what} run from 0 to {count - 1}; these run from {int(values.min())} to {int(values.max())}.")
