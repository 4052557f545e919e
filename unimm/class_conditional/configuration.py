"""The configuration of the class-conditional GPT, and the published model sizes."""

import dataclasses
from typing import Any, Self

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from unimm.errors import UserError
from unimm.field_rules import check_settings

SIZES: dict[str, tuple[int, int, int]] = {
    "B": (12, 12, 768),
    "L": (24, 16, 1024),
    "XL": (36, 20, 1280),
    "XXL": (48, 24, 1536),
    "2B": (48, 32, 1920),
    "3B": (24, 32, 3200),
}
"""LlamaGen's sizes (arXiv 2406.06525, table 2) and VFMTok's 2B (arXiv 2507.08441): layers, heads, width."""

FEED_FORWARD_MULTIPLE = 256


@strict
class ClassConditionalConfig(PreTrainedConfig):
    """Configuration of a LlamaGen GPT over the ids of one image tokenizer. Defaults: size B, 16 x 16 ids, ImageNet.

    Args:
        codebook_size: K.
        grid: rows and columns of the ids of one image; M is their product.
        num_classes: number of classes; the embedding table has one more row, the last, for "no class".
        intermediate_size: None = two thirds of 4 x hidden_size, rounded up to a multiple of 256.
        token_dropout, residual_dropout, feed_forward_dropout, attention_dropout: on the embedded sequence, the
            attention output, the feed-forward output and the attention probabilities.
        class_dropout: the share of training samples whose class is replaced by "no class".
        rope_theta: base of the rotary frequencies.
        tokenizer_fingerprint: of the tokenizer whose ids the model generates; None = unknown.
    """

    model_type = "unimm_class_conditional"

    codebook_size: int = 16384
    grid: list[int] | tuple[int, ...] = (16, 16)
    num_classes: int = 1000
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int | None = None
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    token_dropout: float = 0.1
    residual_dropout: float = 0.1
    feed_forward_dropout: float = 0.1
    attention_dropout: float = 0.0
    class_dropout: float = 0.1
    initializer_range: float = 0.02
    tokenizer_fingerprint: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        check_settings(vars(self) | kwargs, type(self).__name__)
        super().__post_init__(**kwargs)
        self.grid = tuple(self.grid)
        if self.intermediate_size is None:
            wanted = 2 * 4 * self.hidden_size // 3
            self.intermediate_size = -(-wanted // FEED_FORWARD_MULTIPLE) * FEED_FORWARD_MULTIPLE
        if len(self.grid) != 2 or min(*self.grid, self.codebook_size, self.num_classes) < 1:
            raise UserError(
                f"A grid of {' x '.join(map(str, self.grid))} ids, {self.codebook_size} codes and {self.num_classes} "
                "classes leave nothing to draw: the grid is rows and columns, and every number at least 1."
            )
        if self.hidden_size % (4 * self.num_attention_heads):
            raise UserError(
                f"hidden_size {self.hidden_size} is no multiple of 4 x {self.num_attention_heads} heads: one half of "
                "each head turns with the row, the other with the column, in pairs."
            )

    @classmethod
    def of_size(cls, size: str, **fields: Any) -> Self:
        """Build the configuration of a size in `SIZES`, with `fields` overriding it.

        Raises UserError for an unknown size or field (transformers itself would accept an unknown field and ignore it).
        """
        known = sorted(field.name for field in dataclasses.fields(cls) if field.init)
        if unknown := sorted(fields.keys() - set(known)):
            raise UserError(f"{cls.__name__} has no field {unknown[0]!r}; it knows {', '.join(known)}.")
        if size not in SIZES:
            raise UserError(f"There is no size {size!r}; the sizes are {', '.join(SIZES)}.")
        layers, heads, width = SIZES[size]
        return cls(**{"num_hidden_layers": layers, "num_attention_heads": heads, "hidden_size": width} | fields)

    @property
    def num_image_tokens(self) -> int:
        """Return M, the number of ids of one image."""
        return self.grid[0] * self.grid[1]

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads
