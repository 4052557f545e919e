"""Qwen3-VL as host: M-RoPE positions, and `spatial_merge_size`^2 patches to one input token."""

from typing import Any

from torch import nn
from transformers import Qwen3Config, Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLModel
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionPatchMerger

from unimm.mllm.hosts.qwen_vl import QwenVLMixin, TokenizerInside, qwen_vl_family
from unimm.mllm.hosts.registry import register_host, sub_configs
from unimm.mllm.vocabulary import ImageVocabularyFields


class UnimmQwen3VLConfig(ImageVocabularyFields, Qwen3VLConfig):
    """Qwen3-VL with an image tokenizer as its tower."""

    model_type = "unimm_qwen3_vl"
    sub_configs_defaults = sub_configs("qwen3_vl_text")

    image_seq_length: int = 64
    spatial_merge_size: int = 2


class UnimmQwen3VLModel(TokenizerInside, Qwen3VLModel):
    """The inner model of a Qwen3-VL with an image tokenizer."""

    config_class = UnimmQwen3VLConfig

    @staticmethod
    def _merger(width: int, text_width: int, config: Any) -> nn.Module:
        sizes: dict[str, int] = {"hidden_size": width, "out_hidden_size": text_width}
        return Qwen3VLVisionPatchMerger(Qwen3VLVisionConfig(spatial_merge_size=config.spatial_merge_size, **sizes))


class UnimmQwen3VLForConditionalGeneration(QwenVLMixin, Qwen3VLForConditionalGeneration):
    """Qwen3-VL with image generation."""

    config_class = UnimmQwen3VLConfig
    _inner_class = UnimmQwen3VLModel


register_host(
    qwen_vl_family(
        Qwen3VLConfig,
        UnimmQwen3VLForConditionalGeneration,
        Qwen3Config,
        tiny_tower={"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        tiny_text={"head_dim": 16},
    )
)
