"""What the Qwen-VL hosts share: their language model and patch merger, with the image tokenizer as vision tower.

The image tokenizer has one fixed image size, so every image has a known grid, and the three rows of M-RoPE positions
(time, row, column: Qwen2-VL, https://arxiv.org/abs/2409.12191) follow from the token ids alone. B sequences, L tokens.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import AutoModel, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

from unimm.errors import UserError
from unimm.mllm.hosts.registry import HostFamily, TinyHost
from unimm.mllm.unified import UnifiedModelMixin

Cells = tuple[Tensor, int, int]
"""Mask of image tokens in sequences, [B, L] bool, and the rows and columns of each image."""


def mrope_positions(mask: Tensor, images: Sequence[Cells]) -> Tensor:
    """Compute positions [3, B, L] (time, row, column) of sequences with the attention mask [B, L].

    A text token takes the next position in all three rows. The cells of an image share one start position, to which
    row and column are added; the next token continues after the longer side. Masked tokens have position 0.
    """
    advance = mask.long()
    offsets = torch.zeros(3, *mask.shape, dtype=torch.long, device=mask.device)
    for places, rows, columns in images:
        inside = places & mask.bool()
        cell = (inside.long().cumsum(1) - 1) % (rows * columns)
        advance = torch.where(inside, (cell == rows * columns - 1) * max(rows, columns), advance)
        place = torch.stack([torch.zeros_like(cell), cell // columns, cell % columns])
        offsets = torch.where(inside, place, offsets)
    return (advance.cumsum(1) - advance + offsets) * mask


class MergedPatches(nn.Module):
    """The host's patch merger as projector: [B, h * w, C] in row-major order -> [B, h * w / s^2, D], one token per
    s x s patches."""

    def __init__(self, merger: nn.Module, grid: Sequence[int], merge: int) -> None:
        super().__init__()
        self.merger, self.grid, self.merge = merger, tuple(grid), merge

    def forward(self, features: Tensor) -> Tensor:
        (rows, columns), s, batch = self.grid, self.merge, len(features)
        blocks = features.view(batch, rows // s, s, columns // s, s, -1).transpose(2, 3)
        return self.merger(blocks.reshape(batch * rows * columns, -1)).view(batch, rows * columns // s**2, -1)


class TokenizerInside:
    """Mixin before a Qwen-VL's inner model: image tokenizer and merger under the names shared by all unified models."""

    def __init__(self, config: Any) -> None:
        PreTrainedModel.__init__(self, config)  # Qwen-VL's own __init__ would build its tower
        self.vision_tower = AutoModel.from_config(config.vision_config)
        merger = self._merger(config.vision_config.hidden_size, config.text_config.hidden_size, config)
        self.multi_modal_projector = MergedPatches(merger, config.vision_config.patch_grid, config.spatial_merge_size)
        self.language_model = AutoModel.from_config(config.text_config)
        self.rope_deltas = None
        self.post_init()  # type: ignore[attr-defined]

    @staticmethod
    def _merger(width: int, text_width: int, config: Any) -> nn.Module:
        raise NotImplementedError

    def get_image_features(
        self, pixel_values: Tensor, image_grid_thw: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Return the merged patches as `pooler_output`, one [n, D] per image of pixel_values [I, 3, H, W]; there are
        no deepstack features, as the tokenizer has a single feature layer.

        Raises:
            UserError: if the inputs are patches from the host's own processor.
        """
        if image_grid_thw is not None or pixel_values.ndim != 4:
            raise UserError("These images come from another processor: use the one that was saved with this model.")
        features = self.vision_tower(pixel_values).last_hidden_state
        merged = tuple(self.multi_modal_projector(features))
        return BaseModelOutputWithDeepstackFeatures(features, merged, deepstack_features=[])

    def get_video_features(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise UserError: the image tokenizer does not support videos."""
        raise UserError("This model reads images, not videos: its tower is an image tokenizer.")

    def token_positions(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Return positions [3, B, L] of full sequences; with `image_position_mode="2d"` generated images have row and
        column positions, too."""
        config: Any = self.config  # type: ignore[attr-defined]
        (rows, columns), s = config.vision_config.patch_grid, config.spatial_merge_size
        images: list[Cells] = [(input_ids == config.image_token_id, rows // s, columns // s)]
        if config.image_position_mode == "2d":
            start = config.image_vocab_start
            drawn = (input_ids >= start) & (input_ids < start + config.codebook_size)
            images.append((drawn, *config.image_grid))
        return mrope_positions(mask, images)

    def compute_3d_position_ids(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Tensor | None:
        """Compute positions [3, B, L] for a forward without `position_ids`.

        Tokens after a cached prefix are numbered as text, offset by the longer sides of the images before them. The
        offset (`rope_deltas`) is stored on the cache, not on the model, which threads share.
        """
        cached = 0 if past_key_values is None else past_key_values.get_seq_length()
        batch, length, _ = inputs_embeds.shape
        if cached:
            mask = inputs_embeds.new_ones(batch, cached + length) if attention_mask is None else attention_mask
            text = (mask.long().cumsum(-1) - 1).clamp_min(0)[:, -length:]
            deltas = getattr(past_key_values, "rope_deltas", text.new_zeros(1, 1))
            return (text + deltas.repeat_interleave(batch // len(deltas), 0)).expand(3, -1, -1)
        if input_ids is None:
            return None
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        positions = self.token_positions(input_ids, mask)
        if past_key_values is not None:
            past_key_values.rope_deltas = positions.amax((0, 2))[:, None] + 1 - mask.sum(1, keepdim=True)
        return positions


class QwenVLMixin(UnifiedModelMixin):
    """Mixin placed before a Qwen-VL's `...ForConditionalGeneration`; a subclass sets its inner model class."""

    _inner_class: type[PreTrainedModel]
    _output_class = CausalLMOutputWithPast
    positions_are_1d = False

    def __init__(self, config: Any) -> None:
        PreTrainedModel.__init__(self, config)
        self.model = self._inner_class(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def token_positions(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Return positions [3, B, L], see the inner model."""
        return self.model.token_positions(input_ids, mask)

    def _prepare_position_ids_for_generation(self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]) -> Tensor:
        """Return positions [4, B, L]: text positions, which Qwen-VL builds its mask from, and the M-RoPE rows."""
        text = GenerationMixin._prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs)
        input_ids = model_kwargs.get("input_ids", inputs_tensor)
        if input_ids.is_floating_point():
            return text.expand(4, -1, -1)
        mask = model_kwargs.get("attention_mask")
        mask = torch.ones_like(input_ids) if mask is None else mask
        return torch.cat([text.expand(1, len(input_ids), -1), self.token_positions(input_ids, mask)])


def merged_side(config: Any) -> int:
    """Return the side, in patches, of the block that the merger makes one token: a field of the unified config, and of
    the tower's config in a stock one."""
    return int(getattr(config, "spatial_merge_size", None) or config.vision_config.spatial_merge_size)


_TINY_TOKENS = {
    "<|vision_start|>": "vision_start_token_id",
    "<|vision_end|>": "vision_end_token_id",
    "<|image_pad|>": "image_token_id",
    "<|video_pad|>": "video_token_id",
}
_TINY_TOWER = {
    "depth": 2,
    "hidden_size": 32,
    "num_heads": 2,
    "intermediate_size": 64,
    "patch_size": 4,
    "out_hidden_size": 32,
}
_TINY_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}


def qwen_vl_family(
    stock: type[PreTrainedConfig],
    model: type[QwenVLMixin],
    plain_text: type[PreTrainedConfig],
    tiny_tower: Mapping[str, Any],
    tiny_text: Mapping[str, Any],
) -> HostFamily:
    """Return the row of a Qwen-VL; the two `tiny` are the fields of its tower and text config that others lack."""
    return HostFamily(
        stock,
        model,
        TinyHost(_TINY_TOKENS, tower={**_TINY_TOWER, **tiny_tower}, text={**tiny_text, "rope_parameters": _TINY_ROPE}),
        image_token_field="image_token_id",
        config_fields=lambda config: {"spatial_merge_size": merged_side(config)},
        merged_side=merged_side,
        tower="model.visual.",
        kept_of_tower={"model.visual.merger.": "model.multi_modal_projector.merger."},
        plain_text=plain_text,
    )
