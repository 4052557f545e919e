"""Errors that users can fix, as opposed to bugs in unimm.

A `UserError` is one clear sentence: what was wrong, the numbers on both sides, and what to do. The command line and the
recipes print it as one line without a traceback and exit with code 2; any other exception is a bug and keeps its
traceback.
"""

import errno
import io
import os
import re
import reprlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from unimm.launched import close_process_group, has_process_group, say_last

USER_ERROR_EXIT_CODE = 2


class UserError(ValueError):
    """An error that the user can fix, in one sentence: what was wrong and what to do about it."""


class Interrupted(Exception):
    """A run was asked to stop and saved its state; the message says how to resume. The exit code is 0."""


_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxother = _SHOWN.maxlong = 100


def shown(value: object) -> str:
    """Return the value's `repr` for a message, truncated to about one line."""
    return _SHOWN.repr(value)


_FROM_A_WORKER = re.compile(r"Caught (\w+) in DataLoader worker")


def one_line(error: BaseException) -> str:
    """Return the error's message on one line, with whitespace collapsed.

    If torch re-raised a `UserError` from a DataLoader worker, the worker's traceback is removed from the message.
    """
    text = str(error)
    worker = _FROM_A_WORKER.match(text) if isinstance(error, UserError) else None
    if worker:
        text = text.rpartition(f"{worker[1]}: ")[2]
    return " ".join(text.split())


def printable(text: str) -> str:
    """Return the text with characters that UTF-8 cannot encode (undecodable bytes of file names, lone surrogates)
    escaped as \\udcff, which JSON parses as that character."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def require_place(what: str, source: str | None) -> None:
    """Raise UserError if `source` can only be a local path and does not exist.

    Checked before a library takes the path for a hub id, or before an expensive build that needs it later. A hub id has
    at most one slash, and its owner is not a local folder.
    """
    if source is None or Path(source).exists():
        return
    first, *rest = Path(source).parts or ("",)
    if len(rest) > 1 or first in (os.sep, "..", "~") or source.startswith("./") or (rest and Path(first).is_dir()):
        raise UserError(f"{what}: there is no {source}.")


@contextmanager
def reading(what: str, source: str | Path) -> Iterator[None]:
    """Convert any exception that a library raises while it reads `source` into a one-sentence `UserError`.

    A local path that does not exist raises before the library takes it for a hub id.
    """
    require_place(what, str(source))
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # tokenizers raises bare Exception, and a damaged file can fail anywhere in a library
        raise UserError(f"{what} {source} cannot be read ({type(error).__name__}): {one_line(error)[:300]}") from error


_REFUSALS = frozenset(
    (
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EFBIG,
        errno.EIO,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.EEXIST,
        errno.ENAMETOOLONG,
        errno.ELOOP,
    )
)
_FROM_RUST = re.compile(r"\(os error (\d+)\)")
_FROM_TORCH = re.compile(r"PytorchStreamWriter|inline_container|Parent directory .* does not exist")


def disk_refusal(error: BaseException) -> str | None:
    """Return the system's message for a failed write (disk full, no permission, file in the way), or None for others.

    safetensors and torch wrap these failures in exceptions of their own, recognized here by their text.
    """
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, SafetensorError) and (found := _FROM_RUST.search(str(error))):
        number = int(found[1])
    if number in _REFUSALS:
        return os.strerror(int(number))
    if isinstance(error, RuntimeError) and _FROM_TORCH.search(str(error)):
        return "the file could not be written to its end, the disk may be full"
    return None


@contextmanager
def writing(what: str, place: str | Path) -> Iterator[None]:
    """Convert a failed write (see `disk_refusal`) to `place` into a one-sentence `UserError`."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        refusal = disk_refusal(error)
        if refusal is None:
            raise
        raise UserError(f"Cannot write {what} {place}: {refusal}.") from error


def run_main(main: Callable[[], int | None], *, name: str = "unimm") -> int:
    """Run a program's `main` and return its exit code.

    A `UserError` or a failed write (disk full, no permission) is printed as one line on standard error and returns 2;
    an `Interrupted` is printed and returns 0. A process group that `main` opened is closed then
    (see `close_process_group`).

    Recipes and eval drivers end with `sys.exit(run_main(main, name="sft"))`.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names may hold bytes that are not UTF-8
    inside_a_group = has_process_group()
    # any other exception leaves the group open: its frames hold it, and waiting could hang
    code = _exit_code(main, name)
    if not inside_a_group:
        close_process_group(failed=code != 0)
    return code


def _exit_code(main: Callable[[], int | None], name: str) -> int:
    try:
        return main() or 0
    except Interrupted as pause:
        print(pause, flush=True)
        return 0
    except UserError as error:
        return refuse(name, error)
    except (OSError, SafetensorError, RuntimeError) as error:
        refusal = disk_refusal(error)
        if refusal is None:
            raise
        place = getattr(error, "filename", None)
        return refuse(name, UserError(f"Cannot write{f' {place}' if place else ''}: {refusal}."))


def refuse(name: str, error: UserError) -> int:
    """Print the error as the last line of output (also behind a launcher's traceback) and return the exit code."""
    say_last(f"{name}: error: {one_line(error)}")
    return USER_ERROR_EXIT_CODE
