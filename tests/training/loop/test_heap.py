"""Freed memory goes back to the system."""

import platform
import subprocess
import sys

import pytest

ROOM = """
from pathlib import Path

from unimm.training.loop.heap import release_heap


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


blocks = [bytes([n % 251 + 1]) * 50_000 for n in range(4000)]
pin = [bytes([1]) * 50_000 for n in range(3)]  # the end of the heap stays in use, so free memory below it is kept
full = resident()
del blocks
freed = resident()
release_heap()
print(full - freed, full - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is asked to release memory")
def test_memory_that_was_freed_is_released() -> None:
    done = subprocess.run([sys.executable, "-c", ROOM], capture_output=True, text=True, check=True)
    by_itself, asked = map(int, done.stdout.split())
    assert by_itself < 20e6 and asked > 150e6  # of 200 MB
