"""Print a final error line below the output of `accelerate launch` or torchrun.

If a program fails, its launcher prints a traceback of its own, which buries the line that says what was wrong. So the
line is printed at once and again after the launcher: a small detached process waits until the launcher has ended,
prints the line and exits. If several ranks fail, only the first one's line is repeated.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil

LAUNCHERS = ("accelerate", "torchrun", "torch", "deepspeed")
PATIENCE = 60
"""Seconds after which the line is printed even if the launcher is still running."""

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
