"""`StreamTrainer`: transformers' Trainer over a seeded stream of samples.

Special here: the stream is addressed by position, checkpoints appear whole and know which stream they belong to, so a
run resumes to the bit on the CPU; averaged weights are evaluated and saved; a loss that is not finite stops the run,
with the numbers of its samples, before it reaches a checkpoint.
"""

import json
import shutil
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from transformers import PreTrainedModel, Trainer
from transformers.integrations import TensorBoardCallback
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints
from transformers.utils import logging

from unimm.errors import UserError
from unimm.training.arguments import HostTrainingArguments
from unimm.training.ema import EMA
from unimm.training.host_callbacks import UpdateEMA

logger = logging.get_logger(__name__)

EMA_FILE, STREAM_FILE = "ema.pt", "stream.json"


class StreamTrainer(Trainer):
    """Train `model` on a stream.

    Args:
        model: what is trained.
        args: settings; `ema_decay` adds averaged weights.
        stream_seed: of the training stream, for messages and for refusing a checkpoint of another stream.
        parts: of Trainer (data sets, collator, ...).
    """

    def __init__(
        self, model: PreTrainedModel, args: HostTrainingArguments, *, stream_seed: int = 0, **parts: Any
    ) -> None:
        super().__init__(model=model, args=args, **parts)
        self.stream_seed = stream_seed
        self.ema = None if args.ema_decay is None else EMA(model, decay=args.ema_decay)
        if self.ema is not None:
            self.add_callback(UpdateEMA(self.ema))
        self._bad_step = torch.tensor(-1, device=args.device)
        self._staging: Path | None = None

    # ---- the run ----

    def train_or_load(self) -> None:
        """Train to `max_steps` from the newest checkpoint, or read that one where the run was over."""
        folder = Path(self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        found, done = get_last_checkpoint(str(folder)), self.done
        if found and done >= self.args.max_steps:
            self._load_from_checkpoint(found)
            self._load_ema(found)
            return
        if self.is_world_process_zero():
            self.add_writer(SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1))
        self.train(resume_from_checkpoint=found)
        self.remove_callback(TensorBoardCallback)  # a later evaluation would open another log

    @property
    def done(self) -> int:
        """Steps of the newest checkpoint, 0 where there is none."""
        folder = Path(self.args.output_dir)
        found = get_last_checkpoint(str(folder)) if folder.is_dir() else None
        return int(found.rsplit("-", 1)[1]) if found else 0

    def add_writer(self, writer: SummaryWriter) -> None:
        """Log to tensorboard."""
        self.add_callback(TensorBoardCallback(writer))

    def averaged(self) -> AbstractContextManager[None]:
        """Within, the model holds the averaged weights, where there are any."""
        return nullcontext() if self.ema is None else self.ema.swapped(self.model)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in Trainer, under the averaged weights where there are any, and eager: no shape is worth compiling for."""
        with self.averaged(), torch.compiler.set_stance("force_eager"):
            return super().evaluate(*args, **kwargs)

    # ---- guards ----

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | None = None) -> Tensor:
        """As in Trainer; keeps the first step whose loss is not finite, on the device and without waiting for it."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        first = ~torch.isfinite(loss) & (self._bad_step < 0)
        self._bad_step = torch.where(first, self.state.global_step, self._bad_step)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in Trainer, unless the run is lost."""
        self._stop_if_not_finite()
        super().log(logs, start_time)

    def _stop_if_not_finite(self) -> None:
        step, size = int(self._bad_step), self.args.samples_per_step
        if step >= 0:
            raise UserError(
                f"The loss of step {step + 1} is not finite; its batch holds the samples {step * size} to "
                f"{(step + 1) * size - 1} of the stream with data.seed {self.stream_seed}. Checkpoints written before "
                "are intact: lower train.learning_rate or look at the samples."
            )

    # ---- checkpoints ----

    def _stream_position(self) -> dict[str, Any]:
        """What must not change when a run goes on, and the thread count, on which the last bits depend."""
        return {
            "data.seed": self.stream_seed,
            "samples per step": self.args.samples_per_step,
            "train.max_steps": self.args.max_steps,
            "threads": torch.get_num_threads(),
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
            if self.ema is not None:
                torch.save(self.ema.state_dict(), written / EMA_FILE)
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
        now = self._stream_position()
        if saved.pop("threads") != now.pop("threads"):
            logger.warning("The run goes on with another number of threads: it will not be equal to the last bit.")
        for key, value in now.items():
            if saved[key] != value:
                raise UserError(
                    f"{checkpoint} was written with {key} {saved[key]}, now it is {value}: go on with the old value, "
                    "or choose another train.output_dir to start again."
                )
        self._load_ema(checkpoint)

    def _load_ema(self, checkpoint: str) -> None:
        if self.ema is not None:
            state = torch.load(Path(checkpoint) / EMA_FILE, map_location=self.args.device, weights_only=True)
            self.ema.load_state_dict(state)
