"""What a launched program says when it fails comes last, behind what its launcher says of it."""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from unimm import launched
from unimm.launched import say_last

PROGRAM = """
import os, sys, time
from unimm.errors import UserError, run_main

def main():
    time.sleep(float(os.environ.get("LOCAL_RANK", 0)))
    raise UserError("the rows are gone:\\n fetch them")

sys.exit(run_main(main, name="recipe"))
"""
LINE = "recipe: error: the rows are gone: fetch them"
LAUNCHERS = {
    "accelerate": ["-m", "accelerate.commands.accelerate_cli", "launch", "--num_cpu_threads_per_process", "1"],
    "torchrun": ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"],
}


def claims() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob("unimm-last-word-*"))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_sentence_is_the_last_line(tmp_path: Path, launcher: str) -> None:
    (tmp_path / "recipe.py").write_text(PROGRAM)
    before = claims()
    command = [sys.executable, *LAUNCHERS[launcher], str(tmp_path / "recipe.py")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    lines = ended.stderr.splitlines()
    assert ended.returncode == 1
    assert lines[-1] == LINE, ended.stderr
    assert "Traceback (most recent call last):" in lines
    assert lines.count(LINE) >= 2 and lines.index(LINE) < lines.index("Traceback (most recent call last):")
    assert claims() == before


def test_no_launcher_nothing_to_wait_for(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(launched, "launch_command", list)
    monkeypatch.setattr(launched.subprocess, "Popen", None)
    say_last("a line")
    assert capfd.readouterr().err == "a line\n"


def test_a_line_comes_behind_the_launchers_end_and_once(tmp_path: Path) -> None:
    """Without torch: a parent whose name is a launcher's, two children that fail one after the other."""
    launcher = tmp_path / "torchrun"
    child = f"import runpy, sys; runpy.run_path({launched.__file__!r})['say_last']('line ' + sys.argv[1])"
    launcher.write_text(
        "import subprocess, sys, time\n"
        f"for n in '12':\n    subprocess.run([sys.executable, '-c', {child!r}, n])\n"
        "time.sleep(0.5)\nprint('Traceback: much more', file=sys.stderr, flush=True)\nsys.exit(1)\n"
    )
    ended = subprocess.run([sys.executable, str(launcher)], capture_output=True, text=True, timeout=300)
    assert ended.stderr.splitlines() == ["line 1", "line 2", "Traceback: much more", "line 1"]
    deadline = time.monotonic() + 5
    while any("unimm-last-word" in " ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"])):
        assert time.monotonic() < deadline, "the small process goes"
        time.sleep(0.05)
