"""Qwen2.5-VL as host: M-RoPE positions, and `spatial_merge_size`^2 patches to one input token."""

from typing import Any

from torch import nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLModel, Qwen2Config
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLPatchMerger

from unimm.mllm.hosts.qwen_vl import QwenVLMixin, TokenizerInside, qwen_vl_family
from unimm.mllm.hosts.registry import register_host, sub_configs
from unimm.mllm.vocabulary import ImageVocabularyFields


class UnimmQwen2_5_VLConfig(ImageVocabularyFields, Qwen2_5_VLConfig):
    """Qwen2.5-VL with an image tokenizer as its tower."""

    model_type = "unimm_qwen2_5_vl"
    sub_configs_defaults = sub_configs("qwen2_5_vl_text")

    image_seq_length: int = 64
    spatial_merge_size: int = 2


class UnimmQwen2_5_VLModel(TokenizerInside, Qwen2_5_VLModel):
    """The inner model of a Qwen2.5-VL with an image tokenizer."""

    config_class = UnimmQwen2_5_VLConfig

    @staticmethod
    def _merger(width: int, text_width: int, config: Any) -> nn.Module:
        return Qwen2_5_VLPatchMerger(dim=text_width, context_dim=width, spatial_merge_size=config.spatial_merge_size)


class UnimmQwen2_5_VLForConditionalGeneration(QwenVLMixin, Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL with image generation."""

    config_class = UnimmQwen2_5_VLConfig
    _inner_class = UnimmQwen2_5_VLModel


register_host(
    qwen_vl_family(
        Qwen2_5_VLConfig,
        UnimmQwen2_5_VLForConditionalGeneration,
        Qwen2Config,
        tiny_tower={"fullatt_block_indexes": [1], "window_size": 16},
        tiny_text={},
    )
)
