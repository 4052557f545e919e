"""A program that `accelerate launch` or torchrun started, and its last word.

A launcher answers a program that fails with a traceback of its own, which buries the one line that says what was
wrong. So the line is said where it happens and again behind the launcher: a small process waits for its end, whatever
it writes until then, says the line, and goes. Of several processes that fail the first one's line is said.
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
"""Seconds after which the line is said though the launcher is still there."""

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
    """Return the words of the launcher that is this process' parent, as they were given; none if it is no launcher."""
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
    """Print the line on standard error, and again when the launcher of this process, if there is one, has ended."""
    print(line, file=sys.stderr, flush=True)
    if not launch_command():
        return
    launcher = psutil.Process(os.getppid())
    begun = repr(launcher.create_time())
    name = hashlib.sha256(f"{launcher.pid} {begun}".encode()).hexdigest()[:16]
    claim = Path(tempfile.gettempdir()) / f"unimm-last-word-{name}"
    try:
        claim.touch(exist_ok=False)
    except OSError:  # another process of this launch has said what was wrong first
        return
    subprocess.Popen(
        [sys.executable, "-c", _LAST_WORD, str(launcher.pid), begun, line, str(claim)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # the launcher ends the processes of its own group
    )
