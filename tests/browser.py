"""Pages in a real browser, where one is installed."""

import shutil
import subprocess
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium or chromium-browser on PATH")


def browse(page: Path, *options: str, height: int = 2200) -> str:
    """Open a page without a window; what `options` ask Chromium to print."""
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--window-size=1100,{height}", f"--user-data-dir={page.parent / 'profile'}"]
    done = subprocess.run([*command, *options, page.as_uri()], check=True, capture_output=True, timeout=240)
    return done.stdout.decode()
