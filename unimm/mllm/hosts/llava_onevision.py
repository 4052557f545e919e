"""LLaVA-OneVision as host; it tiles the images of its own processor."""

from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionCausalLMOutputWithPast

from unimm.mllm.hosts.one_view import OneViewMixin
from unimm.mllm.hosts.registry import ALL_PATCHES, HostFamily, StockExport, TinyHost, register_host, sub_configs
from unimm.mllm.unified import UnifiedModelMixin
from unimm.mllm.vocabulary import ImageVocabularyFields


class UnimmLlavaOnevisionConfig(ImageVocabularyFields, LlavaOnevisionConfig):
    """LLaVA-OneVision with an image tokenizer as its tower; `image_seq_length` counts the tokens of one view."""

    model_type = "unimm_llava_onevision"
    sub_configs_defaults = sub_configs("qwen2")

    image_seq_length: int = 729


class UnimmLlavaOnevisionForConditionalGeneration(
    OneViewMixin, UnifiedModelMixin, LlavaOnevisionForConditionalGeneration
):
    """LLaVA-OneVision with image generation."""

    config_class = UnimmLlavaOnevisionConfig
    _output_class = LlavaOnevisionCausalLMOutputWithPast


register_host(
    HostFamily(
        LlavaOnevisionConfig,
        UnimmLlavaOnevisionForConditionalGeneration,
        TinyHost(
            {"<image>": "image_token_index", "<video>": "video_token_index"},
            encoder="siglip_vision_model",
            fields={
                "vision_feature_layer": -1,
                "vision_feature_select_strategy": "full",
                "image_grid_pinpoints": [[16, 32], [32, 16]],
            },
        ),
        config_fields=lambda config: ALL_PATCHES,
        export=StockExport(
            (
                "projector_hidden_act",
                "multimodal_projector_bias",
                "image_grid_pinpoints",
                "vision_aspect_ratio",
                "video_token_index",
            )
        ),
    )
)
