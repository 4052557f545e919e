"""LLaVA as host, also of every text-only language model: one projected token for each patch."""

from typing import Any

from torch import Tensor, nn
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, SiglipImageProcessorPil
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast

from unimm.mllm.hosts.heads import embedding_name, finished_logits
from unimm.mllm.hosts.registry import ALL_PATCHES, HostFamily, StockExport, TinyHost, register_host, sub_configs
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
    sub_configs_defaults = sub_configs("qwen3")

    head_bias: bool = False
    finishes_logits: bool = False


class UnimmLlavaForConditionalGeneration(UnifiedModelMixin, LlavaForConditionalGeneration):
    """LLaVA with image generation: `generate(generation_mode="image")`."""

    config_class = UnimmLlavaConfig
    _output_class = LlavaCausalLMOutputWithPast

    lm_head: nn.Linear

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


def stock_processor(model: Any, processor: UnimmProcessor, strategy: str, prefix: int) -> LlavaProcessor:
    """Build the stock LLaVA's processor: images of the tokenizer's size and normalization."""
    config = model.image_tokenizer.config
    images = SiglipImageProcessorPil(
        size={"height": config.image_size, "width": config.image_size},
        image_mean=list(config.image_mean),
        image_std=list(config.image_std),
        resample=3,
        do_convert_rgb=True,
    )
    return LlavaProcessor(
        images,
        processor.tokenizer,
        patch_size=config.patch_size,
        vision_feature_select_strategy=strategy,
        chat_template=processor.chat_template,
        image_token=processor.image_token,
        num_additional_image_tokens=prefix,
    )


register_host(
    HostFamily(
        LlavaConfig,
        UnimmLlavaForConditionalGeneration,
        TinyHost(
            {"<image>": "image_token_index"},
            encoder="clip_vision_model",
            fields={"vision_feature_layer": -2, "vision_feature_select_strategy": "default"},
        ),
        config_fields=lambda config: ALL_PATCHES,
        export=StockExport(
            ("image_seq_length", "projector_hidden_act", "multimodal_projector_bias"), processor=stock_processor
        ),
    )
)
