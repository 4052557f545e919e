"""Verdicts against people: the published annotations, planted verdicts, kappa against its definition."""

import csv
import gzip
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from unimm.errors import UserError
from unimm.evaluation.geneval.human_agreement import (
    HumanVerdict,
    cohens_kappa,
    compare,
    compare_by_tag,
    fulfils,
    human_verdicts,
    read_annotations,
)
from unimm.evaluation.geneval.prompts import official_prompts

Data = Callable[[str], Path]
PROMPTS = official_prompts()
FILES = ("clip", "if-xl", "sdv2")


def annotations(data: Data, name: str) -> list[dict[str, str]]:
    return read_annotations(data(f"evaldata/geneval/annotations_{name}.csv.gz"))


# ---- the published files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_published_files_are_whole(unimm_data: Data, name: str) -> None:
    rows = annotations(unimm_data, name)
    assert len(rows) == 2000  # four rows of if-xl are torn in two in the file
    people = human_verdicts(rows, PROMPTS)
    assert Counter(verdict.raters for verdict in people.values()) == {5: 400}


def test_torn_rows_are_joined(unimm_data: Data) -> None:
    texts = [row["Answer.task-objects"] for row in annotations(unimm_data, "if-xl")]
    assert "1.sink\n2.Keyboard" in texts


def test_planted_verdicts(unimm_data: Data) -> None:
    """People against themselves agree; every tenth verdict turned round, nine in ten do."""
    people = human_verdicts(annotations(unimm_data, "sdv2"), PROMPTS)
    rules = {key: verdict.rules for key, verdict in people.items()}
    perfect = compare(rules, rules)
    assert (perfect.images, perfect.agreement, perfect.kappa) == (400, 1.0, 1.0)
    planted = {key: right ^ (index % 10 == 0) for index, (key, right) in enumerate(rules.items())}
    found = compare(planted, rules)
    assert found.agreement == 0.9
    assert found.both_right + found.only_people == sum(rules.values())
    assert found.only_people + found.only_scorer == 40
    opposite = compare({key: not right for key, right in rules.items()}, rules)
    assert opposite.agreement == 0
    assert opposite.kappa < 0


def test_tags_add_up(unimm_data: Data) -> None:
    people = human_verdicts(annotations(unimm_data, "clip"), PROMPTS)
    rules = {key: verdict.rules for key, verdict in people.items()}
    table = compare_by_tag(rules, {key: verdict.caption for key, verdict in people.items()}, PROMPTS)
    assert table["all"].images == sum(row.images for tag, row in table.items() if tag != "all") == 400
    assert len(table) == 7


def test_people_call_what_is_easy_right(unimm_data: Data) -> None:
    """Nearly all single objects of SD 2.1 are right for people and few positions: a mistaken rule would show here."""
    people = human_verdicts(annotations(unimm_data, "sdv2"), PROMPTS)
    shares = {
        tag: np.mean([v.rules for (item, _), v in people.items() if PROMPTS[item]["tag"] == tag])
        for tag in ("single_object", "position")
    }
    assert shares["single_object"] > 0.95
    assert shares["position"] < 0.3


# ---- one rater -----------------------------------------------------------------------------------------------------


def item_of(text: str) -> int:
    return next(index for index, prompt in enumerate(PROMPTS) if prompt["prompt"] == text)


def answer(count_0: str = "1", count_1: str = "", **more: str) -> dict[str, str]:
    given = {"task-count-0": count_0, "task-count-1": count_1, "task-color-0": "", "task-color-1": ""}
    given |= {"task-position-x": "", "task-position-y": ""} | {name.replace("_", "-"): v for name, v in more.items()}
    return {f"Answer.{name}": value for name, value in given.items()}


@pytest.mark.parametrize(
    ("prompt", "answers", "right"),
    [
        ("a photo of a bench", answer("1"), True),
        ("a photo of a bench", answer("3"), True),
        ("a photo of a bench", answer("0"), False),
        ("a photo of two clocks", answer("2"), True),
        ("a photo of two clocks", answer("3"), False),
        ("a photo of two clocks", answer("1"), False),
        ("a photo of a blue elephant", answer("1", task_color_0="blue|white"), True),
        ("a photo of a blue elephant", answer("1", task_color_0="white"), False),
        ("a photo of a dog right of a teddy bear", answer("1", "1.0", task_position_x="right"), True),
        ("a photo of a dog right of a teddy bear", answer("1", "1.0", task_position_x="left"), False),
        ("a photo of a dog right of a teddy bear", answer("1", "1.0", task_position_y="right"), False),
        ("a photo of a dog right of a teddy bear", answer("1", "0.0"), False),
        ("a photo of a dog right of a teddy bear", answer("1", ""), False),
    ],
)
def test_a_rater_fulfils_the_rules(prompt: str, answers: dict[str, str], right: bool) -> None:
    assert fulfils(answers, PROMPTS[item_of(prompt)]) == right


def rating(item: int, count: str, quality: str, index: str | None = None) -> dict[str, str]:
    row = {"Input.index": index or f"{item}_0", "Input.caption": PROMPTS[item]["prompt"]}
    return row | answer(count) | {"Answer.task-quality": quality}


def test_the_majority_decides_each_question_by_itself() -> None:
    item = item_of("a photo of a bench")
    ratings = [rating(item, count, quality) for count, quality in zip("11100", "44333", strict=True)]
    assert human_verdicts(ratings, PROMPTS) == {(item, 0): HumanVerdict(True, False, 5)}
    tie = [rating(item, count, "4") for count in "1100"]
    assert human_verdicts(tie, PROMPTS) == {(item, 0): HumanVerdict(False, True, 4)}


# ---- numbers -------------------------------------------------------------------------------------------------------


def test_kappa_of_a_known_table() -> None:
    """Cohen's own form: 20 both yes, 5 and 10 apart, 15 both no: p0 0.7, pe 0.5, kappa 0.4."""
    a = np.repeat([True, True, False, False], (20, 5, 10, 15))
    b = np.repeat([True, False, True, False], (20, 5, 10, 15))
    assert cohens_kappa(a, b) == pytest.approx(0.4)
    assert cohens_kappa(a, a) == 1
    assert cohens_kappa(np.ones(3, bool), np.ones(3, bool)) == 1


# ---- what is refused -----------------------------------------------------------------------------------------------


def test_images_that_nobody_annotated() -> None:
    with pytest.raises(UserError, match="None of the 1 scored images is among the 2 annotated ones"):
        compare({(7, 0): True}, {(1, 0): True, (2, 0): False})


def test_annotations_of_other_prompts() -> None:
    with pytest.raises(UserError, match="which is not prompt 3 of the list"):
        human_verdicts([rating(0, "1", "4", index="3_0")], PROMPTS)


def test_files_that_are_no_annotations(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Cannot read the annotations"):
        read_annotations(tmp_path / "none.csv.gz")
    (tmp_path / "plain.csv.gz").write_text("not gzipped")
    with pytest.raises(UserError, match="Cannot read the annotations"):
        read_annotations(tmp_path / "plain.csv.gz")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="no column Input.index, Input.caption"):
        read_annotations(tmp_path / "other.csv")


def test_a_damaged_file_is_refused(unimm_data: Data, tmp_path: Path) -> None:
    text = gzip.decompress(unimm_data("evaldata/geneval/annotations_clip.csv.gz").read_bytes()).decode()
    rows = list(csv.reader(text.splitlines()[:3]))
    for name, damage, message in (
        ("long", [*rows[2], "x"], "has 23 fields and the header 22"),
        ("short", rows[2][:9], "ends in the middle of a row of 9 fields"),
    ):
        path = tmp_path / f"{name}.csv"
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([rows[0], rows[1], damage])
        with pytest.raises(UserError, match=message):
            read_annotations(path)
