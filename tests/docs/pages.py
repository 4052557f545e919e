"""Read the documentation pages: their code blocks by language, and the commands in them."""

import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

from tests.conftest import ROOT

PAGES = {
    path.name: path for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
}


def read_page(name: str) -> str:
    """Return the text of a page by its file name."""
    return PAGES[name].read_text(encoding="utf-8")


def code_blocks(name: str, language: str) -> list[str]:
    """Return the code blocks of one language, in the page's order."""
    return re.findall(rf"^```{language}\n(.*?)^```", read_page(name), flags=re.DOTALL | re.MULTILINE)


def shell_commands(name: str) -> list[list[str]]:
    """Return the lines of all shell blocks as words, without comments."""
    lines = "\n".join(code_blocks(name, "sh")).splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def run_recipe(recipe: Path, arguments: list[str]) -> int:
    """Run a recipe in this process and return its exit code."""
    argv, sys.argv = sys.argv, [str(recipe), *arguments]
    try:
        runpy.run_path(str(recipe), run_name="__main__")
    except SystemExit as ended:
        return int(ended.code or 0)
    finally:
        sys.argv = argv
    raise AssertionError(f"{recipe} does not exit")


CLASSES = {"tokenizer": "TokenizerRecipe", "sft": "SFTRecipe", "t2i": "T2IRecipe", "encode": "EncodeRecipe"}


def recipe_class(recipe: str) -> Any:
    """Return the dataclass of a recipe's settings."""
    return runpy.run_path(str(ROOT / "recipes" / f"{recipe}.py"))[CLASSES[recipe]]
