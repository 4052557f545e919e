"""Sampling settings of image ids: their defaults, rules, command-line flags, and what they do to the logits.

Imports neither torch nor transformers until logits are at hand. A new setting is a field of `ImageSampling` and a line
of `SamplingOptions`: then the commands, the sections of the recipes' files and `ChatSession.draw` have it.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, TypedDict

from unimm.config.argument_types import number_from_zero, whole_number
from unimm.config.schema import Natural, NonNegative, Range
from unimm.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import GenerationConfig, LogitsProcessorList

    GuidanceScale: TypeAlias = float | Sequence[float] | Tensor | None
else:
    GuidanceScale = float | Sequence[float] | None  # what a file can hold; read when a section is built


def _option(default: Any, help: str, **argument: Any) -> Any:
    """Return a field with its default, its help, and the other arguments of its command-line flag."""
    return field(default=default, metadata={"help": help, "argument": argument})


def _check_number(name: str, value: Any) -> None:
    if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
        raise UserError(f"{name} is {value!r}; give a number.")
    if name == "top_k" and not isinstance(value, Integral):
        raise UserError(f"top_k is {value!r}; give a whole number, 0 for all image ids.")


@dataclass(frozen=True)
class ImageSampling:
    """Sampling settings of image ids. A checkpoint stores its defaults in `generation_config.image_generation`, and
    those that differ for prompts with images, such as edits, in `image_editing`.

    Args:
        do_sample: False is greedy.
        temperature: 0 is greedy, too.
        top_k: sample from the k most likely ids; 0 keeps all.
        top_p: sample from the smallest set with this total probability; 1 keeps all.
        min_p: drop ids less probable than this fraction of the most likely one's probability; 0 keeps all.
        guidance_scale: one number or one per prompt; None, 0 and 1 are no guidance.
        guidance_interval: (start, stop), the image tokens that are guided; None: all.
        guidance_schedule: "linear" raises the scale evenly over the tokens, from 1 to `guidance_scale` at the last.
        image_guidance_scale: with an image to edit, the scale of the image beside that of the text
            (https://arxiv.org/abs/2211.09800); one number or one per prompt. None: one scale for both.
    """

    do_sample: bool = _option(True, "sample, or take the likeliest id", action=argparse.BooleanOptionalAction)
    temperature: NonNegative = _option(
        1.0, "how freely to draw; 0 = always the likeliest id", type=number_from_zero, metavar="T"
    )
    top_k: Natural = _option(0, "sample from the K likeliest ids; 0 = all", type=whole_number, metavar="K")
    top_p: Annotated[float, Range(above=0, most=1)] = _option(
        1.0, "sample from the likeliest ids of total probability P", type=number_from_zero, metavar="P"
    )
    min_p: Annotated[float, Range(least=0, below=1)] = _option(
        0.0, "drop ids below this fraction of the likeliest one's probability", type=number_from_zero, metavar="P"
    )
    guidance_scale: Annotated[GuidanceScale, Range(least=0)] = _option(
        None, "how closely to follow the prompt; 1 = off", type=number_from_zero, metavar="G"
    )
    guidance_interval: tuple[Natural, Natural] | None = _option(
        None, "the image tokens that are guided", type=whole_number, nargs=2, metavar=("START", "STOP")
    )
    guidance_schedule: Literal["constant", "linear"] = _option(
        "constant", "linear raises the guidance scale from token to token", choices=("constant", "linear")
    )
    image_guidance_scale: Annotated[GuidanceScale, Range(least=0)] = _option(
        None, "how closely to follow the image that is edited; 1 = off", type=number_from_zero, metavar="G"
    )

    def __post_init__(self) -> None:
        if self.guidance_schedule not in ("constant", "linear"):
            raise UserError(f"guidance_schedule is {self.guidance_schedule!r}; known: constant, linear")
        if self.guidance_interval is not None:
            ends = self.guidance_interval
            pair = isinstance(ends, list | tuple) and len(ends) == 2 and all(isinstance(end, int) for end in ends)
            if not (pair and 0 <= ends[0] <= ends[1]):
                raise UserError(f"guidance_interval is {ends!r}: give [start, stop] with 0 <= start <= stop")
        for name in ("temperature", "top_k", "top_p", "min_p"):
            _check_number(name, getattr(self, name))
        for name in ("guidance_scale", "image_guidance_scale"):
            if isinstance(scale := getattr(self, name), str | bool | Real):
                _check_number(name, scale)
        if not (self.temperature >= 0 and self.top_k >= 0 and 0 < self.top_p <= 1 and 0 <= self.min_p < 1):
            raise UserError(
                f"temperature={self.temperature}, top_k={self.top_k}, top_p={self.top_p}, min_p={self.min_p}: "
                "temperature and top_k must be at least 0, top_p above 0 and at most 1, min_p at least 0 and below 1"
            )

    @property
    def greedy(self) -> bool:
        """Return whether the most likely id is always chosen."""
        return not self.do_sample or self.temperature == 0

    @classmethod
    def of(cls, generation_config: "GenerationConfig", *, editing: bool = False, **given: Any) -> "ImageSampling":
        """Read the settings from a generation config: its `image_generation`, or else its text fields; its
        `image_editing` overrides them if `editing`, and `given` overrides all."""
        stored = getattr(generation_config, "image_generation", None)
        if stored is None:
            said = {name: getattr(generation_config, name, None) for name in SAMPLING_NAMES}
            stored = {name: value for name, value in said.items() if value is not None}
        edited = (getattr(generation_config, "image_editing", None) or {}) if editing else {}
        return replace(cls(), **{**stored, **edited, **given})

    def scales(self, batch_size: int, length: int) -> "Tensor":
        """Return the guidance scale of every token of every prompt, [length, B], 0 for no guidance."""
        return self._scheduled(per_prompt_scale(self.guidance_scale, batch_size), length)

    def image_scales(self, batch_size: int, length: int) -> "Tensor | None":
        """Return the same for `image_guidance_scale`; None without one."""
        if self.image_guidance_scale is None:
            return None
        return self._scheduled(per_prompt_scale(self.image_guidance_scale, batch_size, "image_guidance_scale"), length)

    def _scheduled(self, scale: "Tensor", length: int) -> "Tensor":
        """Return scales [B] by interval and schedule, [length, B]."""
        import torch

        steps = torch.arange(length)[:, None]
        start, stop = (0, length) if self.guidance_interval is None else self.guidance_interval
        inside = (steps >= start) & (steps < stop)
        if self.guidance_schedule == "linear":
            rising = 1 + (scale - 1) * (steps + 1) / length
            return torch.where(inside & (scale > 0), rising, 0.0)
        return torch.where(inside, scale, 0.0)

    def warpers(self) -> "LogitsProcessorList":
        """Return the logits processors from guided logits to sampling scores; none if greedy."""
        from transformers import LogitsProcessorList
        from transformers.generation import (
            MinPLogitsWarper,
            TemperatureLogitsWarper,
            TopKLogitsWarper,
            TopPLogitsWarper,
        )

        warpers = LogitsProcessorList()
        if self.greedy:
            return warpers
        if self.temperature != 1.0:
            warpers.append(TemperatureLogitsWarper(float(self.temperature)))
        if self.top_k:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1.0:
            warpers.append(TopPLogitsWarper(self.top_p))
        if self.min_p:
            warpers.append(MinPLogitsWarper(self.min_p))
        return warpers


class SamplingOptions(TypedDict, total=False):
    """The fields of `ImageSampling` as keyword arguments: they override a checkpoint's defaults unless None."""

    do_sample: bool | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    guidance_scale: GuidanceScale
    guidance_interval: tuple[int, int] | None
    guidance_schedule: Literal["constant", "linear"] | None
    image_guidance_scale: GuidanceScale


SAMPLED = ImageSampling()
"""Plain sampling from all ids, without guidance."""

SAMPLING_HELP = "how image ids are chosen; by default as the checkpoint says"
SAMPLING_NAMES = tuple(field.name for field in fields(ImageSampling))


def add_sampling_arguments(parser: argparse._ActionsContainer) -> None:
    """Add one flag per setting; its default, None, is the checkpoint's own. `sampling_options` reads them."""
    for each in fields(ImageSampling):
        flag = f"--{each.name.replace('_', '-')}"
        parser.add_argument(flag, default=None, help=each.metadata["help"], **each.metadata["argument"])


def sampling_options(given: argparse.Namespace | Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that are given (parsed arguments, or settings by name), without those that are None.

    Raises:
        UserError: an unknown name, or a value that `ImageSampling` refuses.
    """
    if isinstance(given, argparse.Namespace):
        given = {name: getattr(given, name) for name in SAMPLING_NAMES}
    if unknown := sorted(set(given) - set(SAMPLING_NAMES)):
        raise UserError(f"{', '.join(unknown)} is no sampling setting; there are {', '.join(SAMPLING_NAMES)}.")
    options = {name: value for name, value in given.items() if value is not None}
    ImageSampling(**options)
    for name in ("guidance_scale", "image_guidance_scale"):
        if isinstance(scale := options.get(name), Real) and scale < 0:
            raise UserError(f"{name} is {scale}; give 0 or 1 for no guidance, or a number above 1.")
    return options


def per_prompt_scale(scale: GuidanceScale, batch_size: int, name: str = "guidance_scale") -> "Tensor":
    """Return one scale per prompt [B], 0 if guidance is off (None, 0, less than 0, exactly 1)."""
    import torch

    values = torch.as_tensor(0.0 if scale is None else scale, dtype=torch.float32).flatten().cpu()
    if len(values) not in (1, batch_size):
        raise UserError(f"{name} has {len(values)} values, give 1 or one per prompt, {batch_size}")
    meaningless = ~torch.isfinite(values) | ((values > 0) & (values < 1))
    if meaningless.any():
        raise UserError(
            f"{name} is {float(values[meaningless][0]):g}; give 0 or 1 for no guidance, or a number above 1"
        )
    values = values.expand(batch_size)
    return torch.where(values > 1, values, 0.0)
