"""What a recipe reads and is not there is said before a model is built."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

import unimm.mllm
import unimm.tokenizer.loading
from tests.test_recipes import ROOT, run
from unimm.errors import UserError, require_place
from unimm.tokenizer import VQRAE

CASES: dict[str, tuple[str, str, tuple[str, ...], str]] = {
    "t2i data": (
        "t2i",
        "t2i",
        ("model.path=default", "data.flows.drawing.source=gone.parquet"),
        "There is no .*gone.parquet",
    ),
    "t2i eval": (
        "t2i",
        "t2i",
        ("model.path=default", "data.flows.drawing.source=some", "data.flows.drawing.eval_source=gone.tar"),
        "gone.tar",
    ),
    "t2i model": ("t2i", "t2i", ("model.path=some/deep/folder",), "model.path: there is no some/deep/folder"),
    "t2i tokenizer": ("t2i", "t2i", ("model.path=default", "model.image_tokenizer=some/gone"), "no some/gone"),
    "sft data": (
        "sft",
        "llava15_pretrain",
        ("model.image_tokenizer=default", "data.flows.captions.image_folder=some"),
        "There is no file llava/talk.json",
    ),
    "sft columns": (
        "sft",
        "sft",
        ("model.image_tokenizer=default", "data.flows.conversation={kind: conversation, source: some/a.parquet}"),
        "no column 'messages' or 'conversations'",
    ),
    "sft part": ("sft", "sft", ("model.image_tokenizer=some/gone",), "model.image_tokenizer: there is no some/gone"),
    "c2i data": ("c2i", "c2i", ("model.image_tokenizer=some", "data.source=gone.parquet"), "gone.parquet"),
    "encode data": (
        "encode",
        "encode",
        ("model.image_tokenizer=some", "data.source=gone.parquet", "data.seed=0"),
        "gone.parquet",
    ),
    "tokenizer part": ("tokenizer", "stage2", ("model.init_from=some/gone",), "model.init_from: there is no some/gone"),
    "tokenizer data": ("tokenizer", "stage2", ("model.init_from=default", "data.source=gone.parquet"), "gone.parquet"),
}


@pytest.fixture(autouse=True)
def no_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A working folder with some data; models that are built fail the test."""
    import datasets

    def build(*_: Any, **__: Any) -> Any:
        raise AssertionError("a model is built")

    for owner, name in (
        (unimm.mllm, "load"),
        (unimm.mllm, "attach"),
        (unimm.tokenizer.loading, "load_with_processor"),
        (AutoModelForCausalLM, "from_pretrained"),
        (VQRAE, "from_pretrained"),
    ):
        monkeypatch.setattr(owner, name, build)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some").mkdir()
    columns = {"image": [{"bytes": b"", "path": None}], "text": ["a"]}
    datasets.Dataset.from_dict(columns).to_parquet(str(tmp_path / "some/a.parquet"))


@pytest.mark.parametrize("case", CASES)
def test_missing_inputs_are_said_first(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    import re

    recipe, config, overrides, message = CASES[case]
    assert run(recipe, "--config", str(ROOT / f"configs/debug/{config}.yaml"), *overrides) == 2
    said = capsys.readouterr().err.splitlines()
    assert re.search(message, said[-1]), said


def test_a_hub_id_is_not_taken_for_a_path(tmp_path: Path) -> None:
    for name in ("default", "owner/name", "siglip2-so400m-p16-256", "some", None, str(tmp_path)):
        require_place("it", name)
    for name in ("some/gone", "/gone", "./gone", "../gone/x", "a/b/c", "~/x"):
        with pytest.raises(UserError, match=f"it: there is no {name}"):
            require_place("it", name)


def test_the_checks_read_no_row(tmp_path: Path) -> None:
    """A file that is there and holds nothing usable is found when its rows are read."""
    from unimm.data.mixture import FlowConfig, MixtureConfig
    from unimm.data.presence import require_sources

    (tmp_path / "talk.json").write_text(json.dumps([]))
    flow = FlowConfig("conversation", source=str(tmp_path / "talk.json"), image_folder=str(tmp_path))
    require_sources(MixtureConfig({"talk": flow}))
