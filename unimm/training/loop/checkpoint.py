"""Checkpoints of every training loop: a folder that is there whole or not at all, and room for it before it is written.

output_dir/checkpoint-<step>         whole, the newest `keep`
output_dir/.checkpoint-<step>.tmp    being written; what a killed run leaves of it is cleared by the next one
"""

import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from unimm.errors import UserError, writing
from unimm.runs.provenance import flush

STATE_FILE = "state.pt"
_NAME = re.compile(r"checkpoint-(\d+)")


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step after which it was written."""
    return int(checkpoint.name.rsplit("-", 1)[1])


def staging_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of this step is written; `publish` gives it its name."""
    return folder / f".checkpoint-{step}.tmp"


def clear_leftovers(folder: Path) -> None:
    """Remove what killed runs were writing or removing."""
    for path in folder.glob(".checkpoint-*"):
        shutil.rmtree(path, ignore_errors=True)


def publish(staging: Path, folder: Path, step: int, keep: int | None) -> Path:
    """Flush the written checkpoint to the disk, give it its name, and drop all but the newest `keep` (None: none)."""
    target = folder / f"checkpoint-{step}"
    for path in (*staging.rglob("*"), staging):
        flush(path)
    staging.replace(target)
    flush(folder)
    for old in checkpoints(folder)[:-keep] if keep else []:
        going = old.with_name(f".{old.name}.old")  # else a kill would leave half of it under its own name
        old.replace(going)
        shutil.rmtree(going)
    return target


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write `state` as the checkpoint of this step, see `publish`."""
    staging = staging_folder(folder, step)
    shutil.rmtree(staging, ignore_errors=True)
    try:
        with writing("the checkpoint", folder / f"checkpoint-{step}"):
            staging.mkdir(parents=True)
            torch.save(state, staging / STATE_FILE)
            return publish(staging, folder, step, keep)
    except UserError:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The state of one checkpoint. Raises UserError where the file cannot be read."""
    try:
        return torch.load(path / STATE_FILE, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        raise UserError(
            f"The checkpoint {path} cannot be read; delete it to go on from the one before: {error}"
        ) from error


# ---- room on the disk ----


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Of their elements together."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def model_bytes(model: nn.Module) -> int:
    """What saving its weights takes; tied ones are stored once."""
    tied = set(model.all_tied_weights_keys) if isinstance(model, PreTrainedModel) else set()
    return bytes_of(tensor for name, tensor in model.state_dict().items() if name not in tied)


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of the states that AdamW (two each) or Muon (one) will keep of what it moves."""
    return sum(bytes_of(group["params"]) * (1 if group.get("muon") else 2) for group in optimizer.param_groups)


def require_space(folder: Path, size: int, copies: int, extra: int = 0) -> None:
    """Refuse to start writing what would not fit: `copies` checkpoints of `size` bytes, and `extra` bytes beside them.

    Raises:
        UserError: the disk has less room.
    """
    free, needed = shutil.disk_usage(folder).free, copies * size + extra
    if free < needed:
        raise UserError(
            f"{folder} has {gigabytes(free)} free and {gigabytes(needed)} are needed: {copies} checkpoints of "
            f"{gigabytes(size)} (those kept and the one being written) and {gigabytes(extra)} for the result. "
            "Make room, keep fewer checkpoints, or choose another output_dir; what is written already is intact."
        )


def gigabytes(size: int) -> str:
    """In words, to three digits."""
    return f"{size / 1e9:.3g} GB"
