"""Train and measure the cells of tables; what is finished is not done again.

    OUTPUT/shared/LEG/                 a leg that all cells use
    OUTPUT/TABLE/CELL-SEED/LEG/        a leg of one cell; .done marks it as finished
    OUTPUT/TABLE/CELL-SEED/cell.json   the figures of a finished cell

Every leg is one process of a recipe, which resumes from its checkpoint. Several processes may work on one output
folder: a cell that another one holds is left to it.
"""

import functools
import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from unimm.config.loading import load_tree
from unimm.config.schema import plain
from unimm.errors import Interrupted, UserError, reading
from unimm.evaluation.findings.plan import Leg, Table
from unimm.evaluation.findings.verdict import Figure
from unimm.evaluation.generation.feature_spaces import FeatureSpace
from unimm.runs.provenance import git_commit, hardware, package_versions, write_atomically

DONE, CELL, WEIGHTS = ".done", "cell.json", "model.safetensors"
Say = Callable[[str], None]
say_at_once: Say = functools.partial(print, flush=True)
Launch = Callable[[Sequence[str], Path], int]
"""Runs the command line of a recipe with its output appended to a file, and returns the exit code."""


def launch_process(command: Sequence[str], log: Path) -> int:
    """Run a command line in a process of its own, as `Launch` says; a signal is a negative code."""
    with log.open("ab") as stream:
        return subprocess.run([sys.executable, *command], stdout=stream, stderr=subprocess.STDOUT).returncode


@dataclass(frozen=True)
class Place:
    """Where things are.

    Args:
        output: the folder of all results.
        configs: the folder of the tables, to which the legs' configurations are relative.
        recipes: the folder of the recipes.
        launch: how a recipe is run.
    """

    output: Path
    configs: Path
    recipes: Path
    launch: Launch = launch_process

    def cell(self, table: str, cell: str, seed: int) -> Path:
        return self.output / table / f"{cell}-{seed}"

    def shared(self, leg: str) -> Path:
        return self.output / "shared" / leg


def leg_digest(leg: Leg, configs: Path, seed: int | None = None) -> str:
    """Return a sha256 over all settings of a leg: its recipe, its file with bases, what it overrides, its seed."""
    tree = load_tree(configs / leg.config) if leg.config else {}
    text = json.dumps([leg.recipe, tree, leg.set, seed], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def cell_digest(table: Table, cell: str, seed: int, configs: Path) -> str:
    """Return a sha256 over all that decides the figures of a cell: its legs, the shared ones, what is measured."""
    legs = [leg_digest(leg, configs) for leg in table.shared.values()]
    legs += [leg_digest(leg, configs, seed) for leg in table.legs_of(cell).values()]
    return hashlib.sha256(json.dumps([legs, plain(table.measures)], sort_keys=True).encode()).hexdigest()


def read_cell(place: Place, name: str, table: Table, cell: str, seed: int) -> dict[str, Figure] | None:
    """Return the figures of a finished cell, None if it is not finished.

    Raises:
        UserError: the file is damaged, or was measured under other settings.
    """
    path = place.cell(name, cell, seed) / CELL
    if not path.exists():
        return None
    with reading("The figures", path):
        found = json.loads(path.read_text(encoding="utf-8"))
        figures = {key: Figure(*values) for key, values in found["figures"].items()}
    if found["settings"] != cell_digest(table, cell, seed, place.configs):
        raise UserError(f"{path} was measured under other settings than {name}.yaml has: remove {path.parent}.")
    return figures


def run_cell(
    place: Place, name: str, table: Table, cell: str, seed: int, space: FeatureSpace | None, say: Say = say_at_once
) -> bool:
    """Train and measure a cell unless it is finished; return False if another process holds it.

    Raises:
        UserError: scipy is not installed, a leg failed, or the folder holds results of other settings.
        Interrupted: a leg was stopped; the same call goes on.
    """
    try:
        from unimm.evaluation.findings.measure import measure
    except ModuleNotFoundError as error:
        if error.name != "scipy":
            raise
        raise UserError("Cells are measured with scipy, which is not installed: install unimm[eval].") from None

    if read_cell(place, name, table, cell, seed) is not None:
        return True
    folder = place.cell(name, cell, seed)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    with lock:
        if read_cell(place, name, table, cell, seed) is not None:  # finished while this process came here
            return True
        begun, seconds = time.perf_counter(), dict[str, float]()
        folders = shared_legs(place, table, say) | {"cell": folder}
        for leg_name, leg in table.legs_of(cell).items():
            say(f"{name}/{cell}, seed {seed}: {leg_name}")
            folders[leg_name] = folder / leg_name
            seconds[leg_name] = train(place, leg, folders[leg_name], folders, seed)
        say(f"{name}/{cell}, seed {seed}: measured")
        figures = measure(table.measures, folders, folder, space)
        seconds["all"] = time.perf_counter() - begun
        content: dict[str, Any] = {"figures": figures, "settings": cell_digest(table, cell, seed, place.configs)}
        content |= {"seconds": seconds, "commit": git_commit(), "versions": package_versions(), "hardware": hardware()}
        write_atomically(folder / CELL, json.dumps(content, indent=2) + "\n")
    return True


def shared_legs(place: Place, table: Table, say: Say) -> dict[str, Path]:
    """Train the shared legs that are not finished, and return their folders; another process's is waited for."""
    folders: dict[str, Path] = {}
    for name, leg in table.shared.items():
        folder = folders[name] = place.shared(name)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not (folder / DONE).exists():
                say(f"shared: {name}")
            train(place, leg, folder, folders)
    return folders


def train(place: Place, leg: Leg, folder: Path, folders: Mapping[str, Path], seed: int | None = None) -> float:
    """Run a leg into `folder` unless it is finished there; return the seconds that this took.

    Raises:
        UserError: the leg failed, or the folder holds one of other settings.
        Interrupted: the leg was stopped before its end.
    """
    digest, begun = leg_digest(leg, place.configs, seed), time.perf_counter()
    if (folder / DONE).exists():
        if (folder / DONE).read_text(encoding="utf-8").strip() != digest:
            raise UserError(f"{folder} was trained under other settings than its configuration has now: remove it.")
        return 0.0
    if leg.recipe == "default_encoder":
        save_default_encoder(folder)
    else:
        _run_recipe(place, leg, folder, folders, seed)
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    write_atomically(folder / DONE, digest + "\n")
    return time.perf_counter() - begun


def overrides_of(leg: Leg, folder: Path, folders: Mapping[str, Path], seed: int | None) -> list[str]:
    """Return the command-line overrides of a leg, with `{name}` replaced by folders."""
    names = {name: str(path) for name, path in folders.items()}
    values = {key: value.format_map(names) if isinstance(value, str) else value for key, value in leg.set.items()}
    values |= {"train.output_dir": str(folder)} | ({} if seed is None else {"train.seed": seed})
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def _run_recipe(place: Place, leg: Leg, folder: Path, folders: Mapping[str, Path], seed: int | None) -> None:
    recipe, config = place.recipes / f"{leg.recipe}.py", place.configs / leg.config
    log = folder.with_name(f"{folder.name}.log")
    code = place.launch([str(recipe), "--config", str(config), *overrides_of(leg, folder, folders, seed)], log)
    if code > 0:
        raise UserError(f"{recipe.name} ended with {code}: {_last_line(log)} ({log}).")
    if code < 0 or not (folder / WEIGHTS).is_file():  # recipes end with 0 if they are asked to stop
        raise Interrupted(f"{recipe.name} was stopped before its end: the same command goes on. {_last_line(log)}")


def _last_line(log: Path) -> str:
    if not log.exists():
        return "it printed nothing"
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it printed nothing"


def save_default_encoder(folder: Path) -> None:
    """Save the vision encoder of the model shipped with the library, as the checkpoint of a vision model."""
    from unimm.mllm import load

    tokenizer = load(device="cpu")[0].image_tokenizer
    tokenizer.encoder.save_pretrained(folder)
    # The encoder's own copy lacks the attention-pooling head; a tokenizer must be built alike to be swapped in.
    tokenizer.config.vision.save_pretrained(folder)


def states(place: Place, name: str, table: Table, seeds: Sequence[int]) -> dict[str, Any]:
    """Return the state of a table for these seeds: its finished cells, their number, and the minutes of the others."""
    keys = [(cell, seed) for cell in table.cells for seed in seeds]
    finished = [key for key in keys if read_cell(place, name, table, *key) is not None]
    state = "to do" if not finished else "done" if len(finished) == len(keys) else "partly"
    minutes = table.minutes * (len(keys) - len(finished))
    return {"state": state, "finished": finished, "cells": len(keys), "minutes": minutes}
