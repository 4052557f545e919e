"""`HostTrainer`: transformers' Trainer for a language model whose vision tower is a frozen image tokenizer.

Special here:
- a batch is {flow: tensors}; the loss is the weighted sum over the flows of their mean over labelled tokens, counted
  over the whole batch (all processes and accumulation steps), and every flow's own mean is logged;
- drawn pictures become image ids on the fly, in fp32, by the model's own `get_image_tokens`;
- the head is computed at labelled positions only: it is as wide as text and codebook together;
- runs resume to the bit on the CPU: the stream is addressed by position, checkpoints appear whole, and a checkpoint of
  another stream is refused. A loss that is not finite stops the run, with the numbers of its samples, before it
  reaches a checkpoint.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from torch.utils.tensorboard import SummaryWriter
from transformers import PreTrainedModel, Trainer
from transformers.integrations import TensorBoardCallback
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints
from transformers.utils import logging

from unimm.data.collators import IGNORED
from unimm.errors import UserError
from unimm.saving import save_whole
from unimm.training.arguments import HostTrainingArguments
from unimm.training.ema import EMA
from unimm.training.host_callbacks import DrawPanel, Panel, UpdateEMA
from unimm.training.optimizers import MuonAdamW, muon_groups

logger = logging.get_logger(__name__)

EMA_FILE, STREAM_FILE = "ema.pt", "stream.json"
Batch = dict[str, dict[str, Tensor]]


def learning_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The repeated blocks that learn: the language model's, where the tower is frozen."""
    names = set(model._no_split_modules or ())
    return [
        block
        for block in model.modules()
        if type(block).__name__ in names and any(p.requires_grad for p in block.parameters())
    ]


class HostTrainer(Trainer):
    """Train `model` (everything but its tower) on flows of samples.

    Args:
        model: a unified model: `image_tokenizer`, `get_image_tokens`, and a stock forward.
        args: settings; `ema_decay` adds averaged weights, which are evaluated and saved in the output folder.
        processor: saved beside the model.
        data_collator: samples to a batch, see `unimm.data.collators`.
        flow_weights: {flow: factor of its mean loss}.
        stream_seed: of the training stream, for messages and for refusing a checkpoint of another stream.
        panel: called with the tensorboard writer and the step at every evaluation, under the averaged weights.
    """

    loss_is_scaled_for_ga = True
    optimizer: torch.optim.Optimizer | None

    def __init__(
        self,
        model: PreTrainedModel,
        args: HostTrainingArguments,
        *,
        processor: Any,
        data_collator: Callable[[list[dict[str, Any]]], Batch],
        train_dataset: Dataset,
        eval_dataset: Dataset | None = None,
        flow_weights: Mapping[str, float],
        stream_seed: int = 0,
        panel: Panel | None = None,
    ) -> None:
        model.image_tokenizer.requires_grad_(False)  # DDP needs it too: the drawing half takes no part in a forward
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processor,
        )
        self.flow_weights = dict(sorted(flow_weights.items()))
        self.stream_seed = stream_seed
        self.panel = panel
        self.ema = None if args.ema_decay is None else EMA(model, decay=args.ema_decay)
        if self.ema is not None:
            self.add_callback(UpdateEMA(self.ema))
        if args.compile_blocks:
            blocks = learning_blocks(model)
            # every block may need several variants; beyond the limit torch falls back to eager without a word
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 8 * len(blocks))
            for block in blocks:
                block.compile(dynamic=True)
        self._sums = {mode: torch.zeros(len(self.flow_weights), 2, device=args.device) for mode in ("train", "eval")}
        self._bad_step = torch.tensor(-1, device=args.device)
        self._staging: Path | None = None

    # ---- the run ----

    def run(self) -> None:
        """Train to `max_steps`, from its newest checkpoint; save model and processor in `output_dir`."""
        folder = Path(self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        found = get_last_checkpoint(str(folder))
        done = int(found.rsplit("-", 1)[1]) if found else 0
        if found and done >= self.args.max_steps:
            self._load_from_checkpoint(found)
            self._load_ema(found)
        else:
            self._add_tensorboard(folder, done)
            self.train(resume_from_checkpoint=found)
        if self.is_world_process_zero():
            with self._averaged_weights():
                save_whole(folder, self.model, self.processing_class)

    def _add_tensorboard(self, folder: Path, done: int) -> None:
        if not self.is_world_process_zero():
            return
        writer = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)
        self.add_callback(TensorBoardCallback(writer))
        if self.panel is not None:
            self.add_callback(DrawPanel(self.panel, writer))

    def _averaged_weights(self) -> AbstractContextManager[None]:
        return nullcontext() if self.ema is None else self.ema.swapped(self.model)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As in Trainer; with `use_muon` the blocks' matrices are Muon's."""
        if not self.args.use_muon or self.optimizer is not None:
            return super().create_optimizer(model)
        decayed = set(self.get_decay_parameter_names(self.model))
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        groups = [
            {"params": [p for name, p in named if name in decayed], "weight_decay": self.args.weight_decay},
            {"params": [p for name, p in named if name not in decayed], "weight_decay": 0.0},
        ]
        _, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        self.optimizer = MuonAdamW(muon_groups(learning_blocks(self.model), groups), **options)
        return self.optimizer

    # ---- the loss ----

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> Tensor:
        """Labelled tokens of every flow [F], over all accumulation steps and processes."""
        counts = torch.zeros(len(self.flow_weights))
        for batch in batch_samples:
            if self.args.world_size > 1 and batch.keys() != self.flow_weights.keys():
                raise UserError(
                    f"A batch of {self.args.train_batch_size} samples holds {len(batch)} of {len(self.flow_weights)} "
                    "flows; with several processes each needs all: raise train.per_device_train_batch_size."
                )
            for k, flow in enumerate(self.flow_weights):
                if flow in batch:
                    counts[k] += int((batch[flow]["labels"][:, 1:] != IGNORED).sum())
        return self.accelerator.reduce(counts.to(device), "sum")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """The weighted sum of the flows' means; `num_items_in_batch` [F] are the tokens that each mean goes over."""
        counts = num_items_in_batch
        if counts is None:
            counts = self._get_num_items_in_batch([inputs], self.args.device)
        sums = self._sums["train" if model.training else "eval"]
        self.model.image_tokenizer.eval()  # Trainer puts the whole model into training mode
        loss = torch.zeros((), device=self.args.device)
        for k, (flow, weight) in enumerate(self.flow_weights.items()):
            if flow in inputs:
                total, count = self._flow_loss(model, inputs[flow])
                loss = loss + weight * total / counts[k].clamp_min(1)
                sums[k] += torch.stack([total.detach(), total.new_tensor(count)])
        loss = loss * self.args.world_size  # DDP divides the gradients by it; the counts above are global already
        return (loss, {}) if return_outputs else loss

    def _flow_loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        """Sum of the cross entropy over a batch's labels, and their number."""
        batch = dict(batch)
        drawn, labels, drawings = batch.pop("drawn"), batch.pop("labels"), batch.pop("drawn_pixel_values", None)
        # before the forward is queued, when waiting for the device costs nothing yet
        where = (labels[:, 1:] != IGNORED).flatten().nonzero()[:, 0]
        if drawings is not None:
            token_ids = self._image_tokens(drawings)
            batch["input_ids"] = batch["input_ids"].masked_scatter(drawn, token_ids)
            labels = labels.masked_scatter(drawn, token_ids)
        outputs = model(**batch, output_hidden_states=True, logits_to_keep=1, use_cache=False)
        hidden = outputs.hidden_states[-1][:, :-1].flatten(0, 1).index_select(0, where)  # [n, D]
        with self.accelerator.autocast():
            logits = self.model.get_output_embeddings()(hidden)  # [n, V]
        targets = labels[:, 1:].flatten().index_select(0, where)
        return F.cross_entropy(logits.float(), targets, reduction="sum"), len(where)

    @torch.no_grad()
    def _image_tokens(self, pixel_values: Tensor) -> Tensor:
        """token_ids [I, M]; in fp32, because bfloat16 flips about one id in a hundred."""
        with torch.autocast(pixel_values.device.type, enabled=False):
            return self.model.get_image_tokens(pixel_values)

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Tensor | None = None) -> Tensor:
        """As in Trainer; keeps the first step whose loss is not finite, on the device and without waiting for it."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        first = ~torch.isfinite(loss) & (self._bad_step < 0)
        self._bad_step = torch.where(first, self.state.global_step, self._bad_step)
        return loss

    def prediction_step(
        self, model: nn.Module, inputs: Batch, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, None, None]:
        """The loss alone; the flows' own means are added by `log`."""
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in Trainer, under the averaged weights where there are any, and eager: no shape is worth compiling for."""
        with self._averaged_weights(), torch.compiler.set_stance("force_eager"):
            return super().evaluate(*args, **kwargs)

    # ---- logs and guards ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in Trainer, with every flow's mean loss since the last time."""
        self._stop_if_not_finite()
        prefix = "eval_" if any(name.startswith("eval_") for name in logs) else ""
        sums = self._sums["eval" if prefix else "train"]
        means = self.accelerator.reduce(sums.clone(), "sum").tolist()
        sums.zero_()
        for flow, (total, count) in zip(self.flow_weights, means, strict=True):
            if count:
                logs = {**logs, f"{prefix}loss_{flow}": total / count}
        super().log(logs, start_time)

    def _samples_per_step(self) -> int:
        return self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size

    def _stop_if_not_finite(self) -> None:
        step, size = int(self._bad_step), self._samples_per_step()
        if step >= 0:
            raise UserError(
                f"The loss of step {step + 1} is not finite; its batch holds the samples {step * size} to "
                f"{(step + 1) * size - 1} of the stream with data.seed {self.stream_seed}. Checkpoints written before "
                "are intact: lower train.learning_rate or look at the samples."
            )

    def floating_point_ops(self, inputs: Batch) -> int:
        """Not counted: the estimate walks over all parameters at every step."""
        return 0

    # ---- checkpoints ----

    def _stream_position(self) -> dict[str, int]:
        """What must not change when a run goes on, and the thread count, on which the last bits depend."""
        return {
            "data.seed": self.stream_seed,
            "samples per step": self._samples_per_step(),
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

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Through `from_pretrained`: a composed model saves under other names than its modules have, and Trainer's own
        loading would only warn about each of them."""
        saved = type(self.model).from_pretrained(resume_from_checkpoint, dtype=self.model.dtype)
        self.model.load_state_dict(saved.state_dict())

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
