"""DPG-Bench end to end: the model that comes with the library draws, a tiny random BLIP answers, both rules count."""

import csv
import hashlib
import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.evaluation.ranks import FORK, on_two_ranks
from tests.evaluation.tiny_vqa import save_blip
from unimm.errors import UserError
from unimm.evaluation.dpg.command import main
from unimm.evaluation.dpg.grids import GridImages
from unimm.evaluation.dpg.prompts import read_prompts, read_question_file
from unimm.evaluation.dpg.summary import summarize_records
from unimm.evaluation.runs.records import Record, read_manifest, read_records
from unimm.evaluation.runs.store import RunStore
from unimm.evaluation.vqa import load_vqa_model
from unimm.mllm.loading import default_model_path

HEADER = ["item_id", "text", "keywords", "proposition_id", "dependency", "category_broad", "category_detailed"]
HEADER += ["tuple", "question_natural_language"]
TEXTS = {"first": "a photo of a red circle", "0": 'a "blue" square,\nand a ring'}
QUESTIONS = ["is there a circle?", "is there a red circle?", "is a circle blue?"]


def killed_after_one_record(arguments: list[str]) -> None:
    """The command, by a process that is killed as soon as its first record is on disk."""
    append = RunStore.append

    def once(self: RunStore, record: Record, **options: Any) -> None:
        append(self, record, **options)
        os.kill(os.getpid(), signal.SIGKILL)

    RunStore.append = once  # type: ignore[method-assign]
    main(arguments)


@pytest.fixture(scope="module")
def question_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("dpg") / "dpg_bench.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(HEADER)
        for item, text in TEXTS.items():
            for number, question in enumerate(QUESTIONS, start=1):
                kind = "entity - whole (circle)" if number == 1 else "attribute - color (circle, red)"
                writer.writerow([item, text, "", number, "0" if number == 1 else "1", "", "", kind, question])
    return path


@pytest.fixture(scope="module")
def blip(tmp_path_factory) -> Path:
    return save_blip(tmp_path_factory.mktemp("scorer") / "blip")


@pytest.fixture(scope="module")
def drawn(question_file, blip, tmp_path_factory) -> Path:
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    main([*command(question_file, blip), "--output", str(folder), "--json", str(folder.parent / "report.json")])
    return folder


def command(question_file: Path, blip: Path) -> list[str]:
    """The VQA model is random: no known image is asked about."""
    sizes = ["--num-images", "2", "--seed", "3"]
    return ["--dpg-csv", str(question_file), "--vqa-model", str(blip), *sizes, "--no-sanity-check"]


def result(folder: Path) -> dict[str, bytes]:
    """Everything that has to be equal."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name[0] != "."]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths if path.name != "timings.jsonl"}


def test_answers_are_the_judges_about_the_images_on_disk(drawn, blip):
    vqa_model, records = load_vqa_model(blip), read_records(drawn)
    assert [record.key for record in records] == [("0", 0), ("0", 1), ("first", 0), ("first", 1)]
    for record in records:
        image = Image.open(drawn / record.output_path)
        answers = vqa_model.answer([image] * 3, QUESTIONS)
        assert record.raw_scores == {"answers": dict(zip("123", answers, strict=True))}
        assert record.inputs["prompt"] == TEXTS[record.item] and record.scorer == vqa_model.describe()
    grid = np.asarray(Image.open(drawn / "grids" / "first.png"))
    side = len(grid) // 2
    for sample, corner in enumerate([grid[:side, :side], grid[:side, side:]]):
        assert np.array_equal(corner, Image.open(drawn / records[2 + sample].output_path))
    assert not grid[side:].any()


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bytes(drawn, question_file, blip, tmp_path):
    arguments = [*command(question_file, blip), "--output", str(tmp_path / "killed")]
    process = FORK.Process(target=killed_after_one_record, args=(arguments,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "summary.json").exists()
    main(arguments)
    assert result(tmp_path / "killed") == result(drawn)
    assert len(list((drawn / "images").iterdir())) == 4


@pytest.mark.slow
def test_two_processes_give_the_bytes_of_one(drawn, question_file, blip, tmp_path):
    on_two_ranks(main, [*command(question_file, blip), "--output", str(tmp_path / "ranks")])
    assert result(tmp_path / "ranks") == result(drawn)
    timed = [json.loads(line) for line in (tmp_path / "ranks" / "timings.jsonl").read_text().splitlines()]
    assert len(timed) == 4 and len({row["item"] for row in timed}) == 2


def test_another_seed_reuses_nothing(drawn, question_file, blip):
    with pytest.raises(UserError, match=r"differs in seed \(3, now 4\)"):
        main([*command(question_file, blip), "--seed", "4", "--output", str(drawn)])


def test_grids_of_others_are_judged_alike(drawn, question_file, blip, tmp_path):
    side = Image.open(drawn / "grids" / "first.png").width // 2
    given = ["--images", str(drawn / "grids"), "--resolution", str(side), "--output", str(tmp_path / "given")]
    main([*command(question_file, blip), *given])
    theirs, ours = read_records(tmp_path / "given"), read_records(drawn)
    assert [record.raw_scores for record in theirs] == [record.raw_scores for record in ours]


def test_both_rules_stand_side_by_side():
    rows = [
        dict(zip(["row", *HEADER], [index, item, "", "", number, parent, "", "", category, "?"], strict=True))
        for index, (item, number, parent, category) in enumerate(
            [("a", 1, "0", "entity - whole (x)"), ("a", 2, "1", "other - count (x)"), ("b", 1, "0", "global (x)")]
        )
    ]
    answers = {("a", 0): ["Yes", "yes"], ("a", 1): ["no", "yes"], ("b", 0): ["yes"], ("b", 1): ["Yes."]}
    records = []
    for (item, sample), given in answers.items():
        inputs = {"prompt": item, "rows": [row for row in rows if row["item_id"] == item]}
        scores = {"answers": {str(n): answer for n, answer in enumerate(given, start=1)}}
        records.append(Record("dpg", item, sample, inputs=inputs, raw_scores=scores, scorer={"name": "j"}))
    found = summarize_records(records)
    compat, fixed = found["official-compat"], found["fixed"]
    assert (compat["dpg"], compat["prompts"], compat["dropped"]) == (50, 1, ["a"])
    assert fixed["dpg"] == pytest.approx(100 * ((1 + 0) / 2 + (1 + 1) / 2) / 2) and fixed["dropped"] == []
    assert fixed["categories"] == {"entity - whole": 50, "global": 100, "other - count": 100}
    assert fixed["categories_kept"] == {"entity - whole": 50, "global": 100, "other - count": 50}
    assert fixed["interval"]["low"] <= fixed["dpg"] <= fixed["interval"]["high"]
    assert [found[name]["unparsed"] for name in ("official-compat", "fixed", "plain")] == [2, 0, 0]
    unsure = replace(records[2], raw_scores={"answers": {"1": "yes"}, "guessed": ["1"]})
    guessed = summarize_records([*records[:2], unsure, records[3]])
    assert [guessed[name]["unparsed"] for name in ("official-compat", "fixed", "plain")] == [3, 1, 1]
    assert guessed["fixed"]["dpg"] == fixed["dpg"] == found["plain"]["dpg"]
    assert guessed["plain"]["dpg"] == pytest.approx(fixed["dpg"] - 25)  # one of two images of one of two prompts
    other = Record("dpg", "c", 0, inputs=records[0].inputs, raw_scores=records[0].raw_scores, scorer={"name": "k"})
    with pytest.raises(UserError, match="from 2 scorers"):
        summarize_records([*records, other])


@pytest.mark.parametrize(("says", "score"), [("yes", 100), ("no", 0)])
def test_planted_answers_come_out(says, score, drawn, question_file, tmp_path):
    vqa_model, folder = save_blip(tmp_path / "scorer", says), tmp_path / "run"
    side = Image.open(drawn / "grids" / "first.png").width // 2
    given = ["--images", str(drawn / "grids"), "--resolution", str(side), "--output", str(folder)]
    with pytest.raises(UserError, match=f"scorer fails on an image that is known: .* with '{says}', expected"):
        main([*command(question_file, vqa_model)[:-1], *given])
    main([*command(question_file, vqa_model), *given])
    assert {record.raw_scores["answers"][n] for record in read_records(folder) for n in "123"} == {says}
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["fixed"]["dpg"] == summary["official-compat"]["dpg"] == score
    assert (summary["fixed"]["prompts"], summary["official-compat"]["dropped"]) == (2, ["first"])
    assert set(summary["fixed"]["categories"].values()) == {score}


def test_a_judge_that_fails_on_a_known_image_judges_nothing(question_file, blip, tmp_path):
    known, folder = tmp_path / "known", tmp_path / "run"
    known.mkdir()
    Image.new("RGB", (16, 16), "white").save(known / "white.png")
    said = load_vqa_model(blip).answer([Image.new("RGB", (16, 16), "white")], ["is there a circle?"])[0]
    base = ["--dpg-csv", str(question_file), "--vqa-model", str(blip), "--num-images", "1", "--limit", "1"]

    def expect(answer: str) -> None:
        row = {"image": "white.png", "question": "is there a circle?", "answer": answer}
        (known / "sanity_images.jsonl").write_text(json.dumps(row) + "\n")

    with pytest.raises(UserError, match="blip fails on an image that is known: of the photograph of a cat"):
        main([*base, "--output", str(folder)])
    expect("surely")
    with pytest.raises(UserError, match="of white.png it answers 'is there a circle.' with .*, expected 'surely'"):
        main([*base, "--output", str(folder), "--sanity-images", str(known)])
    assert not folder.exists()
    expect(said)
    main([*base, "--output", str(folder), "--sanity-images", str(known), "--json", str(tmp_path / "report.json")])
    assert json.loads((tmp_path / "report.json").read_text())["sanity_images"] == 1
    assert len(read_manifest(folder).settings["sanity_images"]) == 64
    with pytest.raises(UserError, match=r'differs in settings.sanity_images \("[0-9a-f]{64}", now "not asked"\)'):
        main([*base, "--output", str(folder), "--no-sanity-check"])


def test_the_question_file_is_known_by_gits_name(question_file):
    prompts = read_question_file(question_file)
    content = question_file.read_bytes()
    assert prompts.blob == hashlib.sha1(b"blob " + str(len(content)).encode() + b"\0" + content).hexdigest()
    assert prompts.texts == TEXTS and [len(rows) for rows in prompts.rows.values()] == [3, 3]
    assert list(prompts.limited(1).rows) == ["first"]


def test_the_staged_prompts_can_be_drawn(unimm_data):
    prompts = read_prompts(unimm_data("evaldata/dpg_bench/dpg_prompts.jsonl"))
    assert len(prompts.texts) == 1065 and prompts.texts["partiprompts97"]


def test_what_a_person_gets_wrong(drawn, question_file, blip, tmp_path):
    base = command(question_file, blip)
    with pytest.raises(UserError, match="get dpg_bench.csv .* 98457fc9901943f51ff9a30367250fc292533bed"):
        main(["--dpg-csv", str(tmp_path / "absent.csv"), "--vqa-model", str(blip), "--output", str(tmp_path / "x")])
    with pytest.raises(UserError, match="--output DIR is not given"):
        main(base)
    with pytest.raises(UserError, match="give --dpg-csv and --vqa-model together"):
        main([*base[:2], "--output", str(tmp_path / "x")])
    side = Image.open(drawn / "grids" / "first.png").width // 2
    given = [*base, "--images", str(drawn / "grids"), "--output", str(tmp_path / "x"), "--resolution"]
    with pytest.raises(UserError, match=f"has {2 * side} x {2 * side} pixels; a grid of images of 9 has 18 x 18"):
        main([*given, "9"])
    folder = tmp_path / "grids"
    folder.mkdir()
    Image.new("RGB", (16, 16)).save(folder / "first.png")
    prompts = read_question_file(question_file)
    with pytest.raises(UserError, match=r"lacks 1 of 2 grids \(0.png, ...\)"):
        GridImages(folder, prompts, 8, 4)
    assert GridImages(folder, prompts, 8, 4, allow_missing=True).missing == ["0"]
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="has no column item_id"):
        read_question_file(tmp_path / "other.csv")


def test_the_model_is_refused_as_its_own_judge(question_file, tmp_path):
    arguments = ["--dpg-csv", str(question_file), "--vqa-model", str(default_model_path()), "--num-images", "1"]
    arguments += ["--limit", "1", "--output", str(tmp_path / "own"), "--json", str(tmp_path / "own.json")]
    arguments += ["--no-sanity-check"]  # it was never shown a photograph
    with pytest.raises(UserError, match="is its own scorer"):
        main(arguments)
    main([*arguments, "--allow-self-scoring"])
    report = json.loads((tmp_path / "own.json").read_text())
    assert report["scorer"]["kind"] == "chat" and 0 <= report["fixed"]["dpg"] <= 100
    # The only prompt is the one whose first question the published script skips.
    assert report["official-compat"]["dpg"] is None and report["official-compat"]["dropped"] == ["first"]
    probabilities = read_records(tmp_path / "own")[0].raw_scores["probabilities"]
    assert set(probabilities) == {"1", "2", "3"} and all(0 <= p <= 1 for p in probabilities.values())
