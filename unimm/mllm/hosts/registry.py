"""Host families (the language or multimodal models that an image tokenizer can be attached to): one config and one
model subclass each, so that a unified model is saved and loaded like any transformers model.

The vision tower is the image tokenizer, set by configuration (`vision_config` goes through `AutoConfig`), never by
assignment: a tower that is assigned to a stock host is silently replaced by a random one on reload. To add a family,
add a config and model pair here and one config function in `attach.py`.
"""

from typing import Any

from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedConfig,
)
from transformers.configuration_utils import SubConfigSpec
from transformers.models.internvl.modeling_internvl import InternVLCausalLMOutputWithPast
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast
from transformers.models.llava_next.modeling_llava_next import LlavaNextCausalLMOutputWithPast
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionCausalLMOutputWithPast

from unimm.mllm.hosts.heads import embedding_name, finished_logits
from unimm.mllm.hosts.qwen_vl import (
    UnimmQwen2_5_VLConfig,
    UnimmQwen2_5_VLForConditionalGeneration,
    UnimmQwen3VLConfig,
    UnimmQwen3VLForConditionalGeneration,
)
from unimm.mllm.processing import UnimmProcessor
from unimm.mllm.unified import UnifiedModelMixin, Vocabulary
from unimm.mllm.vocabulary import ImageVocabularyFields


class UnimmLlavaConfig(ImageVocabularyFields, LlavaConfig):
    """LLaVA with an image tokenizer as its tower, over any text-only language model.

    Args:
        head_bias: whether the head has a bias (Phi).
        finishes_logits: whether logits are scaled or capped behind the head as the text config says, as a text-only
            host does (`heads.finished_logits`); a stock LLaVA never does.
    """

    model_type = "unimm_llava"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="vqrae"),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="qwen3"),
    }

    head_bias: bool = False
    finishes_logits: bool = False


class UnimmLlavaForConditionalGeneration(UnifiedModelMixin, LlavaForConditionalGeneration):
    """LLaVA with image generation: `generate(generation_mode="image")`."""

    config_class = UnimmLlavaConfig
    _output_class = LlavaCausalLMOutputWithPast

    def post_init(self) -> None:
        """Give the head the bias of a text-only host, and the name of the embedding that it is tied to."""
        if self.config.head_bias:
            self.lm_head = nn.Linear(self.lm_head.in_features, self.lm_head.out_features, bias=True)
        self._tied_weights_keys = {
            "lm_head.weight": f"model.language_model.{embedding_name(self.model.language_model)}.weight"
        }
        super().post_init()

    def _logits(self, hidden: Tensor, vocabulary: Vocabulary) -> Tensor:
        logits = super()._logits(hidden, vocabulary)
        return finished_logits(logits, self.config.get_text_config()) if self.config.finishes_logits else logits


class UnimmInternVLConfig(ImageVocabularyFields, InternVLConfig):
    """InternVL with an image tokenizer as its tower."""

    model_type = "unimm_internvl"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="vqrae"),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="qwen2"),
    }


class UnimmInternVLForConditionalGeneration(UnifiedModelMixin, InternVLForConditionalGeneration):
    """InternVL with image generation; an input image takes a quarter of a generated one's tokens (pixel shuffle)."""

    config_class = UnimmInternVLConfig
    _output_class = InternVLCausalLMOutputWithPast


class OneViewMixin:
    """Mixin for hosts that tile images (AnyRes). With `image_sizes` (from their own processor) they do; without, an
    image is a single view of the tokenizer's size, as `UnimmProcessor` returns it and as images are generated."""

    tiles = True

    def get_image_features(self, pixel_values: Tensor, image_sizes: Tensor | None = None, **kwargs: Any) -> Any:
        """Return the projected patches as `pooler_output`, one [n, D] per image."""
        if image_sizes is not None:
            return super().get_image_features(pixel_values, image_sizes=image_sizes, **kwargs)  # type: ignore[misc]
        inside: Any = self.model  # type: ignore[attr-defined]
        outputs = inside.vision_tower(pixel_values)
        outputs.pooler_output = list(inside.multi_modal_projector(outputs.last_hidden_state))
        return outputs


class UnimmLlavaNextConfig(ImageVocabularyFields, LlavaNextConfig):
    """LLaVA-NeXT with an image tokenizer as its tower."""

    model_type = "unimm_llava_next"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="vqrae"),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
    }


class UnimmLlavaNextForConditionalGeneration(OneViewMixin, UnifiedModelMixin, LlavaNextForConditionalGeneration):
    """LLaVA-NeXT with image generation."""

    config_class = UnimmLlavaNextConfig
    _output_class = LlavaNextCausalLMOutputWithPast


class UnimmLlavaOnevisionConfig(ImageVocabularyFields, LlavaOnevisionConfig):
    """LLaVA-OneVision with an image tokenizer as its tower; `image_seq_length` counts the tokens of one view."""

    model_type = "unimm_llava_onevision"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="vqrae"),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="qwen2"),
    }

    image_seq_length: int = 729


class UnimmLlavaOnevisionForConditionalGeneration(
    OneViewMixin, UnifiedModelMixin, LlavaOnevisionForConditionalGeneration
):
    """LLaVA-OneVision with image generation."""

    config_class = UnimmLlavaOnevisionConfig
    _output_class = LlavaOnevisionCausalLMOutputWithPast


HOSTS: dict[type[PreTrainedConfig], type[Any]] = {
    UnimmLlavaConfig: UnimmLlavaForConditionalGeneration,
    UnimmInternVLConfig: UnimmInternVLForConditionalGeneration,
    UnimmLlavaNextConfig: UnimmLlavaNextForConditionalGeneration,
    UnimmLlavaOnevisionConfig: UnimmLlavaOnevisionForConditionalGeneration,
    UnimmQwen2_5_VLConfig: UnimmQwen2_5_VLForConditionalGeneration,
    UnimmQwen3VLConfig: UnimmQwen3VLForConditionalGeneration,
}
MULTIMODAL_HOSTS: dict[str, type[PreTrainedConfig]] = {
    "llava": UnimmLlavaConfig,
    "internvl": UnimmInternVLConfig,
    "llava_next": UnimmLlavaNextConfig,
    "llava_onevision": UnimmLlavaOnevisionConfig,
    "qwen2_5_vl": UnimmQwen2_5_VLConfig,
    "qwen3_vl": UnimmQwen3VLConfig,
}
"""model_type of a stock multimodal host -> config class of the unified model. Text-only hosts become a LLaVA."""

M_ROPE = ("qwen2_5_vl", "qwen3_vl")
"""Multimodal hosts whose positions have rows and columns (M-RoPE)."""


def merged_side(config: PreTrainedConfig) -> int:
    """Return the side length, in patches, of the block that a stock or unified host merges into one input token."""
    for part in (config, getattr(config, "vision_config", None)):
        if merge := getattr(part, "spatial_merge_size", None):
            return int(merge)
    return round(1 / getattr(config, "downsample_ratio", 1.0))


for config_class, model_class in HOSTS.items():
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModelForImageTextToText.register(config_class, model_class, exist_ok=True)
    AutoModelForMultimodalLM.register(config_class, model_class, exist_ok=True)
    AutoProcessor.register(config_class, UnimmProcessor, exist_ok=True)
