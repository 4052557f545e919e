"""The model under test: a unified model, or an image tokenizer alone."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unimm.mllm import load
from unimm.tokenizer import ImageTokenizer
from unimm.tokenizer.loading import load_with_processor


@dataclass(frozen=True)
class EvaluatedModel:
    """An image tokenizer with its image processor; `model` and `processor` are None for a tokenizer alone."""

    tokenizer: ImageTokenizer
    image_processor: Any
    model: Any = None
    processor: Any = None

    @property
    def runs_on(self) -> dict[str, str]:
        """Return the device type and the dtype, for a manifest."""
        running = self.tokenizer if self.model is None else self.model
        return {"device": running.device.type, "dtype": str(running.dtype)}


def load_evaluated_model(path: str | Path | None = None, device: str | None = None) -> EvaluatedModel:
    """Load a unified model (None: the library's default model) or the folder of an image tokenizer.

    Raises:
        UserError: `path` holds nothing, another kind of checkpoint, or a broken one.
    """
    if path is not None and _is_image_tokenizer(Path(path)):
        return EvaluatedModel(*load_with_processor(path))
    model, processor = load(path, device)
    return EvaluatedModel(model.image_tokenizer, processor.image_processor, model, processor)


def _is_image_tokenizer(folder: Path) -> bool:
    """Return whether the folder's config.json is that of a tokenizer: it nests an encoder but no language model."""
    try:
        described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False  # let `load` raise the error that explains it
    return isinstance(described, dict) and "encoder_config" in described and "text_config" not in described
