"""Compare gradient accumulation with the whole batch: for each recipe and k, the largest difference between runs.

    python eval/bench_accumulation.py --json accumulation.json

Every recipe runs with its debug configuration on a batch of 12, and on k = 2, 3 and 4 micro-batches of 6, 4 and 3.
Compared are the final weights, and the newest checkpoint's weights, averaged weights, optimizer states and GAN
statistics. Dropout is off, because masks are sampled per micro-batch; everything else is on.
"""

import argparse
import contextlib
import io
import os
import runpy
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor

from unimm.errors import run_main
from unimm.runs.provenance import git_commit
from unimm.runs.report import Report
from unimm.training.loop.checkpoint import checkpoints

BATCH = 12  # divisible into 1, 2, 3 and 4 micro-batches
TOKENIZER = ("train.mixed_precision=no", "train.panel_steps=10", "train.steps=4", "train.adam_epsilon=1e-4")
GAN = (
    "loss.gan={start: 1, warmup_steps: 1, augment_probability: 0.8, consistency_weight: 4.0, weight: 0.5, "
    "lecam_weight: 0.01}"
)
HOST = ("train.bf16=false", "train.adam_epsilon=1e-4", "train.max_steps=3", "train.save_steps=3", "train.eval_steps=10")
LANGUAGE = (*HOST, "train.use_muon=false", "train.ema_decay=0.9", "train.lr_scheduler_type=cosine")


@dataclass(frozen=True)
class Case:
    """A recipe, its debug configuration and the overrides."""

    recipe: str
    config: str
    changes: Sequence[str]

    @property
    def batch(self) -> str:
        """Return the key of the batch size."""
        return "train.batch_size" if self.recipe == "tokenizer" else "train.per_device_train_batch_size"


CASES: Mapping[str, Case] = {  # in this order: later recipes start from the results of earlier ones
    "vfm": Case("vfm", "vfm", ["train.adam_epsilon=1e-4", "train.save_steps=3", "train.bf16=false"]),
    "vfmtok": Case("tokenizer", "vfmtok", [*TOKENIZER, GAN]),
    "ideal": Case("tokenizer", "ideal", [*TOKENIZER, GAN, "loss.gan.lecam=elementwise", "model.config.dropout=0.0"]),
    "stage1": Case("tokenizer", "stage1", [*TOKENIZER, GAN]),
    "stage2": Case("tokenizer", "stage2", [*TOKENIZER, GAN]),
    "stage3": Case("tokenizer", "stage3", [*TOKENIZER, GAN]),
    "c2i": Case(
        "c2i",
        "c2i",
        [*HOST, *(f"model.config.{part}_dropout=0.0" for part in ("token", "residual", "feed_forward", "class"))],
    ),
    "sft": Case("sft", "sft", LANGUAGE),
    "t2i": Case("t2i", "t2i", LANGUAGE),
}


def run_recipe(path: Path, *arguments: str) -> int:
    """Run a recipe in this process and return its exit code."""
    AcceleratorState._reset_state()  # drops the last run's precision; the processes stay connected
    argv, sys.argv = sys.argv, [path.name, *arguments]
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as ended:
        return int(ended.code or 0)
    finally:
        sys.argv = argv
    return 0


def train(case: str, k: int, root: Path, output: Path) -> None:
    """Run a case of the checkout `root` with `k` micro-batches and save to `output`.

    The paths of earlier results in its configuration are relative to the current folder. Raises RuntimeError if the
    recipe fails.
    """
    c, said = CASES[case], io.StringIO()
    sizes = [f"{c.batch}={BATCH // k}", f"train.gradient_accumulation_steps={k}", f"train.output_dir={output}"]
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = run_recipe(
            root / "recipes" / f"{c.recipe}.py",
            "--config",
            str(root / f"configs/debug/{c.config}.yaml"),
            *c.changes,
            *sizes,
        )
    if code:
        raise RuntimeError(f"{case} with {k} micro-batches ended with {code}:\n{said.getvalue()[-3000:]}")


def left_behind(folder: Path) -> dict[str, Tensor]:
    """Return every tensor of a run's newest checkpoint and of its result, except random number states."""
    found: dict[str, Tensor] = {}
    for path in [*checkpoints(folder)[-1].iterdir(), *folder.glob("*.safetensors")]:
        if path.suffix == ".safetensors":
            found |= dict(_tensors(load_file(path), f"{path.parent.name}/{path.name}"))
        elif path.suffix == ".pt" and "rng" not in path.name:
            found |= dict(_tensors(torch.load(path, weights_only=True), path.name))
    return {name: tensor.float() for name, tensor in found.items() if "rng" not in name}


def differences(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, float]:
    """Return {name: largest difference} of two `left_behind`. Raises ValueError if the names differ."""
    if one.keys() != other.keys():
        raise ValueError(f"Only one of the runs left {sorted(one.keys() ^ other.keys())[:5]}.")
    return {name: float((one[name] - other[name]).abs().max()) for name in one if one[name].numel()}


def _tensors(state: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(state, Tensor):
        yield name, state
    elif isinstance(state, dict):
        for key, value in state.items():
            yield from _tensors(value, f"{name}/{key}")
    elif isinstance(state, list | tuple):
        yield from _tensors(dict(enumerate(state)), name)


ROOT = Path(__file__).resolve().parents[1]
MICRO_BATCHES = (2, 3, 4)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="default %(default)s")
    parser.add_argument("--json", metavar="FILE", help="write the result, - for standard output")
    arguments = parser.parse_args(argv)
    report, here = Report(arguments.json), Path.cwd()
    torch.set_num_threads(arguments.threads)
    report.say(f"{'recipe':<8}" + "".join(f"  k = {k:<22}" for k in MICRO_BATCHES))
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            for case in CASES:
                train(case, 1, ROOT, Path("runs/debug", case))
                whole, cells = left_behind(Path("runs/debug", case)), []
                for k in MICRO_BATCHES:
                    train(case, k, ROOT, Path(f"runs/{k}", case))
                    far = differences(whole, left_behind(Path(f"runs/{k}", case)))
                    name = max(far, key=lambda each: far[each])
                    found.setdefault(case, {})[str(k)] = far[name]
                    cells.append(f"{far[name]:.1e} {name.rsplit('/', 1)[-1][-16:]}")
                report.say(f"{case:<8}" + "".join(f"  {cell:<26}" for cell in cells))
        finally:
            os.chdir(here)
    report.add(largest_differences=found, threads=arguments.threads, commit=git_commit())
    report.write()


if __name__ == "__main__":
    sys.exit(run_main(main, name="bench_accumulation"))
