"""Generation defaults of a unified model: those of its host (the language or multimodal model that the image tokenizer
is attached to), and those of image generation."""

import copy
from collections.abc import Sequence
from dataclasses import asdict

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from unimm.sampling import ImageSampling


def generation_defaults(
    host: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int], *, keep: bool
) -> GenerationConfig:
    """Return a copy of the host's generation config, completed with pad, BOS and EOS tokens and image defaults.

    Args:
        ends: token ids that end an answer.
        keep: keep the host's own EOS tokens if it has any, for a host that keeps its own chat template.
    """
    config: GenerationConfig = copy.deepcopy(host.generation_config)
    config._from_model_config = None  # if True, transformers drops fields it does not know
    known = config.eos_token_id
    known = [] if known is None else known if isinstance(known, list) else [known]
    if not (keep and known):
        config.eos_token_id = list(dict.fromkeys([*ends, *known])) or None
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    if config.bos_token_id is None:
        config.bos_token_id = tokenizer.bos_token_id
    config.image_generation = asdict(ImageSampling())
    return config
