"""Runs and command lines of earlier versions: their names of arguments, settings and scores are read as today's."""

import json
from pathlib import Path

import pytest
from PIL import Image

from unimm.errors import UserError
from unimm.evaluation.dpg.arguments import parse as parse_dpg
from unimm.evaluation.geneval.arguments import parse as parse_geneval
from unimm.evaluation.runs.records import read_manifest, read_records, to_line
from unimm.evaluation.runs.sanity_checks import known_answers
from unimm.evaluation.suites import parse_suite

# written by an earlier version of `unimm eval dpg`; long values cut
MANIFEST = """{"bench": "dpg", "prompts_sha256": "0a", "seed": 0,
 "settings": {"num_images": 1, "judge": {"name": "blip"}, "judge_batch_size": 2, "canary": "not asked"},
 "weights": {"model": "1b", "judge": "2c"}, "versions": {"torch": "2.13.0"}, "hardware": {}, "commit": null,
 "arguments": {"dpg_csv": "questions.csv", "judge": "BLIP", "judge_kind": null, "judge_batch_size": 2, "canary": null,
  "no_canary": true, "allow_self_judge": false, "num_images": 1}}"""
RECORD = (
    '{"bench": "dpg", "inputs": {}, "item": "a", "judge": {"name": "blip"}, "output_path": null, '
    '"raw_scores": {"entropy_of_picture": 1.5}, "reason": "", "sample": 0, "seed": 0, "verdict": null}\n'
)


def test_a_run_of_before_is_read(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(MANIFEST)
    (tmp_path / "records.jsonl").write_text(RECORD)
    manifest, (record,) = read_manifest(tmp_path), read_records(tmp_path)
    assert manifest.settings == {
        "num_images": 1,
        "scorer": {"name": "blip"},
        "vqa_batch_size": 2,
        "sanity_images": "not asked",
    }
    assert manifest.weights == {"model": "1b", "scorer": "2c"}
    assert (record.scorer, record.raw_scores) == ({"name": "blip"}, {"entropy_of_image": 1.5})
    assert set(json.loads(RECORD)) - set(json.loads(to_line(record))) == {"judge"}


def test_a_run_of_before_is_repeated(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(MANIFEST)
    arguments = parse_dpg(["--from", str(tmp_path / "manifest.json"), "--output", "new"])
    assert (arguments.vqa_model, arguments.vqa_batch_size, arguments.no_sanity_check) == ("BLIP", 2, True)
    (tmp_path / "manifest.json").write_text(MANIFEST.replace('"no_canary"', '"no_bird"'))
    with pytest.raises(UserError, match="arguments that this version does not know: no_bird"):
        parse_dpg(["--from", str(tmp_path / "manifest.json"), "--output", "new"])


def test_former_options_are_the_present_ones(capsys: pytest.CaptureFixture[str]) -> None:
    old = ["--judge=B", "--judge-kind=blip", "--judge-batch-size", "3", "--allow-self-judge", "--canary", "K"]
    new = ["--vqa-model=B", "--vqa-kind=blip", "--vqa-batch-size", "3", "--allow-self-scoring", "--sanity-images", "K"]
    common = ["--dpg-csv", "Q", "--output", "O"]
    assert parse_dpg([*common, *old]) == parse_dpg([*common, *new])
    assert parse_geneval(["--output", "O", "--vqa", "V", "--canary", "K"]) == parse_geneval(
        ["--output", "O", "--vqa-model", "V", "--sanity-images", "K"]
    )
    assert parse_suite("all", ["--output=O", "--source=S", "--judge=J"]).vqa_model == "J"
    with pytest.raises(SystemExit):
        parse_dpg([*common, "--judge=B", "--canary=K", "--no-canary"])  # one excludes the other, by either name
    assert "not allowed with" in capsys.readouterr().err


def test_the_help_shows_present_names_only(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_dpg(["--help"])
    shown = capsys.readouterr().out
    assert "--vqa-model" in shown and "--judge" not in shown and "--canary" not in shown


def test_known_answers_under_their_former_name(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), "blue").save(tmp_path / "sea.png")
    (tmp_path / "canaries.jsonl").write_text('{"image": "sea.png", "question": "Is it blue?", "answer": "yes"}\n')
    (known,) = known_answers(tmp_path)
    assert (known.question, known.expected) == ("Is it blue?", "yes")
