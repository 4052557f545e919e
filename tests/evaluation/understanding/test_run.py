"""What is wrong with a run of the understanding benchmarks is said before anything is loaded, and without lmms-eval."""

import importlib.util
import json
from pathlib import Path

import pytest

from unimm.config.schema import plain
from unimm.errors import UserError
from unimm.evaluation.runs.records import Manifest, Record
from unimm.evaluation.understanding import command as und
from unimm.evaluation.understanding.arguments import UnderstandingPlan
from unimm.evaluation.understanding.command import main
from unimm.evaluation.understanding.lmms_plugin import lmms_finding
from unimm.evaluation.understanding.run import evaluate_understanding, summary_of


@pytest.fixture
def without_lmms_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


@pytest.mark.usefixtures("without_lmms_eval")
def test_without_lmms_eval_one_is_told_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"not installed: pip install 'unimm\[lmms\]'"):
        evaluate_understanding(None, None, UnderstandingPlan(), tmp_path / "out")
    monkeypatch.setattr(und, "load", lambda *_: pytest.fail("the model was loaded first"))
    with pytest.raises(UserError, match="not installed"):
        main(["--output", str(tmp_path / "out")])
    assert lmms_finding(11) is None and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "mme,vqav2"], "There is no understanding task vqav2; there are mme, pope"),
        (["--tasks", "mme,mme"], "each of them once"),
        (["--tasks", "mme", "--limit", "3"], "limit is 3: MME asks two questions about each image"),
        (["--tasks", "gqa", "--limit", "0"], "limit is 0; it must be at least 1"),
        (["--tasks", "mme", "--data", "/nowhere"], "There is no folder /nowhere"),
        (["--batch-size", "0"], "batch_size is 0; it must be at least 1"),
    ],
)
def test_wrong_arguments_are_one_sentence(options: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        main([*options, "--output", str(tmp_path / "out")])


def test_a_run_is_repeated_by_the_manifest_of_any_of_its_tasks(tmp_path: Path) -> None:
    """The rest needs lmms-eval: tests/integrations/test_understanding.py."""
    path, out = tmp_path / "manifest.json", str(tmp_path / "out")
    path.write_text(json.dumps(plain(Manifest("gqa", "0" * 64, 0, arguments={"tasks": "mme,gqa", "limit": 3}))))
    with pytest.raises(UserError, match="limit is 3: MME asks two questions"):
        main(["--from", str(path), "--output", out])
    with pytest.raises(UserError, match="limit is 5: MME"):
        main(["--from", str(path), "--output", out, "--limit", "5"])
    path.write_text(json.dumps(plain(Manifest("shapes", "0" * 64, 0))))
    with pytest.raises(UserError, match="of a run of shapes, this command measures mme, pope, .*, shapes_pope"):
        main(["--from", str(path), "--output", out])


def test_a_summary_is_a_function_of_the_records() -> None:
    records = [
        Record(
            "pope",
            f"{number:06d}",
            inputs={"prompt": "?", "expected": "yes", "category": "random", "image": f"image {number // 2}"},
            raw_scores={"answer": answer, "prompt_tokens": 9, "new_tokens": 1 + number},
        )
        for number, answer in enumerate(["yes", "Yes.", "no", "hm"])
    ]
    found = summary_of("pope", records)
    assert found["answers"] == 4 and found["mean_new_tokens"] == 2.5
    assert found["official"]["pooled"]["accuracy"] == found["verdict"]["value"] == 3 / 4
    assert found["plain"]["pooled"]["accuracy"] == 2 / 4 and found["verdict"]["clusters"] == 2
    assert found["verdict"]["low"] == 1 / 2 and found["verdict"]["high"] == 1.0  # whole images are drawn again
