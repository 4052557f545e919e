"""LLaVA-NeXT as host; it tiles the images of its own processor."""

from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration
from transformers.models.llava_next.modeling_llava_next import LlavaNextCausalLMOutputWithPast

from unimm.mllm.hosts.one_view import OneViewMixin
from unimm.mllm.hosts.registry import ALL_PATCHES, HostFamily, StockExport, TinyHost, register_host, sub_configs
from unimm.mllm.unified import UnifiedModelMixin
from unimm.mllm.vocabulary import ImageVocabularyFields


class UnimmLlavaNextConfig(ImageVocabularyFields, LlavaNextConfig):
    """LLaVA-NeXT with an image tokenizer as its tower."""

    model_type = "unimm_llava_next"
    sub_configs_defaults = sub_configs("llama")


class UnimmLlavaNextForConditionalGeneration(OneViewMixin, UnifiedModelMixin, LlavaNextForConditionalGeneration):
    """LLaVA-NeXT with image generation."""

    config_class = UnimmLlavaNextConfig
    _output_class = LlavaNextCausalLMOutputWithPast


register_host(
    HostFamily(
        LlavaNextConfig,
        UnimmLlavaNextForConditionalGeneration,
        TinyHost(
            {"<image>": "image_token_index"},
            encoder="clip_vision_model",
            fields={
                "vision_feature_layer": -2,
                "vision_feature_select_strategy": "default",
                "image_grid_pinpoints": [[16, 32], [32, 16]],
            },
        ),
        config_fields=lambda config: ALL_PATCHES,
        export=StockExport(
            ("image_seq_length", "projector_hidden_act", "multimodal_projector_bias", "image_grid_pinpoints")
        ),
    )
)
