"""The generation defaults of a unified model: its host's own, and those of drawing."""

import copy
from collections.abc import Sequence
from dataclasses import asdict

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from unimm.sampling import ImageSampling


def generation_defaults(
    host: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int], *, keep: bool
) -> GenerationConfig:
    """Return the host's generation config with what it lacks: tokens that pad, begin and end (`ends`).

    Args:
        keep: what ends an answer is the host's own affair, as its chat template is.
    """
    config: GenerationConfig = copy.deepcopy(host.generation_config)
    config._from_model_config = None  # one derived from a model config drops what it does not know
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
