"""Checkpoints of hand-written loops: a folder that is there whole or not at all."""

import re
import shutil
from pathlib import Path
from typing import Any

import torch

from unimm.errors import UserError

STATE_FILE = "state.pt"
_NAME = re.compile(r"checkpoint-(\d+)")


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], keep: int = 1) -> Path:
    """Write `state` to folder/checkpoint-<step> under a temporary name, rename it, and then drop all but the newest
    `keep`."""
    target = folder / f"checkpoint-{step}"
    temporary = folder / f".{target.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    torch.save(state, temporary / STATE_FILE)
    shutil.rmtree(target, ignore_errors=True)
    temporary.replace(target)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = [p for p in folder.glob("checkpoint-*") if _NAME.fullmatch(p.name) and (p / STATE_FILE).is_file()]
    return sorted(found, key=lambda p: int(p.name.rsplit("-", 1)[1]))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The state of one checkpoint. Raises UserError where the file cannot be read."""
    try:
        return torch.load(path / STATE_FILE, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        raise UserError(
            f"The checkpoint {path} cannot be read; delete it to go on from the one before: {error}"
        ) from error
