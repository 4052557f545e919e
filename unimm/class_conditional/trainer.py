"""`ClassConditionalTrainer`: transformers' Trainer over a stream of ids.

Special here: the stream is addressed by position, checkpoints appear whole and know which stream they belong to, so a
run resumes to the bit on the CPU; averaged weights are evaluated and saved; a loss that is not finite stops the run
before it reaches a checkpoint. The average is handed in: the arrows do not let this package see `unimm.training`.
"""

import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints

from unimm.class_conditional.ids import IdRows, IdStream
from unimm.class_conditional.modeling import ClassConditionalGPT
from unimm.errors import UserError

AVERAGE_FILE, STREAM_FILE = "ema.pt", "stream.json"


class WeightAverage(Protocol):
    """What `unimm.training.ema.EMA` is."""

    def update(self, model: nn.Module) -> None: ...

    def swapped(self, model: nn.Module) -> AbstractContextManager[None]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class UpdateAverage(TrainerCallback):
    """Move the averaged weights after every optimizer step."""

    def __init__(self, average: WeightAverage) -> None:
        self.average = average

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        self.average.update(model)


class ClassConditionalTrainer(Trainer):
    """Train `model` on a stream of ids.

    Args:
        model: the GPT.
        args: settings; samples must be taken in order (`train_sampling_strategy: sequential`).
        train_dataset, eval_dataset: the stream, and the held-out rows.
        average: makes the average of the weights, once they are on their device; it is evaluated and saved. None
            goes without.
    """

    def __init__(
        self,
        model: ClassConditionalGPT,
        args: TrainingArguments,
        *,
        train_dataset: IdStream,
        eval_dataset: IdRows,
        average: Callable[[nn.Module], WeightAverage] | None = None,
    ) -> None:
        super().__init__(model=model, args=args, train_dataset=train_dataset, eval_dataset=eval_dataset)
        self.average = None if average is None else average(model)
        if self.average is not None:
            self.add_callback(UpdateAverage(self.average))
        self._finite = torch.tensor(True, device=args.device)
        self._staging: Path | None = None

    def run(self) -> None:
        """Train to `max_steps`, from the newest checkpoint where there is one."""
        folder = Path(self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        found, done = get_last_checkpoint(str(folder)), self.done
        if found and done >= self.args.max_steps:
            self._load_from_checkpoint(found)
            self._load_average(found)
            return
        if self.is_world_process_zero():
            self.add_callback(TensorBoardCallback(SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)))
        self.train(resume_from_checkpoint=found)
        self.remove_callback(TensorBoardCallback)  # a later evaluation would open another log

    @property
    def done(self) -> int:
        """Steps of the newest checkpoint, 0 where there is none."""
        folder = Path(self.args.output_dir)
        found = get_last_checkpoint(str(folder)) if folder.is_dir() else None
        return int(found.rsplit("-", 1)[1]) if found else 0

    def averaged(self) -> AbstractContextManager[None]:
        """Within, the model holds the averaged weights, where there are any."""
        return nullcontext() if self.average is None else self.average.swapped(self.model)

    def held_out_loss(self) -> float:
        """The mean cross entropy of the held-out ids, in nats an id."""
        return self.evaluate()["eval_loss"]

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in Trainer, under the averaged weights, and eager: no shape of it is worth compiling for."""
        with self.averaged(), torch.compiler.set_stance("force_eager"):
            return super().evaluate(*args, **kwargs)

    # ---- guards ----

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | None = None) -> Tensor:
        """As in Trainer; remembers a loss that is not finite, on the device and without waiting for it."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._finite = self._finite & torch.isfinite(loss)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in Trainer, unless the run is lost."""
        self._stop_if_not_finite()
        super().log(logs, start_time)

    def _stop_if_not_finite(self) -> None:
        if not self._finite:
            raise UserError(
                f"The loss was not finite at or before step {self.state.global_step} of {self.args.max_steps}. "
                "Checkpoints written before are intact: lower train.learning_rate."
            )

    # ---- checkpoints ----

    def _stream_position(self) -> dict[str, Any]:
        """What must not change when a run goes on."""
        stream: Any = self.train_dataset
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return {
            "data.seed": stream.seed,
            "samples per step": batch,
            "train.max_steps": self.args.max_steps,
            "rows of ids": len(stream.source),
            "tokenizer": stream.source.info.tokenizer_fingerprint,
        }

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write the checkpoint under another name, then rename it: a killed run leaves whole checkpoints only."""
        self._stop_if_not_finite()
        folder, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        self._staging = folder / ".checkpoint"
        if self.args.should_save:
            shutil.rmtree(self._staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            written = self._staging / name
            (written / STREAM_FILE).write_text(json.dumps(self._stream_position()) + "\n", encoding="utf-8")
            if self.average is not None:
                torch.save(self.average.state_dict(), written / AVERAGE_FILE)
            shutil.rmtree(folder / name, ignore_errors=True)
            written.replace(folder / name)
            shutil.rmtree(self._staging)
            rotate_checkpoints(str(folder), self.args.save_total_limit, use_mtime=True)
        self._staging = None
        self.accelerator.wait_for_everyone()

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or super()._get_output_dir(trial))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        saved = json.loads((Path(checkpoint) / STREAM_FILE).read_text(encoding="utf-8"))
        for key, value in self._stream_position().items():
            if saved[key] != value:
                raise UserError(
                    f"{checkpoint} was written with {key} {saved[key]}, now it is {value}: go on with the old value, "
                    "or choose another train.output_dir to start again."
                )
        self._load_average(checkpoint)

    def _load_average(self, checkpoint: str) -> None:
        if self.average is not None:
            path = Path(checkpoint) / AVERAGE_FILE
            self.average.load_state_dict(torch.load(path, map_location=self.args.device, weights_only=True))
