"""What happens beside the steps of a `StreamTrainer`: averaged weights, signals, and panels of drawings."""

from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerCallback

from unimm.training.loop.ema import EMA
from unimm.training.loop.interruption import Interruption
from unimm.training.loop.rng import preserve_rng_state
from unimm.training.loop.standstill import StandstillGuard

Panel = Callable[[SummaryWriter, int], None]
"""Writes images or text of the model as it is at a step."""


class UpdateEMA(TrainerCallback):
    """Move the averaged weights after every optimizer step."""

    def __init__(self, ema: EMA) -> None:
        self.ema = ema

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        self.ema.update(model)


class WatchMovement(TrainerCallback):
    """Tell the guard of every optimizer step; it is made at the first one, when the model is prepared."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.guard: StandstillGuard | None = None

    def on_step_begin(
        self, args: Any, state: Any, control: Any, *, model: nn.Module, optimizer: Any, **kwargs: Any
    ) -> None:
        self.guard = self.guard or StandstillGuard(model, optimizer)
        self.guard.begin_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.guard is not None and self.accelerator.optimizer_step_was_skipped:
            self.guard.skip_step()


class StopOnSignal(TrainerCallback):
    """End the run after a step, with a checkpoint, when any of its processes got a signal."""

    def __init__(self, interruption: Interruption, accelerator: Accelerator) -> None:
        self.interruption, self.accelerator = interruption, accelerator
        self.stopped = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.interruption.agreed(self.accelerator):
            self.stopped = control.should_save = control.should_training_stop = True


class DrawPanel(TrainerCallback):
    """Call the panel after every evaluation; it may draw random numbers without changing what is trained."""

    def __init__(self, panel: Panel, writer: SummaryWriter) -> None:
        self.panel = panel
        self.writer = writer

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with preserve_rng_state(args.device):
            self.panel(self.writer, state.global_step)
