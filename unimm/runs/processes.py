"""Helpers for distributed runs: raise an error on all ranks together, and lock the run's folder."""

import os
import platform
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout

from unimm.errors import UserError
from unimm.runs.provenance import write_atomically

LOCK, WRITER = ".lock", ".writer"


def processes() -> PartialState:
    """Return the processes of this run; without `cpu`, accelerate treats two CPU processes as two separate runs."""
    return PartialState(cpu=not torch.accelerator.is_available())


def refuse_together(check: Callable[[], None]) -> None:
    """Run `check` on the main process and raise its `UserError` on every process; call it on all of them."""
    state, message = processes(), ""
    if state.is_main_process:
        try:
            check()
        except UserError as error:
            message = str(error)
    if state.num_processes > 1:
        (message,) = broadcast_object_list([message])
    if message:
        raise UserError(message)


def lock_folder(folder: Path) -> FileLock:
    """Lock an existing folder until this process ends; the operating system releases the lock, even after a crash.

    Raises:
        UserError: another process holds the lock; the message says which.
    """
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        writer = (folder / WRITER).read_text(encoding="utf-8") if (folder / WRITER).exists() else "another process"
        raise UserError(f"{writer} is writing into {folder}: wait for it, or choose another folder.") from None
    write_atomically(folder / WRITER, f"Process {os.getpid()} on {platform.node()}")
    return lock
