"""`StreamTrainer`: transformers' Trainer over a seeded stream of samples.

- The stream is addressed by position and checkpoints are written atomically, so a resumed run is bit-identical on the
  CPU.
- A signal ends the run after a step, with a checkpoint.
- Averaged weights (EMA) are evaluated and saved.
- A non-finite loss stops the run before it reaches a checkpoint, with the positions of its samples.
"""

import shutil
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from transformers import Trainer
from transformers.integrations import TensorBoardCallback

from unimm.errors import UserError
from unimm.runs.processes import refuse_together
from unimm.training.language_model.callbacks import StopOnSignal, UpdateEMA, WatchMovement
from unimm.training.loop.arguments import StreamTrainingArguments
from unimm.training.loop.checkpoint import (
    bytes_of,
    checkpoints,
    clear_leftovers,
    model_bytes,
    optimizer_bytes,
    publish,
    require_space,
    staging_folder,
    step_of,
)
from unimm.training.loop.ema import EMA
from unimm.training.loop.global_batch import micro_batch
from unimm.training.loop.interruption import Interruption
from unimm.training.loop.rng import preserve_rng_state
from unimm.training.loop.sharding import refuse_average
from unimm.training.loop.throughput import Meter, Work

EMA_FILE = "ema.pt"


class StreamTrainer(Trainer):
    """Train `model` on a stream; recipes call it inside `open_run`.

    Args:
        model: the model to train.
        args: settings; `ema_decay` adds averaged weights.
        stream_seed: seed of the training stream, for messages.
        parts: further arguments of Trainer (data sets, collator, ...).
    """

    def __init__(self, model: nn.Module, args: StreamTrainingArguments, *, stream_seed: int = 0, **parts: Any) -> None:
        super().__init__(model=model, args=args, **parts)
        self.stream_seed = stream_seed
        if args.ema_decay is not None and self.is_deepspeed_enabled:
            refuse_average(self.accelerator.state.deepspeed_plugin.zero_stage)
        self.ema = None if args.ema_decay is None else EMA(model, decay=args.ema_decay)
        if self.ema is not None:
            self.add_callback(UpdateEMA(self.ema))
        self.movement = WatchMovement(self.accelerator)
        if not self.is_deepspeed_enabled:  # which holds its own copy of the weights that it updates
            self.add_callback(self.movement)
        self.meter = Meter(self.accelerator)
        self.window: list[Any] = []
        self._micro_batch = -1
        self._bad_step = torch.tensor(-1, device=args.device)
        self._staging: Path | None = None

    # ---- the run ----

    def train_or_load(self) -> None:
        """Train to `max_steps`, resuming from the newest checkpoint; only load that one if the run was finished.

        Raises:
            Interrupted: a signal ended the run after a step; its checkpoint is written.
        """
        folder = Path(self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        found = str(checkpoints(folder)[-1]) if self.done else None
        if found and self.done >= self.args.max_steps:
            self._load_from_checkpoint(found)
            self._load_ema(found)
            return
        if self.is_world_process_zero():
            clear_leftovers(folder)
            self.add_writer(SummaryWriter(str(folder / "tensorboard"), purge_step=self.done + 1))
        with Interruption() as interruption:
            stop = StopOnSignal(interruption, self.accelerator)
            self.add_callback(stop)
            self._forget_evaluation()
            self.meter.restart()
            self.train(resume_from_checkpoint=found)
            self.remove_callback(stop)
        self.remove_callback(TensorBoardCallback)  # a later evaluation would open another log
        if self.state.global_step < self.args.max_steps and stop.stopped:
            raise interruption.final_log_line(checkpoints(folder)[-1], self.state.global_step, self.args.max_steps)

    def _forget_evaluation(self) -> None:
        """Reset what an evaluation before training has prepared.

        It marks the model as prepared, and accelerate prepares nothing twice: without this reset, training would skip
        the DDP wrapper, and the processes would silently diverge.
        """
        if getattr(self.model, "_is_accelerate_prepared", False):
            self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
            self.model._is_accelerate_prepared = False
            self.accelerator._models.clear()
            self.model_wrapped = self.model

    @property
    def done(self) -> int:
        """Return the step of the newest checkpoint, 0 if there is none."""
        found = checkpoints(Path(self.args.output_dir))
        return step_of(found[-1]) if found else 0

    def add_writer(self, writer: SummaryWriter) -> None:
        """Log to tensorboard."""
        self.add_callback(TensorBoardCallback(writer))

    def averaged(self) -> AbstractContextManager[None]:
        """Return a context in which the model holds the averaged weights, if there are any."""
        return nullcontext() if self.ema is None else self.ema.swapped(self.model)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate as Trainer does, with the averaged weights if there are any, without compilation (an evaluation is
        too short for it), and without changing the random numbers of later steps."""
        eager = torch.compiler.set_stance("force_eager")
        with self.averaged(), eager, preserve_rng_state(self.args.device), self.meter.paused():
            return super().evaluate(*args, **kwargs)

    # ---- guards ----

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | None = None) -> Tensor:
        """Run Trainer's step and remember the first one with a non-finite loss, on the device to avoid a sync."""
        self._micro_batch += 1
        with micro_batch(self._micro_batch, len(self.window)):
            loss = super().training_step(model, inputs, num_items_in_batch)
        self.meter.add(self.work_of(inputs))
        first = ~torch.isfinite(loss) & (self._bad_step < 0)
        self._bad_step = torch.where(first, self.state.global_step, self._bad_step)
        return loss

    def get_batch_samples(self, *args: Any) -> tuple[list[Any], Any]:
        """Return Trainer's micro-batches of the step, and keep them as `window`."""
        self.window, count = super().get_batch_samples(*args)
        self._micro_batch = -1
        return self.window, count

    def work_of(self, inputs: Any) -> Work:
        """Return the work of a micro-batch, for the throughput in the log; subclasses count more than images."""
        return Work(images=len(inputs["pixel_values"]) if "pixel_values" in inputs else 0)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as Trainer does, with the throughput. Raises UserError after a non-finite loss or if a part stands
        still."""
        self._stop_if_not_finite()
        if "loss" in logs:
            if self.movement.guard is not None:
                self.movement.guard.check(self.state.global_step, self.resting_parts())
            logs = logs | self.meter.read(self.state.global_step * self.args.samples_per_step)
        super().log(logs, start_time)

    def resting_parts(self) -> set[str]:
        """Return the parts that had no reason to change since the last log line; called on every process."""
        return set()

    def _stop_if_not_finite(self) -> None:
        step, size = int(self._bad_step), self.args.samples_per_step
        if step >= 0:
            raise UserError(
                f"The loss of step {step + 1} is not finite; its batch holds the samples {step * size} to "
                f"{(step + 1) * size - 1} of the stream with data.seed {self.stream_seed}. Checkpoints written before "
                "are intact: lower train.learning_rate or look at the samples."
            )

    # ---- checkpoints ----

    def create_optimizer_and_scheduler(self, num_training_steps: int) -> None:
        """Create them as Trainer does, then raise UserError if the run's checkpoints will not fit on the disk."""
        super().create_optimizer_and_scheduler(num_training_steps)
        if self.args.save_strategy != "no":
            kept = self.args.save_total_limit or 1
            present = len(checkpoints(Path(self.args.output_dir)))
            self._require_space(max(1, kept + 1 - present), extra=model_bytes(self.model))

    def _require_space(self, copies: int, *, extra: int = 0) -> None:
        size = model_bytes(self.model) + optimizer_bytes(self.optimizer)
        size += bytes_of(self.ema.shadow.values()) if self.ema is not None else 0
        refuse_together(lambda: require_space(Path(self.args.output_dir), size, copies, extra))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write the checkpoint under a temporary name, then rename it: a killed run leaves only complete ones."""
        self._stop_if_not_finite()
        folder, step = Path(self.args.output_dir), self.state.global_step
        if step == self.done:
            return
        with self.meter.paused():
            self._write_checkpoint(folder, step, model, trial)

    def _write_checkpoint(self, folder: Path, step: int, model: nn.Module, trial: Any) -> None:
        self._require_space(copies=1)
        self._staging = staging_folder(folder, step)
        if self.args.should_save:
            shutil.rmtree(self._staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        average = None if self.ema is None else self.ema.state_dict()  # on every process: shards are gathered
        if self.args.should_save:
            written = self._staging / f"checkpoint-{step}"  # Trainer's name for it, inside `_get_output_dir`
            if average is not None:
                torch.save(average, written / EMA_FILE)
            publish(written, folder, step, self.args.save_total_limit)
            shutil.rmtree(self._staging)
        self._staging = None
        self.accelerator.wait_for_everyone()

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or super()._get_output_dir(trial))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._load_ema(checkpoint)

    def _load_ema(self, checkpoint: str) -> None:
        if self.ema is not None:
            state = torch.load(Path(checkpoint) / EMA_FILE, map_location=self.args.device, weights_only=True)
            self.ema.load_state_dict(state)
