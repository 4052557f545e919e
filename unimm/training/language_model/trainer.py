"""Trainer of the host, the language model whose vision tower is a frozen image tokenizer.

- A batch is {flow: tensors}, a flow being one kind of training data. The loss is the weighted sum of the flows' means
  over labeled tokens, counted over the whole batch (all processes and accumulation steps); each mean is logged.
- Images to generate are tokenized on the fly, in fp32, by the model's own `get_image_tokens`, or arrive as ids.
- Logits are computed at labeled positions only: the head is as wide as text vocabulary and codebook together.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from torch.utils.tensorboard import SummaryWriter
from transformers import PreTrainedModel

from unimm.data.text.collators import IGNORED
from unimm.errors import UserError
from unimm.saving import save_whole
from unimm.training.language_model.adapters import PROJECTOR, Adapter
from unimm.training.language_model.callbacks import DrawPanel, Panel
from unimm.training.language_model.new_rows import NewRowsWarmup
from unimm.training.loop.arguments import HostTrainingArguments
from unimm.training.loop.optimizers import MuonAdamW, muon_groups
from unimm.training.loop.sharding import check_strategy, set_up_plugin, weights_to_save
from unimm.training.loop.stream_trainer import StreamTrainer
from unimm.training.loop.throughput import HostCost, Work
from unimm.training.tokenizer.parameters import host_parameter_groups, learning_blocks

Batch = dict[str, dict[str, Tensor]]
PACKABLE_ATTENTION = ("sdpa", "eager")


def check_packing(model: PreTrainedModel) -> None:
    """Raise UserError if several sequences cannot share a row: multi-dimensional positions, or an attention
    implementation that has not been tested against unpacked rows."""
    attention = model.config.get_text_config()._attn_implementation
    if not model.positions_are_1d or attention not in PACKABLE_ATTENTION:
        raise UserError(
            f"A {model.config.model_type} model with attn_implementation {attention!r} cannot be packed: packing needs "
            f"positions in one dimension and {' or '.join(PACKABLE_ATTENTION)}; leave train.pack_length out."
        )


class HostTrainer(StreamTrainer):
    """Train `model` (everything but its vision tower) on weighted flows of samples.

    Args:
        model: a unified model, with `image_tokenizer`, `get_image_tokens` and a stock forward.
        args: settings; `ema_decay` adds averaged weights, which are evaluated and saved in the output folder.
        processor: saved beside the model.
        data_collator: collates samples into a batch, see `unimm.data.text.collators`.
        flow_weights: {flow: factor of its mean loss}.
        stream_seed: seed of the training stream, for messages and for refusing a checkpoint of another stream.
        unigram_entropies: {flow: entropy of its ids' frequencies}, logged beside its loss.
        adapter: the LoRA adapter inside `model`, trained instead of it; the run saves the adapter alone.
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
        unigram_entropies: Mapping[str, float] | None = None,
        panel: Panel | None = None,
        adapter: Adapter | None = None,
    ) -> None:
        if args.pack_length is not None:
            check_packing(model)
        model.image_tokenizer.requires_grad_(False)  # DDP needs it too: the decoder takes no part in a forward
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processor,
            stream_seed=stream_seed,
        )
        self.new_rows = NewRowsWarmup(model, args.new_rows_warmup_steps) if args.new_rows_warmup_steps else None
        whole_only = "train.new_rows_warmup_steps" if self.new_rows else "lora" if adapter else None
        if args.use_muon:
            whole_only = "train.use_muon"  # a matrix is made orthogonal as a whole
        check_strategy(self.is_fsdp_enabled, self.is_deepspeed_enabled, sharded_by_trainer=True, whole_only=whole_only)
        if self.is_fsdp_enabled:
            set_up_plugin(self.accelerator.state.fsdp_plugin, model)
        self.flow_weights = dict(sorted(flow_weights.items()))
        self._projector_learns = any(p.requires_grad for p in model.model.multi_modal_projector.parameters())
        self.unigram_entropies = dict(unigram_entropies or {})
        self.panel, self.adapter = panel, adapter
        if args.compile_blocks:
            blocks = learning_blocks(model)
            # every block may need several variants; beyond the limit torch silently falls back to eager
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 8 * len(blocks))
            for block in blocks:
                block.compile(dynamic=True)
        self._cost: HostCost | None = None
        self._saw_images, self._held = torch.zeros((), device=args.device), False
        self._sums = {mode: torch.zeros(len(self.flow_weights), 2, device=args.device) for mode in ("train", "eval")}

    # ---- the run ----

    def run(self) -> None:
        """Train to `max_steps`, resuming from the newest checkpoint; save model and processor in `output_dir`."""
        self.train_or_load()
        with self.averaged():
            weights = weights_to_save(self)
            if self.is_world_process_zero():
                save_whole(Path(self.args.output_dir), self.adapter or self.model, self.processing_class, weights)

    def add_writer(self, writer: SummaryWriter) -> None:
        """Log scalars and the panel to tensorboard."""
        super().add_writer(writer)
        if self.panel is not None:
            self.add_callback(DrawPanel(self.panel, writer))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create Trainer's optimizer, with groups for the projector if it has its own learning rate and for the
        embedding tables of a warm-up; with `use_muon`, Muon updates the blocks' matrices."""
        args = self.args
        own = args.use_muon or args.projector_learning_rate is not None or self.new_rows is not None
        if not own or self.optimizer is not None:
            return super().create_optimizer(model)
        groups = host_parameter_groups(
            self.model,
            set(self.get_decay_parameter_names(self.model)),
            weight_decay=args.weight_decay,
            projector_learning_rate=args.projector_learning_rate,
            tables=self.new_rows.tables if self.new_rows is not None else (),
        )
        adamw, options = self.get_optimizer_cls_and_kwargs(args, self.model)
        if args.use_muon:
            self.optimizer = MuonAdamW(muon_groups(learning_blocks(self.model), groups), **options)
        else:
            self.optimizer = adamw(groups, **options)
        return self.optimizer

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | None = None) -> Tensor:
        """Run Trainer's step; during a warm-up, keep the gradients of the new rows only."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.new_rows is not None:
            step, decay = self.state.global_step, self.args.weight_decay
            self.new_rows.hold(self.model.parameters(), self.optimizer, step, decay)
        return loss

    # ---- the loss ----

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> Tensor:
        """Count the labeled tokens of every flow [F], over all accumulation steps and processes."""
        counts = torch.zeros(len(self.flow_weights))
        for batch in batch_samples:
            if self.args.world_size > 1 and batch.keys() != self.flow_weights.keys():
                raise UserError(
                    f"A batch of {self.args.train_batch_size} samples holds {len(batch)} of {len(self.flow_weights)} "
                    "flows; with several processes each needs all: raise train.per_device_train_batch_size."
                )
            for k, flow in enumerate(self.flow_weights):
                if flow in batch:
                    counts[k] += len(batch[flow]["labels_at"])
        return self.accelerator.reduce(counts.to(device, non_blocking=True), "sum")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """Compute the weighted sum of the flows' means; `num_items_in_batch` [F] are the tokens of each mean."""
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
                sums[k] += torch.stack([total.detach(), total.new_full((), count)])
        seen = any("pixel_values" in batch for batch in inputs.values())
        if model.training:
            self._saw_images += seen
            self._held |= self.new_rows is not None and self.state.global_step < self.new_rows.steps
        if model.training and not seen and self._projector_learns:
            loss = loss + self._no_image()
        loss = loss * self.args.world_size  # DDP divides the gradients by it; the counts above are global already
        return (loss, {}) if return_outputs else loss

    def _no_image(self) -> Tensor:
        """Return a zero that depends on the projector, for batches without input images.

        Without it, DDP would wait for the projector's gradients on other processes, and a run that trains nothing else
        would have no gradient. A single process adds it too: AdamW moves a weight whose gradient is zero but skips one
        whose gradient is None, and results must not depend on the number of processes.
        """
        size = self.model.image_tokenizer.config.image_size
        black = torch.zeros(1, 3, size, size, device=self.args.device, dtype=self.model.dtype)
        with self.accelerator.autocast():
            features = self.model.get_image_features(black, return_dict=True).pooler_output
        return 0.0 * features[0].float().sum()

    def _flow_loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        """Return the (weighted) sum of the cross entropy over a batch's labels, and the number of labels."""
        batch = dict(batch)
        drawn, labels, where = batch.pop("drawn"), batch.pop("labels"), batch.pop("labels_at")
        weights = batch.pop("label_weights", None)
        drawings, ids = batch.pop("drawn_pixel_values", None), batch.pop("drawn_ids", None)
        if drawings is not None or ids is not None:
            # the folder checks its ids, row by row: to check them here would make the host wait for the device
            token_ids = self._image_tokens(drawings) if ids is None else self.model.visual_vocabulary.base + ids
            batch["input_ids"] = batch["input_ids"].masked_scatter(drawn, token_ids)
            labels = labels.masked_scatter(drawn, token_ids)
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten().index_select(0, where)
        inputs = {**batch, "logits_at": where, "vocabulary": "all", "use_cache": False}
        if len(where) * self.model.visual_vocabulary.end > self.model.logits_at_once:
            losses = model(**inputs, targets=targets).loss  # [n]
            return (losses if weights is None else weights * losses).sum(), len(where)
        logits = model(**inputs).logits  # [n, V]
        if weights is None:
            return F.cross_entropy(logits.float(), targets, reduction="sum"), len(where)
        return (weights * F.cross_entropy(logits.float(), targets, reduction="none")).sum(), len(where)

    @torch.no_grad()
    def _image_tokens(self, pixel_values: Tensor) -> Tensor:
        """Tokenize images to token ids [I, M], in fp32: bfloat16 flips about one id in a hundred."""
        with torch.autocast(pixel_values.device.type, enabled=False):
            return self.model.get_image_tokens(pixel_values)

    def prediction_step(
        self, model: nn.Module, inputs: Batch, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, None, None]:
        """Return the loss only; `log` adds the flows' own means."""
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    # ---- logs ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as Trainer does, with each flow's mean loss since the last call."""
        prefix = "eval_" if any(name.startswith("eval_") for name in logs) else ""
        sums = self._sums["eval" if prefix else "train"]
        means = self.accelerator.reduce(sums.clone(), "sum").tolist()
        sums.zero_()
        for flow, (total, count) in zip(self.flow_weights, means, strict=True):
            if count:
                logs = {**logs, f"{prefix}loss_{flow}": total / count}
                if flow in self.unigram_entropies:
                    logs[f"{prefix}unigram_entropy_{flow}"] = self.unigram_entropies[flow]
        super().log(logs, start_time)

    def resting_parts(self) -> set[str]:
        """Return the projector if no image was seen since the last log line, or only the new rows were training."""
        saw, held = self.accelerator.reduce(self._saw_images.clone(), "sum"), self._held
        self._saw_images, self._held = torch.zeros_like(self._saw_images), False
        return {f"model.{PROJECTOR}"} if held or not saw else set()

    def work_of(self, inputs: Batch) -> Work:
        """Return the tokens, images and FLOPs of all flows of a micro-batch."""
        self._cost = self._cost or HostCost(self.model)
        return sum(map(self._cost.of, inputs.values()), Work())

    def floating_point_ops(self, inputs: Batch) -> int:
        """Return 0: Trainer's estimate would walk over all parameters at every step."""
        return 0

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save as Trainer does, or only the adapter if there is one."""
        if self.adapter is None:
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            self.adapter.save_pretrained(output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load weights with `from_pretrained`: a composed model's saved names differ from its modules' names, and
        Trainer's own loading would skip them with a mere warning."""
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        if self.adapter is not None:
            self.adapter.load(resume_from_checkpoint)
            return
        saved = type(self.model).from_pretrained(resume_from_checkpoint, dtype=self.model.dtype)
        self.model.load_state_dict(saved.state_dict())
