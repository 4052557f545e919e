"""What goes wrong for a person at the keyboard, as opposed to what goes wrong for us.

A `UserError` is one clear sentence: what was wrong, the numbers on both sides, and what to do. The command line and the
recipes print it as one line without a traceback and exit with code 2; all else is a defect and keeps its traceback.
"""

import io
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

USER_ERROR_EXIT_CODE = 2


class UserError(ValueError):
    """One sentence for the person at the keyboard: what was wrong and what to do about it."""


class Interrupted(Exception):
    """A run was asked to stop and has saved all: what to do to go on. A program that ends with it ends well."""


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


@contextmanager
def reading(what: str, source: str | Path) -> Iterator[None]:
    """Within, `source` is being read by a library: what it raises about it becomes a `UserError`, in one sentence.

    An absolute path that does not exist is refused before the library takes it for a hub id.
    """
    if Path(source).is_absolute() and not Path(source).exists():
        raise UserError(f"{what}: there is no {source}.")
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{what} {source} cannot be read ({type(error).__name__}): {one_line(error)[:300]}") from error


def run_main(main: Callable[[], int | None], *, name: str = "unimm") -> int:
    """Run a program's `main` and return its exit code; a `UserError` becomes one line on standard error and code 2, an
    `Interrupted` is printed and becomes 0.

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
        print(f"{name}: error: {one_line(error)}", file=sys.stderr)
        return USER_ERROR_EXIT_CODE
