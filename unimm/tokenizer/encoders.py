"""The families of pretrained vision models that can be the encoder, and what differs between them.

Special here: a family is one row of `FAMILIES`. It says how many prefix tokens (CLS, registers) stand before the
patches, which block stack the symmetric decoder mirrors, and how the family wants to be told about pictures of another
size.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.models.internvl.modeling_internvl import InternVLVisionEncoder
from transformers.models.siglip.modeling_siglip import SiglipEncoder

from unimm.errors import UserError


@dataclass(frozen=True)
class EncoderFamily:
    """`blocks(config)` is the family's stack of transformer blocks, [B, N, D] -> an output with `last_hidden_state`."""

    prefix_tokens: int
    blocks: Callable[[PreTrainedConfig], nn.Module]
    final_norm: str
    asks_to_interpolate: bool = False


FAMILIES: dict[str, EncoderFamily] = {
    "siglip_vision_model": EncoderFamily(0, SiglipEncoder, "post_layernorm", asks_to_interpolate=True),
    "internvl_vision": EncoderFamily(1, InternVLVisionEncoder, "layernorm"),
}


def encoder_family(config: PreTrainedConfig) -> EncoderFamily:
    """The row of the encoder's family. Raises UserError with the supported ones for another."""
    if config.model_type not in FAMILIES:
        raise UserError(
            f"No encoder family {config.model_type!r}; the supported ones are {', '.join(sorted(FAMILIES))}."
        )
    return FAMILIES[config.model_type]


def build_encoder(config: PreTrainedConfig, attn_implementation: str | None = None) -> PreTrainedModel:
    """The encoder with random weights. Its attention-pooling head, which no feature needs, is left out."""
    encoder_family(config)
    if hasattr(config, "vision_use_head"):
        config.vision_use_head = False
    return AutoModel.from_config(config, attn_implementation=attn_implementation)


def encode_features(encoder: PreTrainedModel, pixel_values: Tensor) -> tuple[Tensor, ...]:
    """Every hidden state of the patches, from the embeddings to the last block: a tuple of [B, N, D] without prefix
    tokens."""
    family = encoder_family(encoder.config)
    size = {"interpolate_pos_encoding": True} if family.asks_to_interpolate else {}
    hidden_states = encoder(pixel_values, output_hidden_states=True, **size).hidden_states
    return tuple(state[:, family.prefix_tokens :] for state in hidden_states)


def final_norm(encoder: PreTrainedModel) -> nn.Module:
    """The norm that follows the encoder's last block."""
    return encoder.get_submodule(encoder_family(encoder.config).final_norm)
