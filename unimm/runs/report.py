"""What a command did, for a person and for a program: said on standard output, written as one JSON object if asked."""

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
    """Put the seconds spent inside, divided by `share`, into `seconds[name]`."""
    start = time.perf_counter()
    yield
    seconds[name] = round((time.perf_counter() - start) / max(1, share), 4)


def finite(tree: Any, infinite: list[str], place: str = "") -> Any:
    """Return a tree of plain values with None for floats that are not finite, whose dotted places go to `infinite`."""
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
    """Collects what `--json FILE` writes.

    Args:
        path: the file, `-` for standard output, None for no report.

    Raises:
        UserError: the file cannot be written where it is asked for (told before the work, not after it).
    """

    def __init__(self, path: str | None) -> None:
        self.path = path
        self.content: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}
        if path is not None and path != STANDARD_OUTPUT:
            check_output(path, "report")

    def add(self, **content: Any) -> None:
        """Add fields to the object."""
        self.content |= content

    def timed(self, name: str, *, share: int = 1) -> contextlib.AbstractContextManager[None]:
        """Put the seconds spent inside, divided by `share`, under `seconds`."""
        return timed(self.seconds, name, share=share)

    def say(self, text: str) -> None:
        """Tell a person; when standard output carries the JSON object, on standard error."""
        print(text, file=sys.stderr if self.path == STANDARD_OUTPUT else sys.stdout, flush=True)

    def write(self) -> None:
        """Write the object, if one was asked for. Figures that are not finite, which JSON does not know, become null
        and are named under `not_finite`."""
        infinite: list[str] = []
        content = finite(self.content | {"seconds": self.seconds}, infinite)
        if infinite:
            content["not_finite"] = infinite
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        if self.path == STANDARD_OUTPUT:
            print(text, end="", flush=True)
        elif self.path is not None:
            write_atomically(self.path, text, "report")
