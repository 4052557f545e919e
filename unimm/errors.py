"""What goes wrong for a person at the keyboard, as opposed to what goes wrong for us.

A `UserError` is one clear sentence: what was wrong, the numbers on both sides, and what to do. The command line and the
recipes print it as one line without a traceback and exit with code 2; all else is a defect and keeps its traceback.
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

from unimm.launched import say_last

USER_ERROR_EXIT_CODE = 2


class UserError(ValueError):
    """One sentence for the person at the keyboard: what was wrong and what to do about it."""


class Interrupted(Exception):
    """A run was asked to stop and has saved all: what to do to go on. A program that ends with it ends well."""


_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxother = _SHOWN.maxlong = 100


def shown(value: object) -> str:
    """Return the value as a message shows it: its `repr`, cut to about a line whatever its size."""
    return _SHOWN.repr(value)


_FROM_A_WORKER = re.compile(r"Caught (\w+) in DataLoader worker")


def one_line(error: BaseException) -> str:
    """The error's message with every run of white space, line breaks included, made one space; of a `UserError` that
    torch brought here from a worker process without the traceback that it wraps around."""
    text = str(error)
    worker = _FROM_A_WORKER.match(text) if isinstance(error, UserError) else None
    if worker:
        text = text.rpartition(f"{worker[1]}: ")[2]
    return " ".join(text.split())


def printable(text: str) -> str:
    """Return the text with every character that UTF-8 lacks (a byte of a file's name, half a character) written out as
    \\udcff, which JSON reads as that character."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def require_place(what: str, source: str | None) -> None:
    """Raise UserError if `source` can only be a local path, and nothing is there: looked at before a library takes it
    for a hub id, or a model is built that needs it later.

    A hub id has one slash at most, and an owner that is no folder here.
    """
    if source is None or Path(source).exists():
        return
    first, *rest = Path(source).parts or ("",)
    if len(rest) > 1 or first in (os.sep, "..", "~") or source.startswith("./") or (rest and Path(first).is_dir()):
        raise UserError(f"{what}: there is no {source}.")


@contextmanager
def reading(what: str, source: str | Path) -> Iterator[None]:
    """Within, `source` is being read by a library: what it raises about it becomes a `UserError`, in one sentence.

    A local path that does not exist is refused before the library takes it for a hub id.
    """
    require_place(what, str(source))
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # tokenizers raises bare ones, and damaged files reach any line of a library
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
    """Return what the disk refused (no room, no permission, a file in the way) in the system's words, None for an error
    of another kind. safetensors and torch raise errors of their own for it."""
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
    """Within, `place` is being written: what the disk refuses becomes a `UserError`, in one sentence."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        refusal = disk_refusal(error)
        if refusal is None:
            raise
        raise UserError(f"Cannot write {what} {place}: {refusal}.") from error


def run_main(main: Callable[[], int | None], *, name: str = "unimm") -> int:
    """Run a program's `main` and return its exit code; a `UserError`, or a disk that is full or closed to us, becomes
    one line on standard error and code 2, an `Interrupted` is printed and becomes 0.

    Recipes and eval drivers end with `sys.exit(run_main(main, name="sft"))`.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # the name of a file may hold bytes that are no UTF-8
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
    """Say the error as one line, the last one of all that is said, and return the exit code."""
    say_last(f"{name}: error: {one_line(error)}")
    return USER_ERROR_EXIT_CODE
