"""A unified model goes on with a fine-tuned version of its own image tokenizer.

Nothing of the language model moves. The rows of the image ids are kept, so where the codes moved a
little, drawing starts almost right; what the ids mean has changed all the same, and the model has to be trained.
"""

from pathlib import Path
from typing import Any

from unimm.errors import UserError
from unimm.tokenizer.loading import load_image_tokenizer

_PASSING = ("transformers_version", "dtype", "architectures", "_name_or_path")  # of the file, not of the build


def swap_image_tokenizer(model: Any, path: str | Path) -> None:
    """Put the image tokenizer at `path` into a unified model, in place of the one it has.

    Raises:
        UserError: nothing there, or a tokenizer of another build: then a language model has to be attached to it anew.
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


def _build_of(tokenizer: Any) -> dict[str, Any]:
    """What decides the names and shapes of a tokenizer's weights and how its images are prepared."""
    fields = tokenizer.config.to_diff_dict()
    fields |= {f"encoder_config.{name}": value for name, value in fields.pop("encoder_config", {}).items()}
    return {name: value for name, value in fields.items() if name.removeprefix("encoder_config.") not in _PASSING}
