"""Test that training resumes bit-exactly: kill runs with SIGKILL at random steps and while they write checkpoints,
restart them with the same command, and compare the results with uninterrupted runs.

    python eval/resume.py --json runs/resume.json
    python eval/resume.py --only stage2 --kills 5 --accelerate

Covered are both stages of the tokenizer (the second with its GAN), SFT and text-to-image training, in the debug
configurations. They run on one thread, because the last bits depend on the number of threads. SIGKILL hits the whole
process group. Runs are forks of this process, because importing torch and transformers takes longer than the tiny runs;
`--accelerate` starts them with `accelerate launch` instead.
"""

import argparse
import contextlib
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from unimm.errors import UserError, run_main
from unimm.runs.report import Report

WEIGHTS = "model.safetensors"
_STEP = re.compile(rb"step \d+: |\{'loss'")  # log line of a step: unimm's training loop, or Trainer
_POLL = 0.001


@dataclass(frozen=True)
class Case:
    """A recipe to test: its script, debug configuration (`name`), number of steps and overrides."""

    name: str
    recipe: str
    steps: int
    overrides: tuple[str, ...] = ()


def debug_cases() -> list[Case]:
    """Return cases that cover everything in a checkpoint: codebook maintenance, generator and discriminator, EMA, Muon,
    data workers, two flows."""
    tokenizer = ("train.steps=8", "train.save_steps=2", "train.num_workers=1", "train.panel_steps=8")
    host = (
        "train.max_steps=8", "train.save_steps=2", "train.eval_steps=8", "train.ema_decay=0.9",
        "train.dataloader_num_workers=1",
    )  # fmt: skip
    return [
        Case("stage1", "tokenizer", 8, tokenizer),
        Case("stage2", "tokenizer", 8, (*tokenizer, "loss.gan.start=2")),
        Case("sft", "sft", 8, host),
        Case("t2i", "t2i", 8, (*host, "panel.prompts=[]")),
    ]


@dataclass
class Trial:
    """The result of a case.

    Args:
        killed_at: the step of each kill.
        found: the steps of the checkpoints that each kill left.
        differing: what differs from the uninterrupted run.
    """

    case: Case
    killed_at: list[str] = field(default_factory=list)
    found: list[list[int]] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def equal(self) -> bool:
        return not self.differing


class Launcher:
    """A launcher for recipes of the repository at `root`, with `folder` as their working directory."""

    def __init__(self, root: Path, folder: Path, *, accelerate: bool = False) -> None:
        self.root, self.folder, self.accelerate = root, folder, accelerate
        torch.set_num_threads(1)  # fork copies no threads: a child would wait forever for its parent's pool

    def command(self, case: Case, output: str) -> list[str]:
        config = self.root / "configs" / "debug" / f"{case.name}.yaml"
        return ["--config", str(config), f"train.output_dir={output}", *case.overrides]

    def start(self, case: Case, output: str, log: Path) -> int:
        """Start a case and return its process id, which is also its group id."""
        script, arguments = self.root / "recipes" / f"{case.recipe}.py", self.command(case, output)
        if self.accelerate:
            launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_cpu_threads_per_process", "1"]
            environment = os.environ | {"PYTHONPATH": str(self.root), "PYTHONUNBUFFERED": "1"}
            with log.open("wb") as out:
                return subprocess.Popen(
                    [*launch, str(script), *arguments],
                    stdout=out, stderr=subprocess.STDOUT, cwd=self.folder, env=environment, start_new_session=True,
                ).pid  # fmt: skip
        runpy.run_path(str(script), run_name="preloaded")  # imports everything once, before the fork
        return fork(lambda: run_script(script, arguments), log, self.folder)


def run_script(script: Path, arguments: Sequence[str]) -> None:
    """Run a script in this process as from the command line, with fresh random states instead of the parent's."""
    random.seed()
    np.random.seed()
    torch.seed()
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")


def fork(body: Callable[[], None], log: Path, folder: Path) -> int:
    """Run `body` in a child process with its own group and its output in `log`; return its process id."""
    sys.stdout.flush()
    sys.stderr.flush()
    log.write_bytes(b"")
    child = os.fork()
    if child:
        with contextlib.suppress(PermissionError, ProcessLookupError):  # the child may have done it, or have ended
            os.setpgid(child, child)
        return child
    code = 1
    try:
        os.setpgid(0, 0)
        out = os.open(log, os.O_WRONLY | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(out, stream)
        sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1)
        os.chdir(folder)
        body()
        code = 0
    except SystemExit as ended:
        code = int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def exit_code(process: int, *, wait: bool = True) -> int | None:
    """Return the exit code of a process, None while it runs; a negative code is the signal that killed it."""
    found, status = os.waitpid(process, 0 if wait else os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def finish(process: int, log: Path) -> None:
    """Wait for a run to end; raise UserError if it fails."""
    if (code := exit_code(process)) != 0:
        said = log.read_text(errors="replace").strip().splitlines()[-5:]
        raise UserError(f"The run of {log} ended with {code}: {' '.join(said)}")


def steps_of(folder: Path) -> list[int]:
    """Return the steps of the checkpoints in a run's folder."""
    return sorted(int(path.name.rpartition("-")[2]) for path in folder.glob("checkpoint-*"))


def kill_at(process: int, log: Path, folder: Path, *, steps: int | None) -> str | None:
    """Kill the process group with SIGKILL after `steps` more steps, or (None) while it writes a checkpoint.

    Returns the step of the kill, None if the process ended before.
    """
    begun = (steps_of(folder) or [0])[-1]
    while exit_code(process, wait=False) is None:
        said = len(_STEP.findall(log.read_bytes()))
        writing = sorted(path.name for path in folder.glob(".checkpoint-*.tmp"))
        if said and writing if steps is None else said >= steps:  # before the first step, .tmp is from the last kill
            os.killpg(process, signal.SIGKILL)
            exit_code(process)
            left = sorted(path.name for path in folder.glob(".checkpoint-*.tmp"))
            return f"{begun + said}{' (writing)' if left else ''}"
        time.sleep(_POLL)
    return None


def unreadable(folder: Path) -> list[str]:
    """Return damaged checkpoint files: archives with a wrong checksum, safetensors that do not match their header."""
    broken = []
    for path in sorted(folder.glob("checkpoint-*/*")):
        try:
            if path.suffix in (".pt", ".pth", ".bin") and zipfile.ZipFile(path).testzip():
                broken.append(str(path))
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt") as weights:
                    for name in weights.keys():  # noqa: SIM118  (not a mapping)
                        weights.get_tensor(name)
        except Exception as error:
            broken.append(f"{path} ({type(error).__name__})")
    return broken


def _tensors(tree: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(tree, torch.Tensor):
        yield path, tree
    elif isinstance(tree, dict | list | tuple):
        for name, item in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _tensors(item, f"{path}/{name}")


def differences(whole: Path, cut: Path) -> list[str]:
    """Return what differs between two finished runs: weight files (bytes) and tensors of the last checkpoints."""
    differing = [] if (whole / WEIGHTS).read_bytes() == (cut / WEIGHTS).read_bytes() else [WEIGHTS]
    last = f"checkpoint-{steps_of(whole)[-1]}"
    for path in sorted((whole / last).glob("*.pt")):
        states = (torch.load(folder / last / path.name, weights_only=True) for folder in (whole, cut))
        ours, theirs = (dict(_tensors(state)) for state in states)
        names = ours.keys() ^ theirs.keys() | {n for n in ours.keys() & theirs.keys() if not ours[n].equal(theirs[n])}
        differing += [f"{path.name}{name}" for name in sorted(names)]
    return differing


def run_case(launcher: Launcher, case: Case, *, kills: int, seed: int) -> Trial:
    """Run `case` uninterrupted, then with kills at random steps, every second one while a checkpoint is written."""
    trial, chance, started = Trial(case), random.Random(f"{seed} {case.name}"), time.perf_counter()
    folder, whole, cut = launcher.folder, f"runs/debug/{case.name}", f"runs/killed/{case.name}"
    log = folder / f"{case.name}.log"
    finish(launcher.start(case, whole, log), log)
    shutil.rmtree(folder / cut, ignore_errors=True)
    for number in range(kills):
        left = case.steps - (steps_of(folder / cut) or [0])[-1]
        if left < 2:
            break
        steps = None if number % 2 else chance.randrange(1, left)
        killed = kill_at(launcher.start(case, cut, log), log, folder / cut, steps=steps)
        if killed is None:
            break
        trial.killed_at.append(killed)
        trial.found.append(steps_of(folder / cut))
        if broken := unreadable(folder / cut):
            raise UserError(f"The killed run left {len(broken)} files that cannot be read: {', '.join(broken)}.")
    finish(launcher.start(case, cut, log), log)
    trial.differing = differences(folder / whole, folder / cut)
    trial.seconds = time.perf_counter() - started
    return trial


ROOT = Path(__file__).resolve().parents[1]


def main(argv: list[str] | None = None) -> int:
    cases = debug_cases()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", choices=[case.name for case in cases], help="this one and, undisturbed, what it needs"
    )
    parser.add_argument("--kills", type=int, default=5, help="of each run; every second one while it writes")
    parser.add_argument("--seed", type=int, default=0, help="of the steps at which they come")
    parser.add_argument("--accelerate", action="store_true", help="start the runs by accelerate launch: slower")
    parser.add_argument("--folder", help="keep the runs there; a temporary folder otherwise")
    parser.add_argument("--json", metavar="FILE", help="write the result, - for standard output")
    arguments = parser.parse_args(argv)
    report = Report(arguments.json)
    folder = Path(arguments.folder or tempfile.mkdtemp(prefix="unimm-resume-")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    launcher = Launcher(ROOT, folder, accelerate=arguments.accelerate)
    report.say(f"{'recipe':<8} {'steps':>5}  {'killed after step':<52} {'checkpoints found':<34} {'equal':<5} seconds")
    log, equal = folder / "vfm.log", True
    try:
        finish(launcher.start(Case("vfm", "vfm", 3), "runs/debug/vfm", log), log)
        for case in cases:
            wanted = arguments.only in (None, case.name)
            trial = run_case(launcher, case, kills=arguments.kills if wanted else 0, seed=arguments.seed)
            killed, found = ", ".join(trial.killed_at), " | ".join(" ".join(map(str, f)) or "-" for f in trial.found)
            verdict = "yes" if trial.equal else "NO"
            report.say(f"{case.name:<8} {case.steps:>5}  {killed:<52} {found:<34} {verdict:<5} {trial.seconds:7.1f}")
            report.add(**{case.name: {"steps": case.steps, "killed_at": trial.killed_at, "equal": trial.equal}})
            equal &= trial.equal
            if not trial.equal:
                report.say(f"  differing: {', '.join(trial.differing[:5])}, {len(trial.differing)} in all")
            if case.name == arguments.only:
                break
    finally:
        if arguments.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
    report.write()
    if not equal:
        raise UserError("A resumed run differs from the undisturbed one.")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main, name="resume"))
