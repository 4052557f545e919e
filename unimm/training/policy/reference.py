"""The starting model of a run: what the KL divergence is measured from, and who judges in self-rewards."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from unimm.training.language_model.adapters import Adapter


class Reference:
    """The model as it was when this was built: with LoRA the model itself without its adapter, else a frozen copy that
    shares the image tokenizer."""

    def __init__(self, model: Any, adapter: Adapter | None = None) -> None:
        self._adapter, self._model, self._live = adapter, model, model
        if adapter is None:
            tokenizer = model.image_tokenizer
            self._model = copy.deepcopy(model, {id(tokenizer): tokenizer}).requires_grad_(False).eval()

    @contextmanager
    def model(self) -> Iterator[Any]:
        """Return the starting model for the length of the context."""
        if self._adapter is None:
            yield self._model.to(self._live.device)  # it was copied before the trainer moved the live model
            return
        with self._adapter.peft.disable_adapter():
            yield self._model
