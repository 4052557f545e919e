"""Swap the image tokenizer of a unified model for a fine-tuned version of it, or its decoder alone.

The language model is unchanged, including the rows of the image ids, so image generation starts almost right if the
codes moved only a little. The meaning of the ids has changed all the same: train the model afterwards. With another
decoder alone nothing changes but the pixels.
"""

from pathlib import Path
from typing import Any

from unimm.errors import UserError
from unimm.tokenizer.loading import load_image_tokenizer
from unimm.tokenizer.vqrae import HEAD_FIELDS

_PASSING = ("transformers_version", "dtype", "architectures", "_name_or_path")  # not part of the architecture


def swap_image_tokenizer(model: Any, path: str | Path) -> None:
    """Replace the image tokenizer of a unified model by the one at `path`.

    Raises:
        UserError: if nothing is there, or a tokenizer of another architecture: attach a language model to it instead.
    """
    other = load_image_tokenizer(path)
    own, new = _build_of(model.image_tokenizer), _build_of(other)
    differing = sorted(name for name in own.keys() | new.keys() if own.get(name) != new.get(name))
    if differing:
        name = differing[0]
        raise UserError(
            f"The image tokenizer {path} is built differently from the model's own: {name} is {new.get(name)!r}, not "
            f"{own.get(name)!r}. Attach a language model to it (unimm.attach)."
        )
    model.image_tokenizer.load_state_dict(other.state_dict())
    model.config.tokenizer_fingerprint = other.fingerprint


def take_decoder(model: Any, path: str | Path) -> None:
    """Replace the decoder and the pixel head of a unified model's image tokenizer by those of the tokenizer at `path`.

    Raises:
        UserError: if its codebook differs.
    """
    other = load_image_tokenizer(path)
    if other.fingerprint != model.image_tokenizer.fingerprint:
        raise UserError(
            f"The image tokenizer {path} has another codebook than the model: its decoder cannot draw for it."
        )
    own = model.image_tokenizer
    own.decoder.load_state_dict(other.decoder.state_dict())
    own.pixel_head = other.pixel_head
    for config in (own.config, model.config.vision_config):
        for name in HEAD_FIELDS & vars(other.config).keys():
            setattr(config, name, getattr(other.config, name))


def _build_of(tokenizer: Any) -> dict[str, Any]:
    """Return the config fields that determine a tokenizer's weight names and shapes and its image processing."""
    fields = tokenizer.config.to_diff_dict()
    fields |= {f"encoder_config.{name}": value for name, value in fields.pop("encoder_config", {}).items()}
    return {name: value for name, value in fields.items() if name.removeprefix("encoder_config.") not in _PASSING}
