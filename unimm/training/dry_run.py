"""`--dry-run`: print what a run would train and its memory, time and disk, and show one batch, without training.

Memory and time are measured on a few real steps of the recipe, on this device, within seconds: one micro-batch per
step, without compilation, on a CPU with few samples (two in the first step, which warms up). The time of a full step
is extrapolated from the passes of its micro-batches and the rest of a step (clipping, optimizer, averaging). Nothing
is saved but one image or HTML page in the output folder.
"""

import copy
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import TrainerCallback

from unimm.data.image_files import save_image_atomically
from unimm.runs.processes import processes
from unimm.training.language_model.label_mask import in_terminal, rows_of, write_page
from unimm.training.loop.arguments import StreamTrainingArguments, TokenizerTrainingConfig
from unimm.training.loop.checkpoint import bytes_of, gigabytes, model_bytes, optimizer_bytes
from unimm.training.loop.stream_trainer import StreamTrainer
from unimm.training.loop.throughput import peak_memory
from unimm.training.tokenizer.parameters import part_of
from unimm.training.tokenizer.trainer import TokenizerTrainer

STEPS = 3  # the first is a warm-up
BUDGET = 10.0
"""Seconds after which no third step is started; no second one after three times as many."""
CPU_SAMPLES = 8
"""Samples of a micro-batch on a CPU, where time is proportional to their number."""
WARM_SAMPLES = 2
"""Samples of the warm-up step on a CPU."""
SHEET_IMAGES = 16


@dataclass
class Measured:
    """Measurements of steps of one micro-batch, and their relation to a real step.

    Args:
        share: share of the real micro-batch's samples that was measured.
        micro_batches: micro-batches of a real step.
        compiled: whether the run compiles what was measured without compilation.

    Attributes:
        seconds, passes: seconds of each step, and of its forward and backward passes.
        activations: bytes that the forward pass kept for the backward pass.
    """

    share: float = 1.0
    micro_batches: int = 1
    compiled: bool = False
    seconds: list[float] = field(default_factory=list)
    passes: list[float] = field(default_factory=list)
    activations: int = 0

    @property
    def enough(self) -> bool:
        """Return whether the time budget is used up, so that no further step should start."""
        return sum(self.seconds) > (3 * BUDGET if len(self.seconds) < 2 else BUDGET)

    @property
    def seconds_per_step(self) -> float:
        """Return the seconds of a full step, extrapolated from the steps after the warm-up if there are any."""
        warmed = slice(1, None) if len(self.seconds) > 1 else slice(None)
        seconds, passes = (sum(each[warmed]) / max(1, len(each[warmed])) for each in (self.seconds, self.passes))
        return passes * self.micro_batches / self.share + seconds - passes

    @property
    def said(self) -> str:
        """Return a note on how the time was estimated, empty if it was measured on full steps after a warm-up."""
        parts = ["not warmed up, too long rather than too short"] if len(self.seconds) < 2 else []
        parts += [f"reckoned from {self.share:.3g} of a micro-batch"] if self.share < 1 else []
        parts += [f"{self.micro_batches} micro-batches a step"] if self.micro_batches > 1 else []
        parts += ["without compilation, which the run has"] if self.compiled else []
        return f" ({'; '.join(parts)})" if parts else ""


@contextmanager
def counting_activations(measured: Measured, weights: Iterable[Tensor]) -> Iterator[None]:
    """Add up the bytes that autograd saves for backward inside the context; each storage counts once, weights do
    not."""
    known = {tensor.untyped_storage().data_ptr() for tensor in weights}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            known.add(storage.data_ptr())
            measured.activations += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield


# ---- the two loops ----


def short(args: StreamTrainingArguments) -> StreamTrainingArguments:
    """Return a copy of the settings for a few small steps that save and log nothing."""
    args = copy.copy(args)
    args.max_steps, args.disable_tqdm, args.report_to = STEPS, True, []
    args.save_strategy = args.eval_strategy = args.logging_strategy = "no"
    args.gradient_accumulation_steps, args.dataloader_num_workers = 1, 0
    args.dataloader_prefetch_factor, args.dataloader_persistent_workers = None, False  # both need workers
    if hasattr(args, "compile_blocks"):
        args.compile_blocks = False
    if _is_cut(args):
        args.per_device_train_batch_size = min(CPU_SAMPLES, args.per_device_train_batch_size)
    return args


def _is_cut(args: StreamTrainingArguments) -> bool:
    """Return whether micro-batches are made smaller. Not with several processes, as each needs every flow in its
    batch."""
    return args.device.type == "cpu" and args.world_size == 1


def _measured(args: StreamTrainingArguments, real: StreamTrainingArguments) -> Measured:
    return Measured(
        share=args.train_batch_size / real.train_batch_size,
        micro_batches=real.gradient_accumulation_steps,
        compiled=getattr(real, "compile_blocks", False),
    )


class _Clock(TrainerCallback):
    def __init__(self, measured: Measured) -> None:
        self.measured = measured

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.device.type == "cuda":
            torch.cuda.synchronize(args.device)
        self.measured.seconds.append(time.perf_counter() - self.begun)
        control.should_training_stop |= args.world_size == 1 and self.measured.enough  # several would have to agree


def dry_run_stream(trainer: StreamTrainer, real: StreamTrainingArguments, show: Callable[[Any], None]) -> None:
    """Measure a trainer made with `short` settings and print the estimates; `real` are the settings of the run, `show`
    receives one batch."""
    measured, step = _measured(trainer.args, real), trainer.training_step
    processes().print(trainer.args.precision.note())
    collate, cut = trainer.data_collator, _is_cut(trainer.args)

    def timed(*arguments: Any, **options: Any) -> Tensor:
        counted = len(measured.passes) == 1  # in the second step: the first may have fewer samples
        begun = time.perf_counter()
        with counting_activations(measured, trainer.model.parameters()) if counted else nullcontext():
            loss = step(*arguments, **options)
        if trainer.args.device.type == "cuda":
            torch.cuda.synchronize(trainer.args.device)
        measured.passes.append(time.perf_counter() - begun)
        return loss

    def fewer_at_first(samples: list[Any]) -> Any:
        nonlocal cut
        kept, cut = samples[:WARM_SAMPLES] if cut else samples, False
        return collate(kept)

    if trainer.is_world_process_zero():
        samples = [trainer.train_dataset[n] for n in range(trainer.args.train_batch_size)]
        show(trainer._prepare_inputs(collate(samples)))
    trainer.training_step, trainer.data_collator = timed, fewer_at_first  # type: ignore[method-assign]
    trainer.add_callback(_Clock(measured))
    trainer.train()
    if not trainer.is_world_process_zero():
        return
    say_groups(trainer.model, trainer.optimizer.param_groups)
    ema = bytes_of(trainer.ema.shadow.values()) if trainer.ema is not None else 0
    say_memory(trainer.model, [trainer.optimizer], ema, measured, trainer.args.device)
    size = model_bytes(trainer.model) + optimizer_bytes(trainer.optimizer) + ema
    say_time_and_disk(measured, real.max_steps, size, trainer.args.save_total_limit)


def short_tokenizer(config: TokenizerTrainingConfig) -> TokenizerTrainingConfig:
    """Return a copy of the settings with small steps, and without k-means initialization, which is not part of a
    step."""
    config = copy.copy(config)
    config.codebook_init, config.report_to, config.gradient_accumulation_steps = "random", [], 1
    if not torch.accelerator.is_available():
        config.batch_size = min(CPU_SAMPLES, config.batch_size)
    return config


def dry_run_tokenizer(trainer: TokenizerTrainer, real: TokenizerTrainingConfig, path: Path) -> None:
    """Measure a trainer made with `short_tokenizer` settings and print the estimates; `real` are the settings of the
    run. Write the first images above their reconstructions to `path`. A GAN is active from the first step on, as it is
    in most of a run."""
    config, tokenizer = trainer.config, trainer.tokenizer
    measured = Measured(config.batch_size / real.batch_size, real.gradient_accumulation_steps)
    main = trainer.accelerator.is_main_process
    trainer.accelerator.print(config.precision.note())
    if trainer.gan_trainer is not None:
        trainer.gan_trainer.start = 0
    if main:
        pixel_values = next(trainer._batches(range(min(SHEET_IMAGES, len(trainer.images)))))
        with torch.no_grad():
            rows = [tokenizer.denormalize(pixel_values), tokenizer.eval().decode(tokenizer.encode(pixel_values).ids)]
        save_image_atomically(sheet(rows), path)
        print(f"{path}: the first {len(pixel_values)} images above what the tokenizer makes of them now")
    tokenizer.train()
    batches = trainer._batches(trainer._remaining())
    for number in range(min(STEPS, config.steps)):
        start = time.perf_counter()
        if number:
            trainer._optimizer_step(batches)
        else:
            with counting_activations(measured, [p for module in trainer.modules() for p in module.parameters()]):
                trainer._optimizer_step(batches)
        trainer.refuse_nan()  # waits for the device, too, so that the seconds are the step's
        measured.seconds.append(time.perf_counter() - start)
        measured.passes.append(measured.seconds[-1])
        if trainer.accelerator.num_processes == 1 and measured.enough:
            break
    if not main:
        return
    optimizers = [trainer.optimizer]
    say_groups(tokenizer, trainer.optimizer.param_groups)
    if trainer.gan_trainer is not None:
        say_groups(trainer.gan_trainer.discriminator, trainer.gan_trainer.optimizer.param_groups, "discriminator")
        optimizers.append(trainer.gan_trainer.optimizer)
    beside = [module for module in trainer.modules() if module is not tokenizer]
    ema = bytes_of(trainer.ema.shadow.values())
    say_memory(tokenizer, optimizers, ema, measured, trainer.accelerator.device, beside)
    say_time_and_disk(measured, config.steps, trainer.checkpoint_bytes(), config.keep_last)


def sheet(rows: list[Tensor]) -> Image.Image:
    """Stack rows of pixels [B, 3, H, W] in [0, 1] into one image, each resized to the first row's size."""
    size = rows[0].shape[-2:]
    lines = [torch.cat(list(nn.functional.interpolate(row.float(), size=size)), dim=2) for row in rows]
    pixels = torch.cat(lines, dim=1).clamp(0, 1).mul(255).round().byte()
    return Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).cpu().numpy()))


def show_label_mask(processor: Any, path: Path) -> Callable[[Any], None]:
    """Return a function that shows the label mask of a batch of flows in the terminal and as an HTML page."""

    def show(batch: Any) -> None:
        rows = rows_of(batch, processor)
        write_page(rows, path)
        print(in_terminal(rows))
        print(f"{path}: these rows, learned tokens marked")

    return show


def show_images(path: Path, pixels_of: Callable[[Any], Tensor]) -> Callable[[Any], None]:
    """Return a function that saves the images of a batch as one image grid."""

    def show(batch: Any) -> None:
        pixels = pixels_of(batch)[:SHEET_IMAGES]
        save_image_atomically(sheet([pixels]), path)
        print(f"{path}: the first {len(pixels)} images of a batch")

    return show


# ---- printing ----


def say_groups(model: nn.Module, groups: list[dict[str, Any]], title: str = "parameter groups") -> None:
    """Print each parameter group with its learning rate, weight decay and model parts, then the frozen parts."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    print(title)
    for number, group in enumerate(groups, 1):
        parts = Counter[str]()
        for parameter in group["params"]:
            parts[part_of(names[parameter])] += parameter.numel()
        kind, rate = "Muon" if group.get("muon") else "AdamW", group.get("initial_lr", group["lr"])
        count = f"{len(group['params'])} tensors, {_millions(parts.total())}"
        print(f"  {number}  {kind}  lr {rate:g}  weight decay {group['weight_decay']:g}  {count}: {_listed(parts)}")
    frozen = Counter[str]()
    for parameter, name in names.items():
        if not parameter.requires_grad:
            frozen[part_of(name)] += parameter.numel()
    print(f"  frozen  {_millions(frozen.total())}: {_listed(frozen)}" if frozen else "  frozen  nothing")


def say_memory(
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    ema: int,
    measured: Measured,
    device: torch.device,
    beside: Iterable[nn.Module] = (),
) -> None:
    """Print the memory of one process by purpose."""
    learning = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    parts = {
        "weights": model_bytes(model),
        "models beside": sum(map(model_bytes, beside)),
        "gradients": bytes_of(learning),
        "optimizer": sum(optimizer_bytes(optimizer) for optimizer in optimizers),
        "averaged weights": ema,
        "activations of a micro-batch": round(measured.activations / measured.share),
    }
    listed = ", ".join(f"{name} {gigabytes(size)}" for name, size in parts.items() if size)
    missing = "" if measured.activations else ", activations not measured"
    peak = gigabytes(peak_memory(device))
    print(f"memory  {gigabytes(sum(parts.values()))}: {listed}{missing}; peak so far {peak}")


def say_time_and_disk(measured: Measured, steps: int, checkpoint: int, keep: int | None) -> None:
    """Print the estimated time of the whole run on this device, and the disk space of its checkpoints."""
    seconds = measured.seconds_per_step
    hours, minutes = divmod(round(seconds * steps / 60), 60)
    whole = f"{hours} h {minutes:02d} min without evaluations"
    print(f"time    {seconds:.3g} s a step, {steps} steps: {whole}{measured.said}")
    room = f"{keep} kept" if keep else "all kept"
    print(f"disk    {gigabytes(checkpoint)} a checkpoint, {room} and one being written")


def _millions(count: int) -> str:
    return f"{count / 1e6:.3f} M weights"


def _listed(parts: Counter[str]) -> str:
    return ", ".join(f"{part} {count / 1e6:.3f} M" for part, count in parts.most_common())
