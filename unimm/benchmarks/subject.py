"""What a benchmark measures: a unified model, or an image tokenizer alone."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoModel

from unimm.errors import UserError, reading
from unimm.mllm import load
from unimm.tokenizer import ImageTokenizer, ImageTokenizerProcessor


@dataclass(frozen=True)
class Subject:
    """An image tokenizer with its processor; `model` and `processor` are None where it stands alone."""

    tokenizer: ImageTokenizer
    image_processor: Any
    model: Any = None
    processor: Any = None


def load_subject(path: str | Path | None = None) -> Subject:
    """Load a unified model (None: the default of the library) or the folder of an image tokenizer, ready to use.

    Raises:
        UserError: nothing there, something else, or a broken checkpoint.
    """
    if path is not None and _is_image_tokenizer(Path(path)):
        return _load_tokenizer(Path(path))
    model, processor = load(path)
    return Subject(model.image_tokenizer, processor.image_processor, model, processor)


def _is_image_tokenizer(folder: Path) -> bool:
    """Whether the folder's configuration is that of a tokenizer: it nests an encoder but no language model."""
    try:
        described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False  # for `load` to explain
    return isinstance(described, dict) and "encoder_config" in described and "text_config" not in described


def _load_tokenizer(folder: Path) -> Subject:
    with reading("The image tokenizer", folder):
        tokenizer, report = AutoModel.from_pretrained(folder, output_loading_info=True)
        image_processor = ImageTokenizerProcessor.from_pretrained(folder)
    if not isinstance(tokenizer, ImageTokenizer):
        raise UserError(f"{folder} holds a {type(tokenizer).__name__}, not an image tokenizer or a unified model.")
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"The image tokenizer {folder} lacks {len(missing)} weights ({missing[0]}, ...): save it anew.")
    return Subject(tokenizer.eval(), image_processor)
