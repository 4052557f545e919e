"""Load local weight files of frozen networks: no code is unpickled, and all tensors must match.

The networks of losses and metrics (LPIPS, ConvNeXt, DINO, Inception) are published as `.pth` or `.safetensors` files
and are never downloaded here. A `.pth` is read with `torch.load(weights_only=True)`, which refuses to run code, and the
file's sha256 is logged, so that a run can be reproduced.
"""

import logging
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from unimm.errors import UserError
from unimm.runs.provenance import file_sha256

logger = logging.getLogger(__name__)

FILES_IN_FOLDER = ("model.safetensors", "pytorch_model.bin")


def read_weights(path: str | Path | None, *, name: str, get: str, setting: str) -> dict[str, Tensor]:
    """Read the tensors of a weight file (or a Hugging Face folder) to the CPU and log the file's sha256.

    The error message names the network that needs the file (`name`), the file to fetch (`get`) and the setting for its
    path (`setting`). Raises UserError if there is no path, no file, or no readable state dict in it.
    """
    if path is None:
        raise UserError(f"{name} needs a weight file and none was given: get {get} and set {setting} to its path.")
    file = _file_at(Path(path))
    if file is None:
        raise UserError(f"{name} needs a weight file and {path} holds none: get {get} and set {setting} to its path.")
    try:
        state = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, SafetensorError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"{file} cannot be read as weights of {name} ({reason}): get {get} again.") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{file} is not a plain state dict of tensors, which {name} needs: get {get}.")
    logger.info("%s: %s, sha256 %s", name, file, file_sha256(file))
    return dict(state)


def load_exactly(module: nn.Module, state: Mapping[str, Tensor], *, name: str, get: str) -> None:
    """Load `state` into `module`. Raises UserError if a tensor is missing, unexpected or of another shape."""
    wanted = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    given = {key: tuple(value.shape) for key, value in state.items()}
    missing = [key for key in wanted if key not in given]
    unknown = [key for key in given if key not in wanted]
    if missing or unknown:
        raise UserError(
            f"The weights given for {name} do not fit: {len(missing)} of {len(wanted)} tensors are missing "
            f"({_some(missing)}) and {len(unknown)} are unknown ({_some(unknown)}); get {get}."
        )
    for key, shape in wanted.items():
        if given[key] != shape:
            raise UserError(
                f"The weights given for {name} do not fit: {key} has shape {given[key]}, expected {shape}; get {get}."
            )
    module.load_state_dict(state)


def _file_at(path: Path) -> Path | None:
    """Return the weight file at `path`, or in it if it is a folder; None if there is none."""
    candidates = [path / name for name in FILES_IN_FOLDER] if path.is_dir() else [path]
    return next((file for file in candidates if file.is_file()), None)


def _some(names: list[str], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "") if names else "none"
