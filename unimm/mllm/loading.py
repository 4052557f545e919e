"""`load`: load a unified model and its processor: the default of this package, or from a folder or the hub."""

import os
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from unimm.checkpoint_files import check_settings_files, read_settings
from unimm.errors import UserError, reading
from unimm.mllm.agreement import check_agreement
from unimm.mllm.hosts.registry import HOSTS
from unimm.mllm.processing import UnimmProcessor

DEFAULT = "default"
"""The name of the model that ships with this package; write "./default" for a folder of that name."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def default_model_path() -> Path:
    """Return the folder of the model that ships with this package."""
    return Path(str(files("unimm") / "assets" / "default"))


def load(
    path_or_id: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    **kwargs: Any,
) -> tuple[Any, UnimmProcessor]:
    """Load a unified model, ready to use.

    Args:
        path_or_id: a folder, a hub id, or None or "default" for the model that ships with this package.
        device: None uses the GPU of this process (`LOCAL_RANK`) if there is one, else the CPU.
        dtype: None is float32 on the CPU and bfloat16 elsewhere; the codebook is always float32.
        kwargs: arguments of `from_pretrained` (`attn_implementation`, `revision`, ...).

    Returns:
        (model in evaluation mode, processor).

    Raises:
        UserError: if nothing is there, it is not a unified model, or it is broken.
    """
    model, processor = load_unchecked(path_or_id, device, dtype, **kwargs)
    check_agreement(model, processor, default_model_path() if path_or_id in (None, DEFAULT) else path_or_id)
    return model, processor


def load_unchecked(
    path_or_id: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    **kwargs: Any,
) -> tuple[Any, UnimmProcessor]:
    """Load a model like `load`, but without the consistency checks between its parts: `unimm doctor` reports them."""
    source = default_model_path() if path_or_id in (None, DEFAULT) else path_or_id
    _check_source(source)
    place = own_device(device)
    dtype = dtype or (torch.float32 if place.type == "cpu" else torch.bfloat16)
    with reading("The model", source):
        check_settings_files(source, kwargs.get("revision"))
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=False)
        model = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype, **kwargs)
    _check_pair(model, processor, source)
    return model.to(place).eval(), processor


def own_device(device: str | torch.device | None = None) -> torch.device:
    """Return the requested device; for None and "cuda" the GPU of this process (`LOCAL_RANK`), if there is one."""
    if device not in (None, "cuda"):
        return torch.device(device)
    if not torch.cuda.is_available():
        return torch.device(device or "cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def _check_source(source: str | Path) -> None:
    """Raise UserError for a bad `source`, before transformers raises a less specific error."""
    folder = Path(source)
    if not folder.exists():
        if isinstance(source, str) and _HUB_ID.fullmatch(source):
            return
        raise UserError(f"There is no model folder {source}.")
    if not folder.is_dir():
        raise UserError(f"{source} is a file; a model is a folder with config.json, weights and tokenizer files.")
    config_file = folder / "config.json"
    if not config_file.is_file():
        if (folder / "adapter_config.json").is_file():
            raise UserError(
                f"{source} is an adapter, not a whole model: merge it first (unimm merge {source} --output FOLDER)."
            )
        raise UserError(f"{source} is no model: it has no config.json.")
    model_type = read_settings(config_file).get("model_type")
    known = [family.config_class.model_type for family in HOSTS.values()]
    if model_type not in known:
        raise UserError(
            f"{source} is a {model_type or 'nameless'} model, not a unified one ({', '.join(known)}): attach an image "
            "tokenizer to a language model first (unimm.attach)."
        )


def _check_pair(model: Any, processor: Any, source: str | Path) -> None:
    if not isinstance(processor, UnimmProcessor):
        raise UserError(f"{source} has no processor of a unified model: save the processor beside the model.")
    expected, found = model.visual_vocabulary, processor.vocabulary
    if expected != found:
        raise UserError(
            f"In {source} the model's {expected.size} image ids start at {expected.base}, the processor's {found.size} "
            f"at {found.base}: they belong to different models."
        )
