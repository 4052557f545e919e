"""README promises nothing that does not run: its Python is executed, its commands are parsed."""

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import ROOT
from unimm.cli import build_parser

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMAND_WORDS = ("unimm", "make", "python", "accelerate")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def commands() -> list[list[str]]:
    """The lines of all shell blocks as words, comments removed."""
    lines = "\n".join(blocks("sh")).splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def test_python_blocks_run_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = blocks("python")
    assert len(code) >= 3
    names: dict[str, object] = {}
    for block in code:
        exec(compile(block, "README.md", "exec"), names)
    assert (tmp_path / "circle.png").is_file() and (tmp_path / "untrained" / "config.json").is_file()
    ids, pixels, features = names["ids"], names["pixels"], names["features"]
    assert list(ids.shape) == [1, 64] and list(pixels.shape) == [1, 3, 64, 64]  # type: ignore[attr-defined]
    assert list(features.shape[:2]) == [1, 64]  # type: ignore[attr-defined]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_commands_exist(words: list[str]) -> None:
    assert words[0] in COMMAND_WORDS
    if words[0] == "unimm":
        build_parser().parse_args(words[1:])
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for word in words:
        if word.endswith((".py", ".yaml")):
            assert (ROOT / word).is_file(), word


def test_every_command_is_shown() -> None:
    shown = {words[1] for words in commands() if words[0] == "unimm"}
    models = {"encoders", "attach", "doctor", "export", "detach", "merge"}
    assert shown == {"demo", "chat", "generate", "reconstruct", "web", "eval"} | models


def test_files_that_the_text_names_exist() -> None:
    for path in re.findall(r"`(?:python )?((?:recipes|eval|configs|docs)/[\w./]+)`", README):
        assert (ROOT / path).exists(), path


def test_it_opens_with_images_of_the_demo_and_the_web_page() -> None:
    opening, _, _ = README.partition("## Two commands")
    paths = re.findall(r'<img src="([^"]+)"', opening)
    assert len(paths) == 2
    for path in paths:
        assert (ROOT / path).stat().st_size < 200_000
        with Image.open(ROOT / path) as image:
            assert min(image.size) > 600


def test_the_jobs_stand_in_order() -> None:
    headings = re.findall(r"^## (.*)$", README, flags=re.MULTILINE)
    assert headings == ["Two commands", "Plug in", "Train", "Evaluate", "Documentation"]


def test_every_page_is_linked() -> None:
    linked = set(re.findall(r"\]\(docs/(\w+\.md)\)", README))
    assert linked == {path.name for path in (ROOT / "docs").glob("*.md")}
