"""`unimm export --onnx` and `--gguf`: what they write, and what they refuse before a model is loaded."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.mllm import tiny
from unimm.cli import main


@pytest.mark.slow
def test_an_image_tokenizer_alone_is_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, processor = tiny.unified()
    model.image_tokenizer.save_pretrained(tmp_path / "tokenizer")
    processor.image_processor.save_pretrained(tmp_path / "tokenizer")
    assert main(["export", str(tmp_path / "tokenizer"), "--onnx", "--output", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'}  (vqrae)\n"
    about = json.loads((tmp_path / "out" / "image_tokenizer.json").read_text())
    assert about["fingerprint"] == model.image_tokenizer.fingerprint


@pytest.mark.parametrize(("kind", "package"), [("onnx", "onnxruntime"), ("gguf", "gguf"), ("gguf", "onnxscript")])
def test_a_missing_package_is_named(
    kind: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None if name == package else find_spec(name))
    assert main(["export", "no/such/model", f"--{kind}", "--output", str(tmp_path / "out")]) == 2
    assert f"{package} is not installed: pip install 'unimm[{kind}]'." in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_weight_type_needs_gguf(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["export", "no/such/model", "--onnx", "--weight-type", "f16", "--output", str(tmp_path / "out")]
    assert main(command) == 2
    assert "--weight-type f16 belongs to --gguf" in capsys.readouterr().err
