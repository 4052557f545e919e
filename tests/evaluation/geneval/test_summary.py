"""The table from records: means, intervals, failed rules, and no overall without all six tags."""

from dataclasses import replace

import pytest

from unimm.evaluation.geneval.questions import questions, score_answers
from unimm.evaluation.geneval.rules import TAGS, verdict
from unimm.evaluation.geneval.summary import failed_rules, summarize_records, table
from unimm.evaluation.runs.records import Record


def record(tag: str, item: str, sample: int, correct: bool, reason: str = "") -> Record:
    return Record("geneval", item, sample, inputs={"tag": tag, "prompt": item}, verdict=correct, reason=reason)


def full(counting: tuple[bool, ...]) -> list[Record]:
    """Two prompts of every tag, all right but those of counting."""
    rows = [record(tag, f"{tag} {item}", 0, True) for tag in TAGS if tag != "counting" for item in range(2)]
    reason = "expected dog<4, found 4"
    half = len(counting) // 2
    return rows + [
        record("counting", f"counting {index // half}", index % half, right, "" if right else reason)
        for index, right in enumerate(counting)
    ]


def test_scores_are_the_unweighted_mean_of_the_tags() -> None:
    found = summarize_records(full((True, False, False, False)))
    assert found["scores"]["counting"] == 0.25
    assert found["scores"]["overall"] == pytest.approx(5.25 / 6)
    assert found["scores"]["correct_images"] == pytest.approx(11 / 14)
    assert (found["images"], found["prompts"], found["missing_tags"]) == (14, 12, [])
    assert found["failed"] == {"too many": 3}


def test_intervals_resample_prompts_not_images() -> None:
    """Two prompts of counting, one all right and one all wrong: a resample of prompts gives 0, 0.5 or 1."""
    found = summarize_records(full((True,) * 4 + (False,) * 4))
    assert found["intervals"]["counting"] == [0.0, 1.0]
    assert found["intervals"]["overall"] == pytest.approx([5 / 6, 1.0])
    assert found["intervals"]["colors"] == [1.0, 1.0]


def test_without_all_tags_there_is_no_overall() -> None:
    rows = [each for each in full((True, True)) if each.inputs["tag"] in ("counting", "colors")]
    found = summarize_records(rows)
    assert set(found["scores"]) == {"counting", "colors"}
    assert found["missing_tags"] == ["single_object", "two_object", "position", "color_attr"]
    assert "no overall: no image of single_object, two_object, position, color_attr" in table(found)
    one = summarize_records(rows[:1])
    assert one["intervals"] == {"colors": None}  # one prompt says nothing about others
    assert "colors             1.000\n" in table(one)


def test_table_names_every_score_in_the_order_of_the_tags() -> None:
    lines = table(summarize_records(full((True, False)))).splitlines()
    assert [line.split()[0] for line in lines[:-2]] == [*TAGS, "overall", "correct_images", "correct_prompts"]
    assert lines[-1].strip() == "12 images of 12 prompts; failed: too many 1"


def test_guessed_colors_are_counted_and_left_out_of_the_plain_scores() -> None:
    rows = full((True, True, True, True))
    rows = [replace(row, raw_scores={"plain": row.verdict, "unparsed": 0}) for row in rows]
    rows[-1] = replace(rows[-1], raw_scores={"plain": False, "unparsed": 2})
    found = summarize_records(rows)
    assert (found["scores"]["counting"], found["plain"]["counting"]) == (1.0, 0.75)
    assert found["plain"]["overall"] == pytest.approx(5.75 / 6)
    assert found["unparsed"] == 2
    shown = table(found)
    assert shown.splitlines()[0].split() == ["plain"]
    assert "2 colors or answers had to be guessed or could not be read" in shown
    assert [line.split()[-1] for line in shown.splitlines() if line.split()[0] == "counting"] == ["0.750"]
    assert "plain" not in summarize_records(full((True, True)))  # a judge that answers questions guesses nothing


def test_every_reason_of_the_rules_has_its_kind() -> None:
    dog, seen = {"class": "dog", "count": 1}, {"label": "dog", "box": (0, 0, 9, 9), "score": 1.0, "color": "red"}
    above = {"class": "cat", "count": 1, "position": ["above", 0]}
    cases = {
        "too few": ({"tag": "two_object", "include": [dog]}, []),
        "too many": ({"tag": "counting", "include": [dog], "exclude": [{"class": "dog", "count": 2}]}, [seen, seen]),
        "color": ({"tag": "colors", "include": [dog | {"color": "blue"}]}, [seen]),
        "position": ({"tag": "position", "include": [dog, above]}, [seen, seen | {"label": "cat"}]),
    }
    for kind, (metadata, detections) in cases.items():
        (reason,) = verdict(metadata, detections).reasons
        assert failed_rules(reason) == [kind]
    reasons = verdict({"tag": "position", "include": [dog, above]}, [seen | {"label": "cat"}]).reasons
    assert failed_rules("\n".join(reasons)) == ["too few", "no target"]
    asked = questions({"tag": "colors", "include": [dog | {"color": "blue"}]})
    assert failed_rules("\n".join(score_answers(asked, ["no", "striped"]).reasons)) == ["answer", "unparsed"]
    assert failed_rules("") == []
    with pytest.raises(ValueError, match="no rule gives the reason 'it is ugly'"):
        failed_rules("it is ugly")
