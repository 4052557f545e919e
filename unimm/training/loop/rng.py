"""Random states: saved in checkpoints for each process, and preserved during evaluations and panels."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor


def preserve_rng_state(device: torch.device) -> AbstractContextManager[None]:
    """Restore the random state after the context, so that an evaluation or a panel does not change training."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the CPU's random numbers with `seed` inside the context, and restore their state afterwards."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs too
    try:
        yield
    finally:
        torch.set_rng_state(state)


def random_states(accelerator: Accelerator) -> list[dict[str, Tensor]]:
    """Return torch's random states of all processes, by rank; call it on every process."""
    state = {"cpu": torch.get_rng_state()}
    if accelerator.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(accelerator.device)
    return gather_object([state]) if accelerator.num_processes > 1 else [state]


def set_random_states(states: list[dict[str, Tensor]], accelerator: Accelerator) -> None:
    """Set this process's saved random state; a process that the saved run did not have keeps its own."""
    if accelerator.process_index < len(states):
        state = states[accelerator.process_index]
        torch.set_rng_state(state["cpu"])
        if "cuda" in state and accelerator.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"], accelerator.device)
