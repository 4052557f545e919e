"""Check and measure unimm on a GPU in one run of a few minutes: one JSON file, one Markdown table.

    python eval/gpu.py --output runs/gpu                  # on a GPU, 9 minutes at most
    python eval/gpu.py --size debug --output runs/gpu     # on a CPU: every part once, in small
    python eval/gpu.py --only training --limit-seconds 200

The parts run in the order of `PARTS`, each in a process of its own with a limit of its own; a part that fails, or that
the time left does not cover, is recorded with its reason, and the others still run. The JSON file is written after
every part. Weights are random in published shapes; nothing is downloaded. The last part trains the embedded model from
nothing, with the steps that `make shapes` has not done yet, and stops with a checkpoint when the time is over.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # it runs without a virtual environment that holds the package

from unimm.errors import UserError, run_main  # noqa: E402
from unimm.runs.provenance import git_commit  # noqa: E402
from unimm.runs.report import Report  # noqa: E402

GRACE = 15
"""Seconds between the signal that asks a part to stop and the one that kills it."""


@dataclass(frozen=True)
class Part:
    """One part of the run.

    Args:
        commands: the arguments of Python for a size and a report's file, one process each; an iterator, so that what
            comes later can depend on what an earlier one left.
        seconds: at most, of all commands together; None takes what is left.
        least: seconds that must be left for the part to begin.
        stoppable: whether a part that is stopped at its limit counts as done: it resumes from its checkpoint.
    """

    commands: Callable[[str, Path], Iterator[Sequence[str]]]
    seconds: int | None
    least: int
    stoppable: bool = False


def _script(name: str, debug: str, paper: str) -> Callable[[str, Path], Iterator[Sequence[str]]]:
    def commands(size: str, report: Path) -> Iterator[Sequence[str]]:
        yield ["-m", f"eval.{name}", *(debug if size == "debug" else paper).split(), "--json", str(report)]

    return commands


def _training(what: str, batch: int, ways: str = "plain,compiled", steps: int = 12) -> Callable[..., Any]:
    common = f"--what {what} --profile"
    workers = max(1, (os.cpu_count() or 2) - 2)
    return _script(
        "bench_training",
        f"{common} --size debug --ways plain --steps 1 --batch-size 2 --workers 0",
        f"{common} --size paper --ways {ways} --steps {steps} --batch-size {batch} --workers {workers} "
        "--precision bf16",
    )


def _generation(tokens: int, batches: str, only: str, seconds: int) -> Part:
    """Return the benchmark of guided drawings by Qwen3-0.6B."""
    small = "--width 128 --layers 1 --codes 32 --image-tokens 16 --batches 1 --scales 2 --repeats 1 --threads 1"
    model = "--width 1024 --layers 28 --head-dim 128 --dtype bfloat16"
    paper = f"{model} --image-tokens {tokens} --batches {batches} --scales 5 --repeats 1 --only {only}"
    return Part(_script("bench_generation", f"{small} --only {only}", paper), seconds, 60)


def _chain(size: str, report: Path) -> Iterator[Sequence[str]]:
    """Yield the steps of `make shapes` that are not done, and mark each as done once the next is asked for."""
    if size == "debug":
        yield [
            "recipes/vfm.py", "--config", "configs/debug/vfm.yaml", f"train.output_dir={report.parent / 'chain'}",
        ]  # fmt: skip
        return
    listed = subprocess.run(
        ["make", "--no-print-directory", "-n", "-o", ".venv/.dev", "shapes"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    workers = max(1, (os.cpu_count() or 2) - 2)
    for recipe, config, done in re.findall(r"(recipes/\w+\.py) --config (\S+)\ntouch (\S+)", listed):
        key = "train.num_workers" if recipe.endswith("tokenizer.py") else "train.dataloader_num_workers"
        device = ["train.use_cpu=false"] if recipe.endswith("vfm.py") and torch.cuda.is_available() else []
        yield [recipe, "--config", config, f"{key}={workers}", *device]
        (ROOT / done).touch()


PARTS: Mapping[str, Part] = {
    "correctness": Part(_script("gpu_correctness", "--size debug", "--size paper"), 100, 30),
    "generation": _generation(64, "1", "compiled,8,generate,plain,Janus,Emu3", 180),
    "generation, whole image": _generation(1024, "1,16", "compiled", 150),
    "training t2i": Part(_training("t2i_ids", 16), 130, 45),
    "training stage 1": Part(_training("stage1", 64, ways="plain,tf32,compiled"), 130, 60),
    "generation, own forward": _generation(64, "1", "own", 80),
    "training stage 2": Part(_training("stage2", 32, ways="plain"), 80, 50),
    "training t2i, images": Part(_training("t2i", 16, ways="plain,tf32", steps=6), 60, 40),
    "quantizer": Part(
        _script(
            "bench_quantizer",
            "--latents 64 --codes 256 --width 32 --repeats 1 --threads 1 --only bfloat16",
            "--device cuda --repeats 20",
        ),
        40,
        20,
    ),
    "chain": Part(_chain, None, 20, stoppable=True),
}
"""In the order of importance."""


def run_part(part: Part, size: str, folder: Path, name: str, seconds: float) -> dict[str, Any]:
    """Run a part for at most `seconds`; return {"ok", "seconds", "reason" if not ok or stopped, "result"}."""
    start, stem = time.monotonic(), name.replace(",", "").replace(" ", "-")
    report, log = folder / f"{stem}.json", folder / f"{stem}.log"
    report.unlink(missing_ok=True)
    found: dict[str, Any] = {"ok": True}
    try:
        with log.open("w") as output:
            for command in part.commands(size, report):
                reason = _run(command, output, start + seconds - time.monotonic())
                if reason is not None:
                    stopped = reason == STOPPED and part.stoppable
                    reason = f"stopped at its limit of {seconds:.0f} s" if reason == STOPPED else reason
                    last = _last_line(log)
                    found = {"ok": stopped, "reason": f"{reason}: {last}" if last and not stopped else reason}
                    break
    except (OSError, subprocess.SubprocessError) as error:
        found = {"ok": False, "reason": f"{type(error).__name__}: {error}".splitlines()[0]}
    found["seconds"] = round(time.monotonic() - start, 1)
    if report.is_file():
        found["result"] = json.loads(report.read_text())
    return found


STOPPED = "stopped"


def _run(command: Sequence[str], output: Any, seconds: float) -> str | None:
    """Run Python with these arguments; return None, or why it failed: `STOPPED` or its exit code."""
    if seconds <= 0:
        return STOPPED
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment |= {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    process = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
    )
    try:
        code = process.wait(timeout=seconds)
        return None if code == 0 else f"exit code {code}"
    except subprocess.TimeoutExpired:
        return STOPPED
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)  # a recipe then writes a checkpoint
            try:
                process.wait(timeout=GRACE)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


# ---- the table ----


def table(content: Mapping[str, Any]) -> str:
    """Return a Markdown table of the run's figures, one line for each."""
    lines = ["| part | what | figures |", "|---|---|---|"]
    for name, part in content["parts"].items():
        rows = list(_figures(part.get("result", {})))
        lines += [f"| {name} | {what} | {figures} |" for what, figures in rows]
        if not part["ok"] or not rows:
            lines.append(f"| {name} | {'done' if part['ok'] else 'failed'} | {_reason(part)} |")
    return "\n".join(lines)


def _reason(part: Mapping[str, Any]) -> str:
    return str(part.get("reason", f"{part['seconds']} s")).replace("|", "/")


def _figures(result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, found in result.items():
        if isinstance(found, Mapping) and "step_seconds" in found:
            mfu = "" if found["mfu"] is None else f", MFU {found['mfu']:.1%}"
            waits = sum(found.get("waits", {}).values())
            yield (
                name,
                f"{found['images_per_second']:.1f} images/s, {found['tokens_per_second']:.0f} tokens/s{mfu}, peak "
                f"{found['peak_memory_gib']:.1f} GiB, data {found['data_ratio']:.1f} times as fast, "
                f"{waits:.0f} waits a step",
            )
        elif isinstance(found, Mapping) and name in ("ids", "drawings", "packing", "compiled"):
            yield name, ", ".join(f"{key} {value:.4g}" for key, value in _leaves(found))
        elif isinstance(found, Mapping) and name == "search":
            for method, row in found.items():
                yield method, f"{1000 * row['seconds']:.2f} ms, {row['extra_gib']:.3f} GiB"
    for row in result.get("generation", ()):
        yield (
            f"{row['way']}, {row['batch']} at once, guidance {row['scale']:g}",
            f"{row['tokens_per_second']:.0f} tokens/s, {row['ms_per_step']:.2f} ms a step, {row['bound']:.2f} of the "
            "bandwidth",
        )


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key} ")
        elif isinstance(value, int | float):
            yield f"{prefix}{key}".replace("_", " "), float(value)


def machine() -> dict[str, Any]:
    """Return what the figures belong to: the device, its memory, torch, the processors."""
    found: dict[str, Any] = {"device": "CPU", "torch": torch.__version__, "processors": os.cpu_count()}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {"device": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1)}
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "paper" if torch.cuda.is_available() else "debug"
    parser.add_argument("--size", choices=("debug", "paper"), default=default, help="default here: %(default)s")
    parser.add_argument("--output", default="runs/gpu", help="folder, default %(default)s")
    parser.add_argument("--limit-seconds", type=int, default=540, help="of all parts, default %(default)s")
    parser.add_argument("--only", default="", help="the parts whose name holds this")
    parser.add_argument("--skip", help="not the parts whose name holds this")
    arguments = parser.parse_args(argv)
    begun = time.monotonic()
    if arguments.size == "paper" and not torch.cuda.is_available():
        raise UserError("--size paper is for a GPU and torch finds none: give --size debug.")
    parts = {name: part for name, part in PARTS.items() if arguments.only in name}
    parts = {name: part for name, part in parts.items() if not arguments.skip or arguments.skip not in name}
    if not parts:
        raise UserError(f"No part's name holds {arguments.only!r}; parts are {', '.join(PARTS)}.")
    folder = Path(arguments.output).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    report, found = Report(str(folder / "gpu.json")), dict[str, Any]()
    report.add(machine=machine(), size=arguments.size, commit=git_commit(), parts=found)
    for name, part in parts.items():
        left = arguments.limit_seconds - (time.monotonic() - begun)
        if left < part.least:
            reason = f"left out: {left:.0f} s are left, it takes at least {part.least}"
            found[name] = {"ok": False, "seconds": 0.0, "reason": reason}
        else:
            # a CPU is as slow as it is; what comes to an end at its limit may take a little longer to stop
            most = left if arguments.size == "debug" else part.seconds or left
            seconds = min(most, left) - (GRACE if part.stoppable else 0)
            found[name] = run_part(part, arguments.size, folder, name, seconds)
        report.say(f"{name}: {'ok' if found[name]['ok'] else 'FAILED'}, {_reason(found[name])}")
        report.write()
    text = table(report.content)
    (folder / "table.md").write_text(text + "\n")
    report.say(f"\n{report.content['machine']}\n\n{text}\n\n{folder / 'gpu.json'}")
    return 0 if all(part["ok"] for part in found.values()) else 1


if __name__ == "__main__":
    sys.exit(run_main(main, name="gpu"))
