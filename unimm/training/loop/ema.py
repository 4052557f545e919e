"""Exponential moving average (EMA) of a model's trainable weights, used for evaluation and for the saved model.

Only trainable floating-point tensors are averaged, in fp32 and by `lerp`, so a frozen encoder or codebook is not even
rounded. The decay warms up as min(decay, (1 + s) / (10 + s)) with s the number of previous updates, as in TiTok and
TA-TiTok.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from unimm.training.loop.sharding import as_local, as_sharded, as_whole


class EMA:
    """Shadow weights of a model; the model itself is passed to each method and never stored.

    Pass the same unwrapped model (no DDP) every time: names are compared, and a model with other trainable tensors
    raises ValueError.
    """

    def __init__(self, model: nn.Module, *, decay: float = 0.999) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"The decay of an EMA lies in [0, 1) and is {decay}.")
        self.decay = decay
        self.num_updates = 0
        self.shadow = {name: tensor.detach().float().clone() for name, tensor in _trainable(model).items()}

    @property
    def current_decay(self) -> float:
        """Return the decay of the next update."""
        return min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Update shadow <- shadow + (1 - decay) (weight - shadow); call it once per optimizer step."""
        weights = self._matched(model)
        for name, tensor in weights.items():
            self.shadow[name] = as_sharded(self.shadow[name], tensor)  # once a model is sharded, its average is too
        shadows = [as_local(self.shadow[name]) for name in weights]
        new = [as_local(tensor.detach()).float() for tensor in weights.values()]
        if shadows:  # one kernel for many tensors on a GPU; on a CPU the same as one lerp_ for each
            torch._foreach_lerp_(shadows, new, 1 - self.current_decay)
        self.num_updates += 1

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Copy the averaged weights into the model permanently."""
        for name, tensor in self._matched(model).items():
            tensor.copy_(as_sharded(self.shadow[name], tensor))

    @contextmanager
    def swapped(self, model: nn.Module) -> Iterator[None]:
        """Put the averaged weights into the model inside the context; restore its own, bit for bit, even after an
        error."""
        own = {name: tensor.detach().clone() for name, tensor in self._matched(model).items()}
        self.copy_to(model)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, tensor in self._matched(model).items():
                    tensor.copy_(own[name])

    def state_dict(self) -> dict[str, Any]:
        """Return the state with unsharded tensors; call it on every process if the model is sharded."""
        shadow = {name: as_whole(tensor) for name, tensor in self.shadow.items()}
        return {"decay": self.decay, "num_updates": self.num_updates, "shadow": shadow}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a saved average. Raises ValueError if it belongs to other tensors."""
        shadow: Mapping[str, Tensor] = state["shadow"]
        _refuse_difference(self.shadow, shadow, "The saved EMA")
        for name, tensor in self.shadow.items():
            tensor.copy_(as_sharded(shadow[name], tensor))
        self.decay, self.num_updates = state["decay"], state["num_updates"]

    def _matched(self, model: nn.Module) -> dict[str, Tensor]:
        tensors = _trainable(model)
        _refuse_difference(self.shadow, tensors, "The model")
        return tensors


def _trainable(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.is_floating_point()
    }


def _refuse_difference(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], whose: str) -> None:
    if ours.keys() != theirs.keys():
        names = sorted(ours.keys() ^ theirs.keys())
        raise ValueError(
            f"{whose} has {len(theirs)} trainable tensors and this EMA averages {len(ours)}; {names[0]!r} "
            "is in one of them only. Build a new EMA when the trainable part of a model changes."
        )
    for name, tensor in ours.items():
        if tensor.shape != theirs[name].shape:
            raise ValueError(
                f"{whose} holds {name!r} with shape {tuple(theirs[name].shape)}, this EMA with {tuple(tensor.shape)}."
            )
