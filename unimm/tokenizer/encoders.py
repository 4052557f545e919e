"""The supported families of pretrained vision encoders and their differences.

A family is one row of `FAMILIES`. It defines the transformer blocks that the symmetric decoder mirrors, the final norm,
whether a CLS token precedes the patches, whether images of another size need a flag, and the normalization that the
family was trained with, used if a checkpoint does not define one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.clip.modeling_clip import CLIPEncoder
from transformers.models.dinov2.modeling_dinov2 import Dinov2Encoder
from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import Dinov2WithRegistersEncoder
from transformers.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTEncoder
from transformers.models.internvl.modeling_internvl import InternVLVisionEncoder
from transformers.models.siglip.modeling_siglip import SiglipEncoder

from unimm.errors import UserError

Channels = tuple[float, float, float]
HALF: tuple[Channels, Channels] = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET: tuple[Channels, Channels] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP: tuple[Channels, Channels] = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


class DINOv3Blocks(DINOv3ViTEncoder):
    """DINOv3's blocks without rotary embeddings: the decoder has learned positions and no image to derive them from."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> BaseModelOutput:
        # cos = 1 and sin = 0 make the rotation the identity.
        width = self.config.hidden_size // self.config.num_attention_heads
        cos = torch.ones(hidden_states.shape[1], width, dtype=hidden_states.dtype, device=hidden_states.device)
        return super().forward(hidden_states, position_embeddings=(cos, torch.zeros_like(cos)), **kwargs)


@dataclass(frozen=True)
class EncoderFamily:
    """The properties in which encoder families differ.

    Args:
        blocks: (config) -> the family's stack of transformer blocks, [B, N, D] -> an output with `last_hidden_state`.
        final_norm: name of the submodule after the last block.
        cls_token: whether a CLS token precedes the patches; registers, whose number the config has, follow it.
        asks_to_interpolate: whether images of another size need `interpolate_pos_encoding=True`.
        normalization: (mean, std) per channel, if the checkpoint has no preprocessor_config.json.
        tiny: fields of the config of a tiny encoder for tests (`unimm.testing`), besides sizes and layers.
    """

    blocks: Callable[[PreTrainedConfig], nn.Module]
    final_norm: str
    cls_token: bool
    asks_to_interpolate: bool = False
    normalization: tuple[Channels, Channels] = IMAGENET
    tiny: Mapping[str, Any] = field(default_factory=dict)


_MLP = {"intermediate_size": 64}
_REGISTERS = {"num_register_tokens": 4}

FAMILIES: dict[str, EncoderFamily] = {
    "siglip_vision_model": EncoderFamily(
        SiglipEncoder, "post_layernorm", False, True, HALF, tiny={**_MLP, "vision_use_head": False}
    ),
    "internvl_vision": EncoderFamily(InternVLVisionEncoder, "layernorm", True, tiny={**_MLP, "attention_bias": True}),
    "clip_vision_model": EncoderFamily(CLIPEncoder, "post_layernorm", True, True, CLIP, tiny=_MLP),
    "dinov2": EncoderFamily(Dinov2Encoder, "layernorm", True, tiny={"mlp_ratio": 2}),
    "dinov2_with_registers": EncoderFamily(
        Dinov2WithRegistersEncoder, "layernorm", True, tiny={"mlp_ratio": 2, **_REGISTERS}
    ),
    "dinov3_vit": EncoderFamily(DINOv3Blocks, "norm", True, tiny={**_MLP, **_REGISTERS}),
}


def encoder_family(config: PreTrainedConfig) -> EncoderFamily:
    """Return the encoder's family. Raises UserError, listing the supported families, for an unknown one."""
    if config.model_type not in FAMILIES:
        raise UserError(
            f"No encoder family {config.model_type!r}; the supported ones are {', '.join(sorted(FAMILIES))}."
        )
    return FAMILIES[config.model_type]


def prefix_tokens(config: PreTrainedConfig) -> int:
    """Return the number of tokens before the first patch: CLS and registers."""
    return int(encoder_family(config).cls_token) + getattr(config, "num_register_tokens", 0)


def build_encoder(config: PreTrainedConfig, attn_implementation: str | None = None) -> PreTrainedModel:
    """Build the encoder with random weights, without its attention-pooling head, which the features do not use."""
    encoder_family(config)
    if hasattr(config, "vision_use_head"):
        config.vision_use_head = False
    return AutoModel.from_config(config, attn_implementation=attn_implementation)


def encode_features(encoder: PreTrainedModel, pixel_values: Tensor) -> tuple[Tensor, ...]:
    """Return the hidden states from the embeddings to the last block, each [B, N, D] without prefix tokens."""
    size = {"interpolate_pos_encoding": True} if encoder_family(encoder.config).asks_to_interpolate else {}
    hidden_states = encoder(pixel_values, output_hidden_states=True, **size).hidden_states
    return tuple(state[:, prefix_tokens(encoder.config) :] for state in hidden_states)


def final_norm(encoder: PreTrainedModel) -> nn.Module:
    """Return the norm after the encoder's last block."""
    return encoder.get_submodule(encoder_family(encoder.config).final_norm)


def feature_states(
    encoder: PreTrainedModel, states: tuple[Tensor, ...], feature_layer: int, *, post_norm: bool, layers: int = 1
) -> tuple[Tensor, ...]:
    """Return the hidden states up to `feature_layer`, the last one as the features: after the final norm with
    `post_norm`, then with `layers` > 1 the sum of the last so many."""
    states = states[: range(len(states))[feature_layer] + 1]  # range resolves a negative index
    last = final_norm(encoder)(states[-1]) if post_norm else states[-1]
    for state in states[-layers:-1]:
        last = last + state
    return (*states[:-1], last.contiguous())
