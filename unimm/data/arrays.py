"""Conversion of arrays and tensors that hold one image to RGB, by the rules of transformers' image processors.

| shape | [H, W], [H, W, C] or [C, H, W] with C = 1, 3 or 4; if both ends could be the channels, the first one is |
|---|---|
| uint8, other integers, floats | 0 to 255 |
| floats, none above 1 | 0 to 1 |
| uint16, bool | 0 to 65535, False and True |
"""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from unimm.errors import UserError

CHANNELS = (1, 3, 4)
FIRST, LAST = "channels_first", "channels_last"


def is_array(value: Any) -> bool:
    """Return whether `value` is a NumPy array or a torch tensor."""
    torch = sys.modules.get("torch")  # a tensor exists only where torch is imported, and importing it takes seconds
    return isinstance(value, np.ndarray) or (torch is not None and isinstance(value, torch.Tensor))


def to_numpy(value: Any) -> np.ndarray:
    """Return an array unchanged, or convert a tensor of any device and dtype to an array."""
    if isinstance(value, np.ndarray):
        return value
    tensor = value.detach().cpu()
    return np.asarray(tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy())


def rgb_array(value: Any, layout: str | None = None) -> np.ndarray:
    """Convert one image to RGB [H, W, 3]: uint8, or floats in [0, 1], unchanged; transparent parts become white.

    Args:
        layout: "channels_first" or "channels_last" if the shape is ambiguous.

    Raises:
        UserError: the shape, type or values are not those of an image.
    """
    array = to_numpy(value)
    given = f"{array.dtype} {list(array.shape)}"
    if array.size == 0:
        raise UserError(f"An array of {given} holds no pixels.")
    array = array[..., None] if array.ndim == 2 else np.moveaxis(array, _channel_axis(array, layout, given), -1)
    array = _scaled(array, given)
    if array.shape[-1] == 1:
        return np.repeat(array, 3, axis=-1)
    return array if array.shape[-1] == 3 else _on_white(array)


def is_unit(array: np.ndarray) -> bool:
    """Return whether an array from `rgb_array` holds floats in [0, 1] instead of uint8."""
    return array.dtype != np.uint8


def eight_bits(array: np.ndarray) -> np.ndarray:
    """Convert an array from `rgb_array` to uint8; values are truncated to the lower level, as in transformers."""
    return (array.astype(np.float64) * 255).astype(np.uint8) if is_unit(array) else array


def _channel_axis(array: np.ndarray, layout: str | None, given: str) -> int:
    if array.ndim != 3:
        raise UserError(f"An image is [H, W], [H, W, C] or [C, H, W], and the array is {given}.")
    if layout is not None:
        axis = {FIRST: 0, LAST: 2}.get(getattr(layout, "value", layout))
        if axis is None or array.shape[axis] not in CHANNELS:
            raise UserError(f"An array of {given} has not 1, 3 or 4 channels as {layout} says.")
        return axis
    for axis in (0, 2):
        if array.shape[axis] in CHANNELS:
            return axis
    raise UserError(f"An array of {given} has 1, 3 or 4 channels neither in front nor behind: which axis is it?")


def _scaled(array: np.ndarray, given: str) -> np.ndarray:
    """Scale to uint8; floats in [0, 1] stay unchanged."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * 255
    if array.dtype == np.uint16:
        return (array.astype(np.float32) / 257).round().astype(np.uint8)
    if array.dtype.kind not in "iuf":
        raise UserError(f"An image holds numbers, and the array is {given}.")
    low, high = float(array.min()), float(array.max())
    if not (low >= 0 and high <= 255):  # NaN compares as false
        raise UserError(f"The values of an image lie in [0, 1] or [0, 255], and those of {given} in [{low}, {high}].")
    if array.dtype.kind == "f" and high <= 1:
        return array
    return array.round().astype(np.uint8) if array.dtype.kind == "f" else array.astype(np.uint8)


def _on_white(array: np.ndarray) -> np.ndarray:
    """Blend RGBA [H, W, 4] onto white, with the formula and the rounding of transformers."""
    white = 1.0 if is_unit(array) else 255
    alpha = array[..., 3:] / white
    blended = alpha * array[..., :3] + (1 - alpha) * white
    rounded: Callable[..., np.ndarray] = np.asarray if is_unit(array) else np.round
    return rounded(blended).astype(array.dtype)
