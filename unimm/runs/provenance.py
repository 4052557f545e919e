"""Record a result's provenance (git commit, package versions, weights, hardware), and write files atomically."""

import hashlib
import importlib.metadata
import json
import os
import platform
import secrets
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from unimm.errors import UserError, writing

RECORDED_PACKAGES = ("unimm", "torch", "transformers", "tokenizers", "accelerate", "trl", "peft", "numpy", "pillow")
UNRELATED_SETTINGS = frozenset({"_name_or_path", "architectures", "dtype", "transformers_version"})
"""Configuration fields that a fingerprint ignores: where and by what it was loaded; the weights carry the dtype."""


def check_output(path: str | Path, what: str = "file") -> Path:
    """Return the path if a file can be written there; call it before the work whose result goes there.

    Raises:
        UserError: a folder, device, pipe or socket has that name, a parent is not a folder, or it is not writable.
    """
    path = Path(path)
    if "\0" in str(path):
        raise UserError(f"Cannot write the {what} {str(path)!r}: a file's name holds no NUL.")
    with writing(f"the {what}", path):
        if path.is_dir():
            raise UserError(f"Cannot write the {what} {path}: a folder has that name.")
        if path.exists() and not path.is_file():
            raise UserError(
                f"Cannot write the {what} {path}: it is a device, a pipe or a socket, and only files are replaced."
            )
        parent = next((parent for parent in path.parents if os.path.lexists(parent)), Path())
        if not parent.is_dir():
            raise UserError(f"Cannot write the {what} {path}: {parent} is a file, not a folder.")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise UserError(f"Cannot write the {what} {path}: {parent} may not be written to.")
    return path


def _target(path: Path) -> Path:
    """Return the real path of a file: symbolic links are followed, not replaced."""
    return Path(os.path.realpath(path))


@contextmanager
def appearing(path: str | Path, what: str = "file") -> Iterator[Path]:
    """Yield a temporary path to write to, and rename it to `path` on success.

    The file is flushed to disk before the rename, so readers never see a partial file, even after a crash. Missing
    folders are created; a failure leaves nothing behind.

    Raises:
        UserError: as in `check_output`, or the disk is full.
    """
    path = check_output(path, what)
    target = _target(path)
    made: list[Path] = []
    temporary = target.with_name(f".{secrets.token_hex(6)}.tmp")
    try:
        with writing(f"the {what}", path):
            made = make_folders(target.parent)
            yield temporary
            flush(temporary)
            temporary.replace(target)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
        raise


def flush(path: Path) -> None:
    """Flush a file, or a folder's list of files, to disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folders(folder: Path) -> list[Path]:
    """Create the folder and its missing parents, and return those that were created, the deepest first."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for each in reversed(missing):
        each.mkdir(exist_ok=True)
    return missing


def write_atomically(path: str | Path, content: str | bytes, what: str = "file") -> None:
    """Write a file atomically, see `appearing`."""
    with appearing(path, what) as temporary:
        # backslashreplace: texts may contain undecodable file names (lone surrogates)
        temporary.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "backslashreplace"))


def package_versions() -> dict[str, str]:
    """Return the versions of Python and the packages that affect results; packages not installed are left out."""
    versions = {"python": platform.python_version()}
    for package in RECORDED_PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def hardware() -> dict[str, str]:
    """Return the CPU and GPU models that a run may use, with the versions of CUDA and cuDNN.

    The same weights lead to different verdicts on another GPU model, and to different last bits on another CPU.
    """
    import torch

    found = {"cpu": _cpu_model(), "cpu_capability": torch.backends.cpu.get_cpu_capability()}
    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
        found |= {"gpu": ", ".join(sorted(names)), "cuda": str(torch.version.cuda)}
        found["cudnn"] = str(torch.backends.cudnn.version())
    elif torch.backends.mps.is_available():
        found["gpu"] = "Apple MPS"
    return found


def _cpu_model() -> str:
    """Return the CPU's name as the system reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine() or "unknown"


def git_commit() -> str | None:
    """Return the git commit of this code (with `-dirty` if tracked files differ), None outside a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        # An installed copy may lie inside somebody else's checkout: is this very file tracked there?
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def file_sha256(path: str | Path) -> str:
    """Return the sha256 of a file's bytes."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def model_fingerprint(model: Any) -> str:
    """Return a sha256 over everything that a model computes with: configuration, generation defaults and weights.

    The files' location, their sharding and the library version that wrote them do not matter; the dtype does.
    """
    import torch

    digest = hashlib.sha256()
    for config in (getattr(model, "config", None), getattr(model, "generation_config", None)):
        to_dict = getattr(config, "to_dict", None)  # models of other libraries have no such config
        settings = None if to_dict is None else _related(to_dict())
        digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _related(settings: Any) -> Any:
    """Return the configuration without `UNRELATED_SETTINGS`, at any depth."""
    if isinstance(settings, dict):
        return {str(name): _related(value) for name, value in settings.items() if name not in UNRELATED_SETTINGS}
    return settings
