"""Text generation of a unified model: transformers' `generate`, restricted to the vocabulary of the host (the language
or multimodal model that the image tokenizer is attached to).

Scores in text mode are as wide as the host's, so that sampling, beam search, watermarks and assisted generation work as
with the host. The overrides here are for the methods in which transformers takes the width from the config.
"""

from functools import partial
from typing import Any, NoReturn

from torch import Tensor
from torch.nn import functional as F
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList
from transformers.generation import (
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
    WatermarkLogitsProcessor,
)

from unimm.errors import UserError

_WATERMARKS = (WatermarkLogitsProcessor, SynthIDTextWatermarkLogitsProcessor)


class TextGenerationMixin(GenerationMixin):
    """Mixin that makes transformers' text generation use `config.text_vocab_size` instead of the larger vocab_size."""

    def _get_logits_processor(self, generation_config: GenerationConfig, **kwargs: Any) -> LogitsProcessorList:
        parent: Any = super()
        model: Any = self
        processors = parent._get_logits_processor(generation_config=generation_config, **kwargs)
        marking = generation_config.watermarking_config
        for n, processor in enumerate(processors):
            if isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor):
                processor.model = partial(model, vocabulary="answer")  # unconditional logits, as wide as the scores
            if marking is not None and isinstance(processor, _WATERMARKS):
                processors[n] = marking.construct_processor(self.config.text_vocab_size, kwargs.get("device"))
        return processors

    def _validate_generation_mode(
        self, generation_mode: Any, generation_config: GenerationConfig, generation_mode_kwargs: dict[str, Any]
    ) -> None:
        assistant = generation_mode_kwargs.get("assistant_model")
        if assistant is not None and "assistant_tokenizer" not in generation_mode_kwargs:
            rows, own = _text_rows(assistant), self.config.text_vocab_size
            if rows != own:
                raise UserError(
                    f"The assistant model has {rows} text tokens and this model {own}: give tokenizer and "
                    "assistant_tokenizer, or an assistant with the same tokenizer."
                )
            # transformers compares with config.vocab_size, which includes the image ids
            generation_mode_kwargs = {k: v for k, v in generation_mode_kwargs.items() if k != "assistant_model"}
        super()._validate_generation_mode(generation_mode, generation_config, generation_mode_kwargs)

    def _get_candidate_generator(self, *, model_kwargs: dict[str, Any], **kwargs: Any) -> Any:
        # these arguments also go to the assistant, which need not be a unified model
        shared = {name: value for name, value in model_kwargs.items() if name != "vocabulary"}
        generator = super()._get_candidate_generator(model_kwargs=shared, **kwargs)
        if (translator := getattr(generator, "atm_translator", None)) is not None:
            translator.target_vocab_size = self.config.text_vocab_size
        return generator

    def compute_transition_scores(
        self, sequences: Tensor, scores: tuple[Tensor, ...], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Compute transition scores as in transformers, for scores of text mode."""
        # transformers reshapes by config.vocab_size: pad the scores to that width
        width = self.config.get_text_config().vocab_size
        wide = tuple(F.pad(each, (0, width - each.shape[-1]), value=float("-inf")) for each in scores)
        return super().compute_transition_scores(sequences, wide, *args, **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise UserError: continuous batching requests logits without naming the vocabulary."""
        raise UserError(
            "Continuous batching would choose among rows of the vocabulary that stand for no text: use generate, which "
            "takes padded batches."
        )

    generate_batch = init_continuous_batching


def _text_rows(model: Any) -> int:
    """Return the number of vocabulary rows that text generation of `model` chooses from."""
    return int(getattr(model.config, "text_vocab_size", 0) or model.config.get_text_config().vocab_size)
