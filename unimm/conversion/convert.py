"""`convert`: a published checkpoint into a folder of this library."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from unimm.class_conditional.drawing import ClassDrawer
from unimm.conversion import check_options
from unimm.conversion.building import build_gpt, build_ideal, build_vfmtok, build_vq
from unimm.conversion.layouts import LAYOUTS
from unimm.conversion.rules import Shapes, renamed
from unimm.errors import UserError, reading
from unimm.saving import refuse_holes, save_whole
from unimm.tokenizer.loading import load_with_processor
from unimm.tokenizer.processing import ImageTokenizerProcessor

PREFIXES = ("module.", "_orig_mod.")
"""Prefixes that data parallelism and torch.compile put before every name."""
VQ_SIZE = 256
INNER = "model."
"""IDEAL's released class wraps the model and names two of its parts a second time."""
ALIASES = {"decoder.": "model.decoder.", "quantize.": "model.slot_quantize."}


@dataclass(frozen=True)
class Converted:
    """What was converted: the model, the key that held its weights, and how many tensors and weights it has."""

    model: Any
    key: str | None
    tensors: int
    weights: int


def convert(
    layout: str,
    file: Path,
    output: Path,
    *,
    encoder: str | None = None,
    tokenizer: str | None = None,
    image_size: int | None = None,
) -> Converted:
    """Convert a checkpoint and save the model to `output`.

    Args:
        layout: a key of `unimm.conversion.LAYOUTS`.
        file: .safetensors, or .pt with plain tensors, read with `weights_only`.
        output: a folder; a GPT is saved with its tokenizer, as `load_drawer` reads it.
        encoder: of VFMTok, a name in `unimm encoders`, a folder or a hub id; None takes the published one.
        tokenizer: of a GPT, the folder of the converted image tokenizer.
        image_size: of LlamaGen's VQ, the side of its images in pixels; None is 256.

    Raises:
        UserError: the file cannot be read, weights are missing, unexpected or have another shape, or the options do not
            belong to the layout.
    """
    check_options(layout, encoder=encoder, tokenizer=tokenizer, image_size=image_size)
    state, key = read_weights(file, LAYOUTS[layout].kept_under)
    if layout == "ideal":
        state = _unwrapped(state, file)
    shapes = Shapes(state, file)
    tensors = renamed(state, LAYOUTS[layout].rules, file)
    model: Any
    if tokenizer is not None:
        image_tokenizer, image_processor = load_with_processor(tokenizer)
        model = build_gpt(shapes, image_tokenizer)
        fill(model, tensors, file, elsewhere=("rotation.",))
        ClassDrawer(model.eval(), image_tokenizer, image_processor).save(output)
    else:
        if layout == "vfmtok":
            model = build_vfmtok(shapes, encoder)
        else:
            model = build_ideal(shapes) if layout == "ideal" else build_vq(shapes, image_size or VQ_SIZE)
        fill(model, tensors, file, elsewhere=("encoder.",) if layout == "vfmtok" else ())
        save_whole(output, model.eval(), ImageTokenizerProcessor.for_tokenizer(model.config))
    return Converted(model, key, len(state), sum(tensor.numel() for tensor in tensors.values()))


def read_weights(file: Path, kept_under: tuple[str, ...]) -> tuple[dict[str, Tensor], str | None]:
    """Read the tensors of a checkpoint by name, and the key that they were under (None: at the top).

    Raises UserError if the file cannot be read without running code, or holds no tensors.
    """
    found: Any
    with reading("The checkpoint", file):
        if file.suffix == ".safetensors":
            found = load_file(file)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # a training checkpoint's arguments, unused
                found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    found = found if isinstance(found, Mapping) else {}
    key = next((each for each in kept_under if isinstance(found.get(each), Mapping)), None)
    state = found if key is None else found[key]
    if not state or not all(isinstance(each, Tensor) for each in state.values()):
        raise UserError(f"{file} holds no tensors by name, neither at the top nor under {', '.join(kept_under)}.")
    return {_bare(name): tensor for name, tensor in state.items()}, key


def _bare(name: str) -> str:
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _unwrapped(state: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Return IDEAL's inner model, without the second names of two of its parts.

    Raises UserError if a tensor differs under its two names.
    """
    if not any(name.startswith(INNER) for name in state):
        return state
    kept = {}
    for name, tensor in state.items():
        alias = next((whole + name[len(short) :] for short, whole in ALIASES.items() if name.startswith(short)), None)
        if alias is None:
            kept[name.removeprefix(INNER)] = tensor
        elif alias in state and not torch.equal(state[alias], tensor):
            raise UserError(f"{file} holds two versions of one tensor: {name} differs from {alias}.")
        else:
            kept.setdefault(alias.removeprefix(INNER), tensor)
    return kept


def fill(model: nn.Module, tensors: Mapping[str, Tensor], file: Path, *, elsewhere: tuple[str, ...] = ()) -> None:
    """Load the converted tensors into the model; those that start with `elsewhere` are not the checkpoint's.

    Raises UserError, with counts, if weights are missing, unexpected or of another shape.
    """
    expected = model.state_dict()
    wanted = {name for name in expected if not name.startswith(elsewhere or ("\0",))}
    shared = wanted & set(tensors)
    info = {
        "missing_keys": wanted - set(tensors),
        "unexpected_keys": set(tensors) - wanted,
        "mismatched_keys": [
            (name, tensors[name].shape, expected[name].shape)
            for name in shared
            if tensors[name].shape != expected[name].shape
        ],
    }
    refuse_holes(model, info, file)
    model.load_state_dict(dict(tensors), strict=False)  # all of `wanted` is there
