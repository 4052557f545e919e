"""Where a result comes from: the code's commit and the versions that computed it; and files that appear whole."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

RECORDED_PACKAGES = ("unimm", "torch", "transformers", "tokenizers", "accelerate", "trl", "peft", "numpy", "pillow")


def write_atomically(path: str | Path, text: str) -> None:
    """Write a text file so that a reader, or a crash, never sees half of it."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def package_versions() -> dict[str, str]:
    """Python and the packages that decide what a run computes; packages that are not installed are left out."""
    versions = {"python": platform.python_version()}
    for package in RECORDED_PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def git_commit() -> str | None:
    """The commit of the checkout that holds this code (`-dirty` when tracked files differ), None outside a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        # An installed copy may lie inside somebody else's checkout: is this very file tracked there?
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None
