"""docs/export.md: its commands run on the embedded model, and its programs on what they wrote."""

import importlib.util
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.docs.pages import code_blocks, shell_commands
from unimm.cli import main

PAGE = "export.md"
PROGRAMS = {"OnnxImageTokenizer": "onnxruntime", "llama_cpp": "llama_cpp", "vllm": "vllm"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the page's commands in their order; what they wrote."""
    place = tmp_path_factory.mktemp("export")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        commands = [words for words in shell_commands(PAGE) if words[:2] == ["unimm", "export"]]
        assert len(commands) == 4
        for words in commands:
            assert main(words[1:]) == 0, shlex.join(words)
    return place


@pytest.mark.slow
def test_the_commands_write_what_the_page_lists(folder: Path) -> None:
    graphs = {"decoder.onnx", "encoder.onnx", "quantizer.onnx", "image_tokenizer.json"}
    assert {path.name for path in (folder / "out/onnx").iterdir()} == graphs
    assert {path.name for path in (folder / "out/gguf/image_tokenizer").iterdir()} == graphs
    for name in ("out/gguf", "out/gguf-q8"):
        assert {path.name for path in (folder / name).iterdir()} == {
            "image_tokenizer",
            "image_vocabulary.json",
            "model.gguf",
        }
    sizes = [(folder / name / "model.gguf").stat().st_size for name in ("out/gguf", "out/gguf-q8")]
    assert sizes[0] > 3 * sizes[1]
    assert json.loads((folder / "out/generation/image_vocabulary.json").read_text())["image_grid"] == [8, 8]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(3))
def test_the_programs_run(number: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those with another engine run where it is installed, and are compiled everywhere."""
    block = code_blocks(PAGE, "python")[number]
    program, package = compile(block, PAGE, "exec"), list(PROGRAMS.values())[number]
    assert package in block or number == 0
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(program, names)
    (written,) = folder.glob("*.png")
    assert Image.open(written).size == (64, 64)
    written.unlink()
