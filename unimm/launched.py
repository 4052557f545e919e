"""The end of a program that `accelerate launch` or torchrun started: its last error line, and its process group.

If a program fails, its launcher prints a traceback of its own, which buries the line that says what was wrong. So the
line is printed at once and again after the launcher: a small detached process waits until the launcher has ended,
prints the line and exits. If several ranks fail, only the first one's line is repeated.

A program that ends with an open process group can abort after all its work is done. Threads of gloo release the tensors
of the last collective after it has returned; if the interpreter is shutting down by then, the release ends in SIGABRT
("terminate called without an active exception"). So the group is closed first, which joins these threads.
"""

import gc
import hashlib
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import psutil

LAUNCHERS = ("accelerate", "torchrun", "torch", "deepspeed")
PATIENCE = 60
"""Seconds after which the line is printed even if the launcher is still running."""
CLOSING_SECONDS = 10
"""Seconds for which a failed program waits for its process group to close."""

_LAST_WORD = f"""
import os, psutil, sys, time
number, begun, line, claim = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3], sys.argv[4]
end = time.monotonic() + {PATIENCE}
while time.monotonic() < end:
    try:
        launcher = psutil.Process(number)
        if launcher.create_time() != begun or launcher.status() == psutil.STATUS_ZOMBIE:
            break
    except psutil.NoSuchProcess:
        break
    time.sleep(0.02)
os.unlink(claim)
print(line, file=sys.stderr, flush=True)
"""


def launch_command() -> list[str]:
    """Return the parent process's command line if the parent is a launcher, else an empty list."""
    try:
        parent = psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        return []
    names = [Path(word).name.partition(".")[0] for word in parent[:3]]
    if names[1:2] and names[1] in LAUNCHERS:  # python /somewhere/bin/accelerate launch ...
        return parent[1:]
    if names[1:2] == ["-m"] and names[2:] and names[2] in LAUNCHERS:
        return parent
    return []


def say_last(line: str) -> None:
    """Print the line on standard error, and again after this process's launcher, if it has one, has ended."""
    print(line, file=sys.stderr, flush=True)
    if not launch_command():
        return
    launcher = psutil.Process(os.getppid())
    begun = repr(launcher.create_time())
    name = hashlib.sha256(f"{launcher.pid} {begun}".encode()).hexdigest()[:16]
    claim = Path(tempfile.gettempdir()) / f"unimm-last-word-{name}"
    try:
        claim.touch(exist_ok=False)
    except OSError:  # another rank of this launch was first
        return
    subprocess.Popen(
        [sys.executable, "-c", _LAST_WORD, str(launcher.pid), begun, line, str(claim)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # the launcher kills the processes of its own group
    )


def has_process_group() -> bool:
    """Return whether torch.distributed has a process group in this process; torch is not imported to find out."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def close_process_group(*, failed: bool) -> None:
    """Close the process group of this program, if it has one, as the last thing before the interpreter shuts down.

    There is no barrier. A process closes its own end only, and one that is done must not wait, up to the timeout of a
    collective, for one that still works alone.

    Args:
        failed: the other processes may still work and collectives may be pending. Only a group with gloo is closed, and
            if pending collectives keep it open for `CLOSING_SECONDS`, it is left open: the program must end for its
            launcher to stop the others. NCCL has no such threads, and waits for its peers.
    """
    if not has_process_group():
        return
    if not failed:
        _close()
    elif "gloo" in sys.modules["torch.distributed"].get_backend():
        closing = threading.Thread(target=_close, daemon=True)
        closing.start()
        closing.join(CLOSING_SECONDS)


def _close() -> None:
    sys.modules["torch.distributed"].destroy_process_group()
    gc.collect()  # the threads end with the last reference to the group, and a trainer's model in DDP is in cycles
