"""A run that is asked to stop: it ends its step, saves, says how to go on, and its processes exit with 0 together.

SIGTERM is what schedulers and `accelerate launch` send, SIGUSR1 is Slurm's warning before it, SIGINT is ctrl-C; a
second ctrl-C stops at once. Whoever got the signal tells the other processes by a sum of one number a
step, which is read one step later, so that no device waits for it; and data workers, to whom a scheduler sends the same
signals, do not take them.
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
    if _listening:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


os.register_at_fork(after_in_child=_leave_signals_to_the_parent)


class Interruption:
    """A context manager: within, signals are noted and nothing else happens until `agreed` is asked. Outside of the
    main thread, which alone can listen, signals do what they do anyway."""

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
        """Whether any process was asked to stop. Every process calls it once a step and gets the same answer."""
        if accelerator.num_processes == 1:
            return self.received is not None
        before = self._asked
        mine = torch.tensor(float(self.received is not None), device=accelerator.device)
        self._asked = accelerator.reduce(mine, "sum")
        return before is not None and bool(before)

    def final_log_line(self, checkpoint: Path, step: int, steps: int) -> Interrupted:
        """What to raise when the checkpoint is written."""
        name = self.received.name if self.received else "a signal to another process"
        return Interrupted(
            f"Stopped by {name} after step {step} of {steps}; {checkpoint} is whole. Go on with:\n{resume_command()}"
        )


def resume_command() -> str:
    """The command that this run was started by: the launcher's, where the parent process is one."""
    words = launch_command() or [sys.executable, *sys.argv]
    on_path = shutil.which(Path(words[0]).name)
    return shlex.join([Path(words[0]).name, *words[1:]] if on_path == words[0] else words)
