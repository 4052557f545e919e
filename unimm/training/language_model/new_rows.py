"""Warm-up that trains only the new embedding rows, those of the image ids and markers, so that they do not disturb the
language model while they are still random."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


class NewRowsWarmup:
    """Train only the new rows in the first `steps` optimizer steps of `model`; all else, rows of text included, stays
    bit-identical.

    Call `hold` after every backward. The embedding tables need parameter groups of their own, marked "tables", because
    weight decay would move rows without a gradient.
    """

    def __init__(self, model: PreTrainedModel, steps: int) -> None:
        self.steps = steps
        named = dict(model.named_parameters())
        deltas = [p for name, p in named.items() if "trainable_tokens_delta" in name]  # an adapter's: new rows only
        layers = (model.get_input_embeddings(), model.get_output_embeddings())
        tables = deltas or [layer.weight for layer in layers if layer.weight.requires_grad]
        self.tables = list({id(p): p for p in tables}.values())  # tied ones are one
        rows = next(iter(model.trainable_token_indices().values()))
        self.is_new = None
        if not deltas:
            self.is_new = torch.zeros(len(layers[0].weight), 1, dtype=torch.bool)
            self.is_new[rows] = True

    def hold(self, parameters: Iterable[nn.Parameter], optimizer: Any, step: int, weight_decay: float) -> None:
        """Drop all gradients but those of the new rows while `step` is in the warm-up.

        Right after it the optimizer state of the tables is reset: by then the rows of text have second moments of 0
        without bias correction, which would make their first updates several times too large.
        """
        warming = step < self.steps
        for group in optimizer.param_groups:
            if group.get("tables"):
                group["weight_decay"] = 0.0 if warming else weight_decay
        if step == self.steps:
            for table in self.tables:
                optimizer.state.pop(table, None)
        if not warming:
            return
        chosen = {id(table) for table in self.tables}
        for parameter in parameters:
            if id(parameter) not in chosen:
                parameter.grad = None
            elif self.is_new is not None and parameter.grad is not None:
                parameter.grad.mul_(self.is_new.to(parameter.device))
