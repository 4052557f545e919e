"""The image ids in a language model's vocabulary.

`token_id = base + id`; the text tokenizer has no strings for image ids, so user text can never become one. The base is
above the padded embedding matrix, never at `len(tokenizer)`: real checkpoints pad their matrices (Qwen 151 665 ->
151 936 rows), and a resize to `len(tokenizer) + K` would cut those rows off.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from unimm.field_rules import check_settings

RowInit = Literal["random", "mean", "codebook"]
ROW_INITS: tuple[RowInit, ...] = ("random", "mean", "codebook")

SPARE_ROWS = 64  # rows left free below the image ids, for tokens that are added later; also the unit of rounding


@dataclass(frozen=True)
class Markers:
    """The marker strings of an image in text: begin, the placeholder of one image token, end."""

    begin: str
    image: str
    end: str


KNOWN_MARKERS = (
    Markers("<|vision_start|>", "<|image_pad|>", "<|vision_end|>"),  # Qwen-VL, and the default
    Markers("<img>", "<IMG_CONTEXT>", "</img>"),  # InternVL
)


@dataclass(kw_only=True)
class ImageVocabularyFields:
    """Config fields shared by all unified models.

    Args:
        text_vocab_size: rows that text generation may choose from: those of the host (the language or multimodal model
            that the image tokenizer is attached to); spare rows follow up to image_vocab_start.
        image_vocab_start: token id of codebook id 0.
        codebook_size: number of image ids, K.
        image_grid: [h, w] of image tokens in one image.
        boi_token_id: token before a generated image; eoi_token_id: token after it.
        null_prompt: token ids of the unconditional prompt of guidance, up to and including the begin marker.
        null_prompt_prob: probability that training replaced an image prompt by it; 0: guidance was never trained.
        tokenizer_fingerprint: fingerprint of the image tokenizer that the image ids belong to.
        host_config: the config of the host, for `detach`.
        image_position_mode: positions of generated image tokens: "1d", as text; "2d", row and column, for hosts that
            use such positions for input images (M-RoPE).
    """

    text_vocab_size: int = 0
    image_vocab_start: int = 0
    codebook_size: int = 0
    image_grid: list[int] = field(default_factory=lambda: [16, 16])
    boi_token_id: int | None = None
    eoi_token_id: int | None = None
    null_prompt: list[int] = field(default_factory=list)
    null_prompt_prob: float = 0.0
    tokenizer_fingerprint: str | None = None
    host_config: dict[str, Any] | None = None
    image_position_mode: str = "1d"

    def __post_init__(self, **kwargs: Any) -> None:
        check_settings(vars(self) | kwargs, type(self).__name__)
        super().__post_init__(**kwargs)  # type: ignore[misc]


@dataclass(frozen=True)
class VisualVocabulary:
    """The range of image ids in the vocabulary: codebook id k is token `base + k`, k in 0..size-1."""

    base: int
    size: int

    @property
    def end(self) -> int:
        """Return the number of rows of the whole embedding matrix."""
        return self.base + self.size

    def token_ids(self, ids: Tensor) -> Tensor:
        """Convert codebook ids of any shape to token ids of the language model.

        Raises:
            ValueError: if an id is outside 0..size-1.
        """
        _check_range(ids, 0, self.size, "ids")
        return ids + self.base

    def ids(self, token_ids: Tensor) -> Tensor:
        """Convert token ids to codebook ids, the inverse of `token_ids`.

        Raises:
            ValueError: if a token id is not an image id.
        """
        _check_range(token_ids, self.base, self.end, "token_ids")
        return token_ids - self.base

    def contains(self, token_ids: Tensor) -> Tensor:
        """Return the mask of the entries that are image ids, same shape as `token_ids`."""
        return (token_ids >= self.base) & (token_ids < self.end)


def _check_range(values: Tensor, low: int, high: int, name: str) -> None:
    if values.numel() and (values.min() < low or values.max() >= high):
        raise ValueError(
            f"{name} must lie in {low}..{high - 1}, these run from {int(values.min())} to {int(values.max())}"
        )


def visual_base(embedding_rows: int, tokenizer_length: int) -> int:
    """Return the first image id: a multiple of `SPARE_ROWS`, with at least `SPARE_ROWS` free rows below it."""
    used = max(embedding_rows, tokenizer_length)
    return -(-(used + SPARE_ROWS) // SPARE_ROWS) * SPARE_ROWS


def add_markers(tokenizer: PreTrainedTokenizerBase, placeholder: str | None = None) -> Markers:
    """Return the image markers that `tokenizer` already has, or add the default ones to it as special tokens.

    Args:
        placeholder: the token that the host already uses for one image token.

    Raises:
        ValueError: if a marker is not a single token.
    """
    vocabulary = tokenizer.get_vocab()
    for markers in KNOWN_MARKERS:
        if {markers.begin, markers.image, markers.end} <= vocabulary.keys():
            break
    else:
        markers = KNOWN_MARKERS[0]
    if placeholder is not None:
        markers = replace(markers, image=placeholder)
    names = [markers.begin, markers.image, markers.end]
    tokenizer.add_special_tokens({"additional_special_tokens": names}, replace_extra_special_tokens=False)
    for name in names:
        pieces = tokenizer.encode(name, add_special_tokens=False)
        if len(pieces) != 1:
            raise ValueError(f"the image marker {name!r} must be one token of the text tokenizer, it is {len(pieces)}")
    return markers


def grow_rows(
    rows: Tensor,
    vocabulary: VisualVocabulary,
    *,
    row_init: RowInit = "random",
    codes: Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    """Add rows for the image ids to an embedding or head matrix; the old rows are kept bit for bit.

    Args:
        rows: [V, D], V <= vocabulary.base.
        row_init: "random": normal, with the mean and standard deviation of each column of the old rows; "mean": the
            mean old row; "codebook": a random orthogonal projection of the codes, scaled to the mean norm of the old
            rows (the spare rows below the image ids are then random).
        codes: codebook vectors [K, C]; needed by "codebook" only.

    Returns:
        [vocabulary.end, D], a new tensor.

    Raises:
        ValueError: if `row_init` is unknown, there are more old rows than `vocabulary.base`, or codes are missing.
    """
    if row_init not in ROW_INITS:
        raise ValueError(f"row_init is {row_init!r}; known: {', '.join(ROW_INITS)}")
    if len(rows) > vocabulary.base:
        raise ValueError(f"the matrix has {len(rows)} rows, there are {vocabulary.base} below the image ids")
    generator = torch.Generator().manual_seed(seed)
    old = rows.detach().float().cpu()
    mean, std = old.mean(0), old.std(0)
    new = mean.expand(vocabulary.end - len(rows), -1).clone()  # [base - V + K, D]
    if row_init != "mean":
        new += std * torch.randn(new.shape, generator=generator)
    if row_init == "codebook":
        given = 0 if codes is None else len(codes)
        if codes is None or given != vocabulary.size:
            raise ValueError(f"row_init='codebook' needs {vocabulary.size} codes, got {given}")
        new[-vocabulary.size :] = _projected_codes(codes, old.norm(dim=1).mean(), old.shape[1], generator)
    return torch.cat([rows.detach(), new.to(rows)])


def _projected_codes(codes: Tensor, norm: Tensor, width: int, generator: torch.Generator) -> Tensor:
    """Project codes [K, C] to rows [K, width] of mean norm `norm`, keeping relative distances if C <= width."""
    centred = codes.detach().float().cpu() - codes.detach().float().cpu().mean(0)
    size = max(centred.shape[1], width)
    projection = torch.linalg.qr(torch.randn(size, size, generator=generator)).Q
    projected = centred @ projection[: centred.shape[1], :width]
    return projected * (norm / projected.norm(dim=1).mean().clamp_min(1e-12))


def set_vocab_size(config: PreTrainedConfig, *, old: int, new: int) -> None:
    """Set every `vocab_size` that equals `old` to `new`, in `config` and its nested configs."""
    if getattr(config, "vocab_size", None) == old:
        config.vocab_size = new
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            set_vocab_size(value, old=old, new=new)
