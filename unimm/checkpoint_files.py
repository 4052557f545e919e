"""Validate the files of an untrusted checkpoint before any library builds a model from them.

Configuration fields are checked against `field_rules`, an index may only name files in its own folder, a `.bin` must be
a plain state dict (loaded with `weights_only`), and a model whose configuration describes far more weights than its
files hold is rejected while it is on the meta device, before memory is allocated for it.
"""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.initialization import no_init_weights
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)
from transformers.utils.hub import cached_file

from unimm.errors import UserError, one_line, reading
from unimm.field_rules import check_settings

SETTINGS_FILES = (
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer_config.json",
)
MOST_WEIGHTS_A_BYTE = 4
"""Most weights per byte of a checkpoint's files: 2 bits per weight, below any quantization supported here."""

_room: ContextVar[int | None] = ContextVar("weights that the files of the model being built can hold", default=None)


@contextmanager
def examining(what: str, source: str | Path, revision: str | None = None) -> Iterator[None]:
    """Validate a checkpoint's files, then act as `errors.reading`; bound models built inside by their size."""
    with reading(what, source):
        check_settings_files(source, revision)
        with bounded_by(stored_bytes(source, revision)):
            yield


def read_settings(file: Path) -> dict[str, Any]:
    """Read a configuration file (JSON) and return its fields.

    Raises:
        UserError: the file cannot be read, is not a JSON object, or a field violates `field_rules`.
    """
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except RecursionError:
        raise UserError(f"{file} is damaged: it is nested too deeply.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is damaged: {one_line(error)[:200]}.") from error
    if not isinstance(fields, dict):
        raise UserError(f"{file} is damaged: it holds a {type(fields).__name__}, not a JSON object.")
    check_settings(fields, file)
    return fields


def check_settings_files(source: str | Path, revision: str | None = None) -> None:
    """Validate every configuration file of a folder or hub id, see `read_settings`."""
    for name in SETTINGS_FILES:
        file = _file_of(source, name, revision)
        if file is not None:
            read_settings(file)
    vocabulary = _file_of(source, "tokenizer.json", revision)
    if vocabulary is not None and not _begins_an_object(vocabulary):
        raise UserError(f"{vocabulary} is damaged: it does not hold a JSON object.")


def _begins_an_object(file: Path) -> bool:
    """Return whether the file starts like a JSON object; the rest, which may be large, is left to its reader."""
    with file.open("rb") as opened:
        return opened.read(64).lstrip().startswith(b"{")


def stored_bytes(source: str | Path, revision: str | None = None) -> int | None:
    """Return the size of a checkpoint's weight files in bytes, None if it has no safetensors or `.bin` files.

    Raises:
        UserError: an index that names no files, files outside the folder or missing files; a `.bin` that is not a plain
            state dict.
    """
    for name in (SAFE_WEIGHTS_NAME, WEIGHTS_NAME):
        if (file := _file_of(source, name, revision)) is not None:
            return _size_of(file)
        if (index := _file_of(source, _INDEX_OF[name], revision)) is not None:
            files = [_file_of(source, each, revision) for each in _indexed(index)]
            if missing := [each for each, found in zip(_indexed(index), files, strict=True) if found is None]:
                raise UserError(f"{index} names {missing[0]}, which is not there: save the model again, or fetch it.")
            return sum(_size_of(file) for file in files if file is not None)
    return None


_INDEX_OF = {SAFE_WEIGHTS_NAME: SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME: WEIGHTS_INDEX_NAME}


def _indexed(index: Path) -> list[str]:
    try:
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(named.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index} is damaged: it has no weight_map ({one_line(error)[:100]}).") from error
    if not files:
        raise UserError(f"{index} names no weights.")
    for file in files:
        if not isinstance(file, str) or Path(file).name != file or not file.endswith((".safetensors", ".bin")):
            raise UserError(f"{index} names {str(file)[:100]!r}: weights must lie beside it, in .safetensors or .bin.")
    return files


def _size_of(file: Path) -> int:
    if file.suffix == ".bin":
        _check_state_dict(file)
    return file.stat().st_size


def _check_state_dict(file: Path) -> None:
    """Raise UserError unless the file is a mapping of names to tensors; it is loaded on the meta device."""
    try:
        state = torch.load(file, map_location="meta", weights_only=True)
    except Exception as error:  # pickle's and torch's own errors have no common base
        raise UserError(
            f"{file} cannot be read as plain weights ({type(error).__name__}: {one_line(error)[:150]}): other pickles "
            "can run code and are not read. Save it as safetensors."
        ) from error
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise UserError(f"{file} is no plain state dict (names to tensors): save the model as safetensors.")
    if not state:
        raise UserError(f"{file} holds no weights.")


def _file_of(source: str | Path, name: str, revision: str | None) -> Path | None:
    if Path(source).is_dir():
        return Path(source, name) if Path(source, name).is_file() else None
    found = cached_file(
        str(source),
        name,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    return None if found is None else Path(found)


# ---- model size and finite weights -----------------------------------------------------------------------------------


@contextmanager
def bounded_by(size: int | None) -> Iterator[None]:
    """Limit models built inside to as many weights as files of `size` bytes can hold, see `refuse_excess`."""
    token = _room.set(None if size is None else MOST_WEIGHTS_A_BYTE * size)
    try:
        yield
    finally:
        _room.reset(token)


def refuse_excess(model: nn.Module) -> None:
    """Raise UserError if a model, not loaded yet, has more weights than its checkpoint's files can hold."""
    room = _room.get()
    if room is None:
        return
    weights = sum(parameter.numel() for parameter in model.parameters())
    if weights > room:
        raise UserError(
            f"config.json describes a model of {weights:.3g} weights, and the checkpoint's files have "
            f"{room // MOST_WEIGHTS_A_BYTE:.3g} bytes: they do not belong together."
        )


def refuse_excess_of(auto: Any, config: PreTrainedConfig) -> None:
    """Call `refuse_excess` on the model that an Auto class would build, on the meta device."""
    with torch.device("meta"), no_init_weights():
        refuse_excess(auto.from_config(config))


@torch.no_grad()
def refuse_non_finite(model: nn.Module, source: Any) -> None:
    """Raise UserError if a weight is infinite or NaN: such a model would silently write nothing and generate noise.

    A single pass checks the sum of each tensor, which is not finite if a weight is not. Offloaded tensors are skipped.
    """
    for name, tensor in model.state_dict().items():
        if tensor.is_meta or not tensor.dtype.is_floating_point or tensor.element_size() < 2:
            continue
        # The sum of finite numbers can overflow too, so count before raising.
        if not math.isfinite(_sum(tensor)) and (bad := int((~torch.isfinite(tensor)).sum())):
            raise UserError(
                f"The checkpoint {source} is broken: {bad} of {tensor.numel()} numbers of {name} are infinite or NaN. "
                "Save it again or fetch it anew."
            )


def _sum(tensor: Tensor) -> float:
    if tensor.dtype == torch.float32 and tensor.device.type == "cpu":
        with np.errstate(all="ignore"):
            return float(tensor.detach().numpy().sum())  # one thread: waking torch's takes longer than most sums
    return float(tensor.sum(dtype=torch.float32))
