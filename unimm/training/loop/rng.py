"""Random states: kept with a checkpoint, one of each process, and left alone by what only looks at a run."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor


def preserve_rng_state(device: torch.device) -> AbstractContextManager[None]:
    """Within, random numbers may be drawn without changing what is trained: an evaluation, a panel."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within, random numbers of the CPU follow from `seed` alone; afterwards they go on as if none had been drawn."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


def random_states(accelerator: Accelerator) -> list[dict[str, Tensor]]:
    """torch's states of every process, in their order; call it on all of them."""
    state = {"cpu": torch.get_rng_state()}
    if accelerator.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(accelerator.device)
    return gather_object([state]) if accelerator.num_processes > 1 else [state]


def set_random_states(states: list[dict[str, Tensor]], accelerator: Accelerator) -> None:
    """Go on with this process' state; a process that the saved run did not have keeps its own."""
    if accelerator.process_index < len(states):
        state = states[accelerator.process_index]
        torch.set_rng_state(state["cpu"])
        if "cuda" in state and accelerator.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"], accelerator.device)
