"""Images in a terminal, drawn in place: the protocols of kitty and iTerm2, else half blocks in ANSI colors.

The protocol follows from environment variables, without a query to the terminal. Inside tmux and screen, which pass no
image on, blocks are drawn. Sources: https://sw.kovidgoyal.net/kitty/graphics-protocol and
https://iterm2.com/documentation-images.html.
"""

import base64
import io
import os
import shutil
from collections.abc import Mapping, Sequence
from typing import TextIO

import numpy as np
from PIL import Image

_COLUMNS, _SHOWN = 32, 4  # width of an image, and how many stand side by side at most
_CHUNK = 4096  # kitty's limit for one escape sequence


def detect_protocol(environment: Mapping[str, str]) -> str | None:
    """Return "kitty", "iterm" or "blocks" for a terminal with these environment variables, None without colors."""
    term, program = environment.get("TERM", ""), environment.get("TERM_PROGRAM", "")
    if term in ("", "dumb") or environment.get("NO_COLOR"):
        return None
    if environment.get("TMUX") or term.startswith(("screen", "tmux")):
        return "blocks"
    if environment.get("KITTY_WINDOW_ID") or term in ("xterm-kitty", "xterm-ghostty") or program == "ghostty":
        return "kitty"
    if program in ("iTerm.app", "WezTerm") or environment.get("LC_TERMINAL") == "iTerm2":
        return "iterm"
    return "blocks"


class TerminalImages:
    """A place in a terminal, `stream`, where images are shown side by side, each time over the last ones.

    If the stream is no terminal that can show them (`active`), `show` writes nothing.
    """

    def __init__(self, stream: TextIO, environment: Mapping[str, str] | None = None) -> None:
        self.stream, self.environment = stream, os.environ if environment is None else environment
        self.protocol = detect_protocol(self.environment) if stream.isatty() else None
        self.lines = 0  # of the images that are shown, above the cursor

    @property
    def active(self) -> bool:
        """Return whether the stream is a terminal that can show images."""
        return self.protocol is not None

    def show(self, images: Sequence[Image.Image]) -> None:
        """Draw the first images over those of the last call; the cursor ends in the line below."""
        if self.protocol is None:
            return
        strip, columns, lines = self._strip(images)
        if lines != self.lines:  # the first time: make room, which may scroll
            self.stream.write("\n" * lines)
            self.lines = lines
        up, down = f"\x1b[{lines}F", f"\x1b[{lines}E"
        if self.protocol == "blocks":
            self.stream.write(up + self._blocks(strip.resize((columns, 2 * lines), Image.Resampling.BOX)))
        else:
            encode = _kitty if self.protocol == "kitty" else _iterm
            self.stream.write(f"{up}\x1b7{encode(strip, columns, lines)}\x1b8{down}")
        self.stream.flush()

    def _strip(self, images: Sequence[Image.Image]) -> tuple[Image.Image, int, int]:
        """Return images side by side as one, and the columns and lines that it takes."""
        size = shutil.get_terminal_size()
        shown = list(images)[:_SHOWN]
        width = max(1, min(_COLUMNS, (size.columns - 1) // len(shown)))
        tall = max(image.height / image.width for image in shown)
        lines = max(1, min(round(width * tall / 2), size.lines - 2))
        width = max(1, min(width, round(2 * lines / tall)))
        side = (max(image.width for image in shown), max(image.height for image in shown))
        strip = Image.new("RGB", (side[0] * len(shown), side[1]))
        for number, image in enumerate(shown):
            strip.paste(image.convert("RGB"), (number * side[0], 0))
        return strip, width * len(shown), lines

    def _blocks(self, image: Image.Image) -> str:
        """Return lines of `▀`: the foreground is the upper pixel, the background the lower one."""
        exact = self.environment.get("COLORTERM") in ("truecolor", "24bit")
        color = _exact if exact else _nearest
        pixels, text = np.asarray(image).tolist(), []
        for upper, lower in zip(pixels[::2], pixels[1::2], strict=True):
            cells = (f"\x1b[38;{color(a)};48;{color(b)}m▀" for a, b in zip(upper, lower, strict=True))
            text.append("".join(cells) + "\x1b[0m\n")
        return "".join(text)


def _exact(color: Sequence[int]) -> str:
    return "2;{};{};{}".format(*color)


def _nearest(color: Sequence[int]) -> str:
    """Return the nearest color of the 6 x 6 x 6 cube (0, 95, 135, ..., 255) of terminals with 256 colors."""
    red, green, blue = (0 if value < 48 else max((value - 36) // 40, 1) for value in color)
    return f"5;{16 + 36 * red + 6 * green + blue}"


def _png(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _kitty(image: Image.Image, columns: int, lines: int) -> str:
    """Return the image as kitty's escape sequences; the same id replaces the last one."""
    data = _png(image)
    chunks = [data[start : start + _CHUNK] for start in range(0, len(data), _CHUNK)]
    keys = f"a=T,f=100,q=2,C=1,i={os.getpid() % 2**31 or 1},p=1,c={columns},r={lines},"
    sent = [f"m={int(chunk is not chunks[-1])};{chunk}" for chunk in chunks]
    return "".join(f"\x1b_G{keys if n == 0 else ''}{chunk}\x1b\\" for n, chunk in enumerate(sent))


def _iterm(image: Image.Image, columns: int, lines: int) -> str:
    return f"\x1b]1337;File=inline=1;width={columns};height={lines};preserveAspectRatio=0:{_png(image)}\x07"
