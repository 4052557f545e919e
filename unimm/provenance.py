"""Where a result comes from: the code's commit, the versions and the weights that computed it; and files that appear
whole."""

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

RECORDED_PACKAGES = ("unimm", "torch", "transformers", "tokenizers", "accelerate", "trl", "peft", "numpy", "pillow")
UNRELATED_SETTINGS = frozenset({"_name_or_path", "architectures", "dtype", "transformers_version"})
"""Of a configuration: where it was read and by what; the dtype is told by the weights themselves."""


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


def model_fingerprint(model: Any) -> str:
    """sha256 over all that a model computes with: its settings, its defaults of generation, its weights.

    Where the files lie, how they were cut and which library version wrote them does not matter; the dtype does.
    """
    import torch

    digest = hashlib.sha256()
    for config in (getattr(model, "config", None), getattr(model, "generation_config", None)):
        to_dict = getattr(config, "to_dict", None)  # a network of another library has none
        settings = None if to_dict is None else _related(to_dict())
        digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _related(settings: Any) -> Any:
    """The settings without `UNRELATED_SETTINGS`, at any depth."""
    if isinstance(settings, dict):
        return {str(name): _related(value) for name, value in settings.items() if name not in UNRELATED_SETTINGS}
    return settings
