"""A model, and its processor where it has one, as one folder that is whole or not there."""

import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel


def save_whole(folder: Path, model: PreTrainedModel, processor: Any = None) -> None:
    """Save model and processor into `folder`, which is made if needed, config.json last: a folder that has one is
    complete."""
    staging = folder / ".saving"
    shutil.rmtree(staging, ignore_errors=True)
    model.save_pretrained(staging)
    if processor is not None:
        processor.save_pretrained(staging)
    for path in sorted(staging.iterdir(), key=lambda path: path.name == "config.json"):
        path.replace(folder / path.name)
    staging.rmdir()
