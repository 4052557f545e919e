"""Text mode of a unified model: the host's own `generate`, over the host's own rows of the vocabulary.

Scores in text mode have as many columns as the host's own, so that sampling, beams, watermarks and drafts of an
assistant are what they are with the host; the places where transformers takes the width from the config are here.
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
    """Makes transformers' text generation see `config.text_vocab_size` rows where the config has more."""

    def _get_logits_processor(self, generation_config: GenerationConfig, **kwargs: Any) -> LogitsProcessorList:
        parent: Any = super()
        model: Any = self
        processors = parent._get_logits_processor(generation_config=generation_config, **kwargs)
        marking = generation_config.watermarking_config
        for n, processor in enumerate(processors):
            if isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor):
                processor.model = partial(model, vocabulary="answer")  # the unconditional side, as wide as the scores
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
            # the library compares with the config's width, which counts the image ids
            generation_mode_kwargs = {k: v for k, v in generation_mode_kwargs.items() if k != "assistant_model"}
        super()._validate_generation_mode(generation_mode, generation_config, generation_mode_kwargs)

    def _get_candidate_generator(self, *, model_kwargs: dict[str, Any], **kwargs: Any) -> Any:
        # what an assistant is called with too, and it need not be a unified model
        shared = {name: value for name, value in model_kwargs.items() if name != "vocabulary"}
        generator = super()._get_candidate_generator(model_kwargs=shared, **kwargs)
        if (translator := getattr(generator, "atm_translator", None)) is not None:
            translator.target_vocab_size = self.config.text_vocab_size
        return generator

    def compute_transition_scores(
        self, sequences: Tensor, scores: tuple[Tensor, ...], *args: Any, **kwargs: Any
    ) -> Tensor:
        """As in transformers, for scores of text mode."""
        width = self.config.get_text_config().vocab_size
        wide = tuple(F.pad(each, (0, width - each.shape[-1]), value=float("-inf")) for each in scores)
        return super().compute_transition_scores(sequences, wide, *args, **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise UserError: continuous batching asks for logits without saying of what."""
        raise UserError(
            "Continuous batching would choose among rows of the vocabulary that stand for no text: use generate, which "
            "takes padded batches."
        )

    generate_batch = init_continuous_batching


def _text_rows(model: Any) -> int:
    """Rows that text generation of `model` chooses from."""
    return int(getattr(model.config, "text_vocab_size", 0) or model.config.get_text_config().vocab_size)
