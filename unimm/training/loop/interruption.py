"""Graceful interruption: on a signal, a run finishes its step, saves, prints the resume command, and all its processes
exit with 0 together.

Schedulers and `accelerate launch` send SIGTERM, Slurm warns with SIGUSR1 before it, and ctrl-C sends SIGINT; a second
ctrl-C stops at once. Processes agree by an all-reduce of one number per step, which is read one step later, so that no
device waits for it. Data workers, to which a scheduler sends the same signals, block them.
"""

import os
import shlex
import shutil
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Self

import torch
from accelerate import Accelerator
from torch import Tensor

from unimm.errors import Interrupted
from unimm.launched import launch_command

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

_listening = False


def _leave_signals_to_the_parent() -> None:
    """Block the signals in a forked data worker: the training process needs it until the checkpoint is written."""
    if _listening:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


os.register_at_fork(after_in_child=_leave_signals_to_the_parent)


class Interruption:
    """A context manager that records signals, which take effect when `agreed` is called. Outside of the main thread,
    which alone can install handlers, signals keep their default behavior."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}
        self._asked: Tensor | None = None

    def __enter__(self) -> Self:
        global _listening
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
            _listening = True
        return self

    def __exit__(self, *_: object) -> None:
        global _listening
        _listening = False
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)

    def agreed(self, accelerator: Accelerator) -> bool:
        """Return whether any process received a signal; call it on every process once per step, and all get the same
        result."""
        if accelerator.num_processes == 1:
            return self.received is not None
        before = self._asked
        mine = torch.tensor(float(self.received is not None), device=accelerator.device)
        self._asked = accelerator.reduce(mine, "sum")
        return before is not None and bool(before)

    def final_log_line(self, checkpoint: Path, step: int, steps: int) -> Interrupted:
        """Return the exception to raise after the checkpoint is written."""
        name = self.received.name if self.received else "a signal to another process"
        return Interrupted(
            f"Stopped by {name} after step {step} of {steps}; {checkpoint} is whole. Go on with:\n{resume_command()}"
        )


def resume_command() -> str:
    """Return the command that started this run, including the launcher's if there is one."""
    words = launch_command() or [sys.executable, *sys.argv]
    on_path = shutil.which(Path(words[0]).name)
    return shlex.join([Path(words[0]).name, *words[1:]] if on_path == words[0] else words)
