"""Profile the parts of a training step, in real steps of unimm's training loops.

The parts' methods are wrapped from outside, so the loops need no changes. A part's time excludes the parts called
within it. On a GPU the device is synchronized at every start and end of a part, so the sum is a little more than a step
takes without the clock, which is measured too.
"""

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

from unimm.training.language_model.trainer import HostTrainer
from unimm.training.loop.throughput import TokenizerCost, Work, peak_memory
from unimm.training.tokenizer.trainer import TokenizerTrainer

WARM = 3
"""Warm-up steps: compiled blocks recompile for a second sequence length, and data workers fill their queues."""

PROFILED = 2
"""Steps under torch's profiler."""

SLOWEST = 15
"""Operators that a profile names."""

WAITS = {
    "cuda": ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"),
    "cpu": ("aten::_local_scalar_dense", "aten::nonzero"),
}
"""What makes the host wait for the device, by the profiler's names: as CUDA reports it; on a CPU, a tensor read as a
number (also an optimizer's count of steps, which is on the CPU anyway) and a size that depends on values."""


class StepClock:
    """A clock that sums the seconds of each part; a GPU is synchronized before the time is taken."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self._within: list[float] = []  # a stack: seconds of nested parts, per running part
        self._closed = False

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def stop(self) -> None:
        """Time no part any more."""
        self._closed = True

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = self.now()
        self._within.append(0.0)
        try:
            yield
        finally:
            spent = self.now() - start
            self.seconds[name] += spent - self._within.pop()
            if self._within:
                self._within[-1] += spent

    def watch(self, owner: Any, method: str, name: str, *, whole: bool = False) -> None:
        """Time every call of `owner.method` as a part; with `whole`, nested parts count as its own time."""
        called = getattr(owner, method)

        @functools.wraps(called)
        def timed(*arguments: Any, **options: Any) -> Any:
            if self._closed:
                return called(*arguments, **options)
            self._closed = whole
            try:
                with self.part(name):
                    return called(*arguments, **options)
            finally:
                self._closed = False

        setattr(owner, method, timed)


@dataclass
class Split:
    """The profile of `steps` steps; times and work are per step, `step_seconds` is measured without the clock."""

    steps: int
    parts: dict[str, float] = field(default_factory=dict)
    step_seconds: float = 0.0
    work: Work = field(default_factory=Work)
    data_seconds: float = 0.0
    peak_memory_gib: float = 0.0
    profile: dict[str, Any] = field(default_factory=dict)

    @property
    def images_per_second(self) -> float:
        return self.work.images / self.step_seconds

    @property
    def tokens_per_second(self) -> float:
        return float(self.work.tokens) / self.step_seconds

    def mfu(self, peak: float | None) -> float | None:
        """Return the model FLOPs utilization, None if the peak (FLOP/s) is not known."""
        return None if peak is None else float(self.work.flops) / self.step_seconds / peak

    @property
    def data_ratio(self) -> float:
        """Return how many times faster batches load than the steps consume them."""
        return self.step_seconds / self.data_seconds


def torch_profiler(device: torch.device) -> profile:
    """Return a profiler of the host, and of the GPU if that is the device."""
    gpu = [ProfilerActivity.CUDA] if device.type == "cuda" else []
    return profile(activities=[ProfilerActivity.CPU, *gpu])


def profile_of(profiler: profile, device: torch.device, steps: int) -> dict[str, Any]:
    """Return the slowest operators, {"name", "ms", "calls", "share"} a step by the device's own time, and {name:
    times a step} of what made the host wait."""
    own = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    events = profiler.key_averages()
    # On a GPU an operator's time is its kernels': count the kernels, which appear beside it, not twice.
    timed = [e for e in events if device.type == "cpu" or e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    total = sum(getattr(e, own) for e in timed) or 1
    slowest = sorted(timed, key=lambda e: -getattr(e, own))[:SLOWEST]
    operators = [
        {
            "name": e.key[:120],
            "ms": getattr(e, own) / 1000 / steps,
            "calls": e.count / steps,
            "share": getattr(e, own) / total,
        }
        for e in slowest
    ]
    return {"slowest": operators, "waits": {e.key: e.count / steps for e in events if e.key in WAITS[device.type]}}


def split_tokenizer_step(trainer: TokenizerTrainer, steps: int, *, profile: bool = False) -> Split:
    """Profile a tokenizer's trainer (GAN active if it has one): warm-up, steps without the clock, steps with it, and
    with `profile` a few under torch's profiler."""
    config, tokenizer = trainer.config, trainer.tokenizer
    clock = StepClock(trainer.accelerator.device)
    if trainer.gan_trainer is not None:
        trainer.gan_trainer.start = 0
    tokenizer.train()
    batches = trainer._batches(trainer._remaining())
    for _ in range(WARM):
        trainer._optimizer_step(batches)
    split = Split(steps, step_seconds=_seconds(clock, steps, lambda: trainer._optimizer_step(batches)))
    if profile:
        with torch_profiler(clock.device) as profiler:
            _seconds(clock, PROFILED, lambda: trainer._optimizer_step(batches))
        split.profile = profile_of(profiler, clock.device, PROFILED)
    images = config.batch_size * config.gradient_accumulation_steps
    cost = TokenizerCost.of(tokenizer, config.stage).training(config.batch_size) * config.gradient_accumulation_steps
    tokenizer.train()
    split.work = Work(images, images * tokenizer.config.num_image_tokens, cost)
    for owner, method, name in (
        (tokenizer, "hidden_states", "encoder"),
        (tokenizer, "_quantized", "quantizer"),
        (tokenizer, "draw", "decoder"),
        *([(trainer.teacher, "forward", "teacher")] if trainer.teacher is not None else []),
        (trainer.objective.perceptual, "forward", "perceptual"),
        (trainer.accelerator, "backward", "backward"),
        (trainer.accelerator, "clip_grad_norm_", "optimiser"),
        (trainer.optimizer, "step", "optimiser"),
        (trainer.ema, "update", "optimiser"),
    ):
        clock.watch(owner, method, name)
    for method in ("generator_loss", "step") if trainer.gan_trainer is not None else ():
        clock.watch(trainer.gan_trainer, method, "GAN", whole=True)
    for _ in range(steps):
        with clock.part("rest"):
            trainer._optimizer_step(_timed(batches, clock))
    split.parts = {name: seconds / steps for name, seconds in clock.seconds.items()}
    split.data_seconds = _data_seconds(iter(trainer._batches(trainer._remaining())), steps)
    split.data_seconds *= config.gradient_accumulation_steps
    split.peak_memory_gib = peak_memory(clock.device) / 2**30
    return split


class _Watch(TrainerCallback):
    """A callback that profiles Trainer's loop: warm-up, `steps` steps without the clock, `steps` with it, and, if the
    run goes on, the rest under torch's profiler."""

    def __init__(self, trainer: HostTrainer, split: Split, clock: StepClock) -> None:
        self.trainer, self.split, self.clock = trainer, split, clock
        self.begun = 0.0
        self.profiler = torch_profiler(clock.device)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        steps = self.split.steps
        if state.global_step == WARM:
            self.begun = self.clock.now()
            self.trainer.meter.restart()
        elif state.global_step == WARM + steps:
            self.split.step_seconds = (self.clock.now() - self.begun) / steps
            self.split.work = self.trainer.meter.total * (1 / steps)
            self._watch_parts()
            self.begun = self.clock.now()
        elif state.global_step == WARM + 2 * steps:
            spent = (self.clock.now() - self.begun) / steps
            self.split.parts = {name: seconds / steps for name, seconds in self.clock.seconds.items()}
            self.split.parts["rest"] = spent - sum(self.split.parts.values())
            self.clock.stop()
            if self.trainer.args.max_steps > state.global_step:
                self.profiler.start()
        elif state.global_step == self.trainer.args.max_steps:
            self.clock.now()
            self.profiler.stop()
            self.split.profile = profile_of(self.profiler, self.clock.device, PROFILED)

    def _watch_parts(self) -> None:
        trainer, model = self.trainer, self.trainer.model
        for owner, method, name in (
            (trainer, "get_batch_samples", "data"),
            (trainer, "_image_tokens", "tower and ids"),
            (model.model, "get_image_features", "tower and ids"),
            (trainer, "compute_loss", "forward"),
            (trainer.accelerator, "backward", "backward"),
            (trainer, "_clip_grad_norm", "optimiser"),
            (trainer.optimizer, "step", "optimiser"),
            *([(trainer.ema, "update", "optimiser")] if trainer.ema is not None else []),
        ):
            self.clock.watch(owner, method, name)


def split_host_step(trainer: HostTrainer, steps: int, *, profile: bool = False) -> Split:
    """Profile a language model's trainer, whose `max_steps` must be WARM + 2 * steps, and PROFILED more with
    `profile`."""
    assert trainer.args.max_steps == WARM + 2 * steps + (PROFILED if profile else 0)
    split, clock = Split(steps), StepClock(trainer.args.device)
    trainer.add_callback(_Watch(trainer, split, clock))
    trainer.train()
    split.data_seconds = _data_seconds(iter(trainer.get_train_dataloader()), steps)
    split.data_seconds *= trainer.args.gradient_accumulation_steps
    split.peak_memory_gib = peak_memory(clock.device) / 2**30
    return split


def _seconds(clock: StepClock, steps: int, step: Callable[[], Any]) -> float:
    start = clock.now()
    for _ in range(steps):
        step()
    return (clock.now() - start) / steps


def _timed(batches: Iterator[Any], clock: StepClock) -> Iterator[Any]:
    while True:
        with clock.part("data"):
            batch = next(batches)
        yield batch


def _data_seconds(batches: Iterator[Any], count: int) -> float:
    """Return the seconds to load a batch if nothing else runs; workers fill their queues during the first one."""
    next(batches)
    start = time.perf_counter()
    for _ in range(count):
        next(batches)
    return (time.perf_counter() - start) / count
