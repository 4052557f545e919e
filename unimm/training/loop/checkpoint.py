"""Atomic checkpoints of all training loops, with a check of the disk space before one is written.

output_dir/checkpoint-<step>         complete; the newest `keep` remain
output_dir/.checkpoint-<step>.tmp    being written; leftovers of a killed run are removed by the next one
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
    """Return the complete checkpoints of a run, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """Return the step after which the checkpoint was written."""
    return int(checkpoint.name.rsplit("-", 1)[1])


def staging_folder(folder: Path, step: int) -> Path:
    """Return the temporary folder for the checkpoint of this step, which `publish` renames."""
    return folder / f".checkpoint-{step}.tmp"


def clear_leftovers(folder: Path) -> None:
    """Remove the partial checkpoints that killed runs were writing or deleting."""
    for path in folder.glob(".checkpoint-*"):
        shutil.rmtree(path, ignore_errors=True)


def publish(staging: Path, folder: Path, step: int, keep: int | None) -> Path:
    """Flush the written checkpoint to the disk, rename it, and delete all but the newest `keep` (None: keep all)."""
    target = folder / f"checkpoint-{step}"
    for path in (*staging.rglob("*"), staging):
        flush(path)
    staging.replace(target)
    flush(folder)
    for old in checkpoints(folder)[:-keep] if keep else []:
        going = old.with_name(f".{old.name}.old")  # else a kill would leave half of it as a checkpoint
        old.replace(going)
        shutil.rmtree(going)
    return target


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write `state` as the checkpoint of this step, then `publish` it."""
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
    """Load the state of one checkpoint. Raises UserError if the file cannot be read."""
    try:
        return torch.load(path / STATE_FILE, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        raise UserError(
            f"The checkpoint {path} cannot be read; delete it to go on from the one before: {error}"
        ) from error


# ---- room on the disk ----


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of all elements of the tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def model_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's saved weights; tied weights count once."""
    tied = set(model.all_tied_weights_keys) if isinstance(model, PreTrainedModel) else set()
    return bytes_of(tensor for name, tensor in model.state_dict().items() if name not in tied)


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of the optimizer's state once it is allocated: two tensors per parameter for AdamW, one for
    Muon."""
    return sum(bytes_of(group["params"]) * (1 if group.get("muon") else 2) for group in optimizer.param_groups)


def require_space(folder: Path, size: int, copies: int, extra: int = 0) -> None:
    """Check that `copies` checkpoints of `size` bytes and `extra` more bytes fit on the disk of `folder`.

    Raises:
        UserError: the disk has less free space.
    """
    free, needed = shutil.disk_usage(folder).free, copies * size + extra
    if free < needed:
        raise UserError(
            f"{folder} has {gigabytes(free)} free and {gigabytes(needed)} are needed: {copies} checkpoints of "
            f"{gigabytes(size)} (those kept and the one being written) and {gigabytes(extra)} for the result. "
            "Make room, keep fewer checkpoints, or choose another output_dir; what is written already is intact."
        )


def gigabytes(size: int) -> str:
    """Format bytes as gigabytes with three digits."""
    return f"{size / 1e9:.3g} GB"
