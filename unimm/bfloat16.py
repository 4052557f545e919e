"""Choose the precision for `auto`: bfloat16 if the device has fast instructions for it, else float32.

GPUs from compute capability 8.0 and CPUs with AVX512-BF16 (every CPU with AMX has it) multiply bfloat16 faster than
float32. Any other CPU emulates it: an AVX2 one was measured at 0.8 GFLOP/s, against 56 in float32.
"""

import os
import time
from dataclasses import dataclass

import torch
from accelerate.utils import str_to_bool


def multiplies_bfloat16(device: torch.device) -> bool:
    """Return whether the device has bfloat16 multiplication instructions."""
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported()
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def automatic_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 if the device multiplies it fast, else float32."""
    return torch.bfloat16 if multiplies_bfloat16(device) else torch.float32


def training_device(use_cpu: bool = False) -> torch.device:
    """Return the device type that accelerate will use in this process."""
    forced = use_cpu or str_to_bool(os.environ.get("ACCELERATE_USE_CPU", "false"))
    found = None if forced or not torch.accelerator.is_available() else torch.accelerator.current_accelerator()
    return found or torch.device("cpu")


def slowdown(device: torch.device, size: int = 256, repeats: int = 3) -> float:
    """Measure how many times slower a bfloat16 matrix product is than a float32 one; takes less than a second."""

    def seconds(dtype: torch.dtype) -> float:
        matrix = torch.ones(size, size, dtype=dtype, device=device)
        found = []
        for _ in range(repeats + 1):  # the first warms up
            start = time.perf_counter()
            (matrix @ matrix).sum().item()  # .item() waits for the device
            found.append(time.perf_counter() - start)
        return min(found[1:])

    return seconds(torch.bfloat16) / seconds(torch.float32)


@dataclass(frozen=True)
class Precision:
    """The precision of a run, and how it was chosen.

    Args:
        name: "float32", "bfloat16" or "float16".
        automatic: whether `auto` chose it.
        device: the device of the run.
    """

    name: str
    automatic: bool
    device: torch.device

    def note(self) -> str:
        """Return the precision as a line for the log."""
        if not self.automatic:
            return f"precision {self.name}"
        fast = "multiplies" if self.name == "bfloat16" else "does not multiply"
        return f"precision {self.name} (auto: this {self.device.type.upper()} {fast} bfloat16 fast)"

    def warning(self) -> str | None:
        """Return a warning with the measured slowdown if the device emulates bfloat16, else None."""
        if self.name != "bfloat16" or multiplies_bfloat16(self.device):
            return None
        return (
            f"The precision is bfloat16, which this {self.device.type.upper()} has no fast instructions for: a product "
            f"takes {slowdown(self.device):.1f} times as long as in float32. Set it to auto to train in float32 here."
        )
