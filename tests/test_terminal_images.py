"""Images in a terminal: which protocol, that they are read back as the same pixels, and that they stay in place."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from unimm.commands.shared import Progress
from unimm.commands.terminal_images import TerminalImages, detect_protocol


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def noise(width: int = 8, height: int = 8) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "24")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM": "xterm-ghostty"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, "iterm"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "WezTerm"}, "iterm"),
        ({"TERM": "xterm-256color", "LC_TERMINAL": "iTerm2"}, "iterm"),
        ({"TERM": "xterm-256color"}, "blocks"),
        ({"TERM": "tmux-256color", "TMUX": "x", "KITTY_WINDOW_ID": "1"}, "blocks"),
        ({"TERM": "screen", "TERM_PROGRAM": "iTerm.app"}, "blocks"),
        ({"TERM": "dumb", "KITTY_WINDOW_ID": "1"}, None),
        ({"TERM": "xterm-256color", "NO_COLOR": "1"}, None),
        ({}, None),
    ],
)
def test_the_protocol_follows_from_the_environment(environment: dict[str, str], expected: str | None) -> None:
    assert detect_protocol(environment) == expected
    assert TerminalImages(Terminal(), environment).protocol == expected
    plain = TerminalImages(io.StringIO(), environment)  # a file, not a terminal
    plain.show([noise()])
    assert not plain.active and plain.stream.getvalue() == ""


def painted(text: str) -> np.ndarray:
    """A tiny terminal: the pixels [rows, columns, 3] of half blocks in 24-bit colors, with cursor movement."""
    rows: dict[int, list] = {}
    line, pen = 0, [0] * 6
    for move, count, color, block, newline in re.findall(r"\x1b\[((\d+)F)|\x1b\[([\d;]+)m|(▀)|(\n)", text):
        if move:
            line -= int(count)
            rows = {number: cells for number, cells in rows.items() if number < line}
        elif block:
            rows.setdefault(line, []).append(list(pen))
        elif newline:
            line += 1
        elif color != "0":
            first, second = re.fullmatch(r"38;2;(\d+;\d+;\d+);48;2;(\d+;\d+;\d+)", color).groups()
            pen = [int(value) for value in (first + ";" + second).split(";")]
    return np.concatenate([np.array(rows[number]).reshape(-1, 2, 3).swapaxes(0, 1) for number in sorted(rows)])


def test_blocks_are_the_pixels_and_replace_the_last_ones() -> None:
    terminal = Terminal()
    images = TerminalImages(terminal, {"TERM": "xterm", "COLORTERM": "truecolor"})
    image = noise(32, 32)
    images.show([Image.new("RGB", (32, 32))])
    images.show([image])
    np.testing.assert_array_equal(painted(terminal.getvalue()), np.asarray(image))
    assert terminal.getvalue().count("\x1b[16F") == 2 and terminal.getvalue().startswith("\n" * 16 + "\x1b[16F")
    wide = Terminal()
    TerminalImages(wide, {"TERM": "xterm", "COLORTERM": "24bit"}).show([image.resize((20, 20)) for _ in range(9)])
    assert painted(wide.getvalue()).shape == (20, 76, 3), "four of nine, side by side, within 80 columns"


def test_256_colors_are_the_nearest_of_the_cube() -> None:
    terminal = Terminal()
    image = noise(32, 32)
    TerminalImages(terminal, {"TERM": "xterm-256color"}).show([image])
    levels = np.array([0, 95, 135, 175, 215, 255])
    expected = np.abs(np.asarray(image)[..., None].astype(int) - levels).argmin(-1) @ [36, 6, 1] + 16
    found = [int(code) for code in re.findall(r"[34]8;5;(\d+)", terminal.getvalue())]
    upper, lower = np.array(found).reshape(16, 32, 2).transpose(2, 0, 1)
    np.testing.assert_array_equal(upper, expected[::2])
    np.testing.assert_array_equal(lower, expected[1::2])


def test_kitty_and_iterm_carry_the_image_and_return_the_cursor() -> None:
    image = noise(64, 64)
    for environment in ({"TERM": "xterm-kitty"}, {"TERM": "xterm", "TERM_PROGRAM": "iTerm.app"}):
        terminal = Terminal()
        images = TerminalImages(terminal, environment)
        images.show([image])
        text = terminal.getvalue()
        if images.protocol == "kitty":
            chunks = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", text)
            assert all(len(data) <= 4096 for _, data in chunks) and len(chunks) > 1
            assert [keys[-3:] for keys, _ in chunks] == ["m=1"] * (len(chunks) - 1) + ["m=0"]
            assert "c=32,r=16" in chunks[0][0]
            data = "".join(data for _, data in chunks)
        else:
            (data,) = re.findall(r"\x1b\]1337;File=inline=1;width=32;height=16;[^:]*:(.*)\x07", text)
        again = Image.open(io.BytesIO(base64.b64decode(data)))
        np.testing.assert_array_equal(np.asarray(again), np.asarray(image))
        assert text.startswith("\n" * 16 + "\x1b[16F\x1b7") and text.endswith("\x1b8\x1b[16E")


def test_a_small_terminal_gets_a_small_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "10")
    monkeypatch.setenv("LINES", "6")
    terminal = Terminal()
    TerminalImages(terminal, {"TERM": "xterm", "COLORTERM": "truecolor"}).show([noise(64, 64)])
    assert painted(terminal.getvalue()).shape == (8, 8, 3)


def test_progress_shows_images_above_its_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TERM": "xterm", "COLORTERM": "truecolor", "NO_COLOR": "", "TMUX": ""}.items():
        monkeypatch.setenv(name, value)
    for name in ("KITTY_WINDOW_ID", "TERM_PROGRAM", "LC_TERMINAL"):
        monkeypatch.delenv(name, raising=False)
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    image = noise(32, 32)
    with Progress("drawing") as progress:
        progress(4, 16)
        progress.show([image], 4, 16)
        progress(16, 16)
        progress.show([image], 16, 16)
    np.testing.assert_array_equal(painted(terminal.getvalue()), np.asarray(image))
    monkeypatch.setattr("sys.stderr", io.StringIO())
    with Progress("drawing") as progress:
        progress.show([image], 16, 16)
    assert "▀" not in progress.images.stream.getvalue()
