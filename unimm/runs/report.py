"""Report what a command did: messages for people on standard output, and optionally one JSON object for programs."""

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterator
from typing import Any

from unimm.runs.provenance import check_output, write_atomically

STANDARD_OUTPUT = "-"


@contextlib.contextmanager
def timed(seconds: dict[str, float], name: str, *, share: int = 1) -> Iterator[None]:
    """Store the seconds spent inside, divided by `share`, in `seconds[name]`."""
    start = time.perf_counter()
    yield
    seconds[name] = round((time.perf_counter() - start) / max(1, share), 4)


def finite(tree: Any, infinite: list[str], place: str = "") -> Any:
    """Return the tree with None for floats that are not finite, and append their dotted paths to `infinite`."""
    if isinstance(tree, dict):
        return {
            name: finite(value, infinite, f"{place}.{name}" if place else str(name)) for name, value in tree.items()
        }
    if isinstance(tree, list | tuple):
        return [finite(value, infinite, f"{place}[{index}]") for index, value in enumerate(tree)]
    if isinstance(tree, float) and not math.isfinite(tree):
        infinite.append(place)
        return None
    return tree


class Report:
    """The report of a command, written by `--json FILE`.

    Args:
        path: the file, `-` for standard output, None for no report.

    Raises:
        UserError: the file cannot be written (raised on construction, before the work).
    """

    def __init__(self, path: str | None) -> None:
        self.path = path
        self.content: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}
        if path is not None and path != STANDARD_OUTPUT:
            check_output(path, "report")

    def add(self, **content: Any) -> None:
        """Add fields to the JSON object."""
        self.content |= content

    def timed(self, name: str, *, share: int = 1) -> contextlib.AbstractContextManager[None]:
        """Store the seconds spent inside, divided by `share`, under `seconds`."""
        return timed(self.seconds, name, share=share)

    def say(self, text: str) -> None:
        """Print a message, on standard error if standard output carries the JSON object."""
        print(text, file=sys.stderr if self.path == STANDARD_OUTPUT else sys.stdout, flush=True)

    def write(self) -> None:
        """Write the JSON object, if requested. Floats that are not finite, which JSON lacks, become null and are listed
        under `not_finite`."""
        infinite: list[str] = []
        content = finite(self.content | {"seconds": self.seconds}, infinite)
        if infinite:
            content["not_finite"] = infinite
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        if self.path == STANDARD_OUTPUT:
            print(text, end="", flush=True)
        elif self.path is not None:
            write_atomically(self.path, text, "report")
