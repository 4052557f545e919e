"""A tiny GPT over the ids of the tiny tokenizer (4 x 4 ids of 64), and its parts."""

from typing import Any

import numpy as np
import torch

from tests.tokenizer.conftest import tiny_vqrae
from unimm.class_conditional import ClassConditionalConfig, ClassConditionalGPT
from unimm.class_conditional.drawing import ClassDrawer
from unimm.class_conditional.ids import ClassIds
from unimm.data.sources.ids import IdsInfo
from unimm.tokenizer import ImageTokenizerProcessor

FIELDS = {
    "codebook_size": 64,
    "grid": (4, 4),
    "num_classes": 5,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def tiny_gpt(*, seed: int = 0, **fields: Any) -> ClassConditionalGPT:
    """With a random head: the zero one that training starts from would draw nothing but noise."""
    torch.manual_seed(seed)
    model = ClassConditionalGPT(ClassConditionalConfig(**FIELDS | fields)).eval()
    torch.nn.init.normal_(model.head.weight)
    torch.nn.init.normal_(model.class_embedding.weight)
    torch.nn.init.normal_(model.id_embedding.weight)
    return model


def tiny_drawer() -> ClassDrawer:
    tokenizer = tiny_vqrae()
    processor = ImageTokenizerProcessor.for_tokenizer(tokenizer.config)
    return ClassDrawer(tiny_gpt(tokenizer_fingerprint=tokenizer.fingerprint), tokenizer, processor)


def random_ids(rows: int = 20, *, fingerprint: str = "a" * 64) -> ClassIds:
    rng = np.random.default_rng(0)
    info = IdsInfo(fingerprint, 64, (4, 4), "nothing")
    return ClassIds(rng.integers(64, size=(rows, 16)).astype(np.uint16), rng.integers(5, size=rows), info)
