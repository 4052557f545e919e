"""The figures of the layout on trees written by hand, and on two revisions of a small repository."""

import ast
import subprocess
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from eval.layout import arrows, arrows_back, circles, docstrings, imports, main
from unimm.errors import UserError

SOURCES = {
    "unimm/__init__.py": "",
    "unimm/errors.py": '"""Picture."""\nX = 1\n"""One picture."""\n',
    "unimm/data/__init__.py": "from unimm.data.images import load\n",
    "unimm/data/images.py": "from ..errors import X\ndef load():\n    import unimm.mllm.model\n",
    "unimm/mllm/__init__.py": "",
    "unimm/mllm/model.py": "from unimm import errors\nfrom unimm.data import images\n",
}
TABLE = (
    "GROUND = {'errors'}\n"
    "ALLOWED: dict = {'errors': set(), 'data': GROUND, 'mllm': GROUND | {'data'}, '__init__': set()}\n"
)


def trees() -> dict[PurePosixPath, ast.Module]:
    return {PurePosixPath(path): ast.parse(source) for path, source in SOURCES.items()}


def test_imports_by_name_by_module_and_in_a_function() -> None:
    found = {str(path): sorted(map(str, others)) for path, others in imports(trees()).items()}
    assert found["unimm/data/images.py"] == ["unimm/errors.py", "unimm/mllm/model.py"]
    assert found["unimm/data/__init__.py"] == ["unimm/data/images.py"]
    assert found["unimm/mllm/model.py"] == ["unimm/data/images.py", "unimm/errors.py"]


def test_a_circle_and_the_arrow_that_points_back() -> None:
    graph = arrows(trees())
    assert {part: others for part, others in graph.items() if others} == {
        "data": {"errors", "mllm"},
        "mllm": {"errors", "data"},
    }
    assert circles(graph) == [{"data", "mllm"}] and circles({1: {2}, 2: {3}, 3: set[Any]()}) == []
    assert arrows_back(trees(), ast.parse(TABLE)) == 1  # data -> mllm
    own_row = TABLE.replace("'mllm':", "'data.images': {'errors', 'mllm'}, 'mllm':")
    assert arrows_back(trees(), ast.parse(own_row)) == 0


def test_docstrings_of_modules_and_values() -> None:
    assert sorted(docstrings(trees().values())) == ["One picture.", "Picture."]


def test_two_revisions_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def git(*words: str) -> None:
        subprocess.run(["git", "-c", "user.name=n", "-c", "user.email=e", *words], check=True, capture_output=True)

    monkeypatch.chdir(tmp_path)
    git("init")
    tests = {"tests/test_arrows.py": TABLE, "tests/test_a.py": "def test_a_picture(): ...\ndef test_old(): ...\n"}
    for path, source in {**SOURCES, **tests}.items():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(source)
    git("add", ".")
    git("commit", "-m", "a")
    Path("tests/test_a.py").write_text("def test_an_image(): ...\ndef test_a_image(): ...\n")
    Path("unimm/errors.py").write_text('"""Errors."""\nX = 1\n')
    git("commit", "-am", "b")
    main(["HEAD~1", "HEAD", "--tests"])
    shown = capsys.readouterr().out
    assert "| arrows back | 1 | 1 |" in shown and "| lines of our own code | 9 | 8 |" in shown
    assert shown.endswith("1 tests have image for picture in their names; gone by name:\ntest_old\n")
    with pytest.raises(UserError, match="git has no revision 'nothing' here"):
        main(["nothing"])
