"""InternVL as host: an input image takes a quarter of a generated one's tokens (pixel shuffle)."""

from typing import Any

from transformers import InternVLConfig, InternVLForConditionalGeneration
from transformers.models.internvl.modeling_internvl import InternVLCausalLMOutputWithPast

from unimm.mllm.hosts.registry import ALL_PATCHES, HostFamily, StockExport, TinyHost, register_host, sub_configs
from unimm.mllm.unified import UnifiedModelMixin
from unimm.mllm.vocabulary import ImageVocabularyFields


class UnimmInternVLConfig(ImageVocabularyFields, InternVLConfig):
    """InternVL with an image tokenizer as its tower."""

    model_type = "unimm_internvl"
    sub_configs_defaults = sub_configs("qwen2")


class UnimmInternVLForConditionalGeneration(UnifiedModelMixin, InternVLForConditionalGeneration):
    """InternVL with image generation."""

    config_class = UnimmInternVLConfig
    _output_class = InternVLCausalLMOutputWithPast


def merged_side(config: Any) -> int:
    """Return the side, in patches, of the block that pixel shuffle makes one token."""
    return round(1 / config.downsample_ratio)


register_host(
    HostFamily(
        InternVLConfig,
        UnimmInternVLForConditionalGeneration,
        TinyHost(
            {"<IMG_CONTEXT>": "image_token_id", "<img>": None, "</img>": None},
            encoder="internvl_vision",
            fields={"vision_feature_layer": -1, "image_seq_length": 4},
        ),
        image_token_field="image_token_id",
        config_fields=lambda config: ALL_PATCHES,
        merged_side=merged_side,
        export=StockExport(("image_seq_length", "projector_hidden_act", "downsample_ratio"), encoder="internvl_vision"),
    )
)
