"""VQA models are asked about known images first: right answers in any form pass, every wrong one is told."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from unimm.errors import UserError
from unimm.evaluation.runs.sanity_checks import KnownAnswer, check_vqa_model, known_answers, photographs
from unimm.evaluation.vqa import YesNo


class Scripted:
    """Looks the answer up by the size of the image and the question."""

    name = "scripted"

    def __init__(self, seen: dict[tuple[int, int], str], probability: float | None = None) -> None:
        self.seen, self.probability = seen, probability

    def answer_yes_no(self, images: Sequence[Image.Image], questions: Sequence[str]) -> list[YesNo]:
        said = [self.seen[image.size] in question for image, question in zip(images, questions, strict=True)]
        return [YesNo("Yes." if each else "no", self.probability) for each in said]


def vqa_model(probability: float | None = None, **seen: str) -> Any:
    sizes = {name: image.size for name, image in photographs().items()}
    return Scripted({size: seen.get(name, name) for name, size in sizes.items()}, probability)


def test_photographs_of_a_cat_a_person_and_a_cup() -> None:
    known = known_answers()
    assert [(each.question, each.expected) for each in known] == [
        ("Is there a cat?", "yes"),
        ("Is there a zebra?", "no"),
        ("Is there a person?", "yes"),
        ("Is there a zebra?", "no"),
        ("Is there a cup?", "yes"),
        ("Is there a zebra?", "no"),
    ]
    assert check_vqa_model(vqa_model(), known) == 6


@pytest.mark.parametrize(
    ("seen", "message"),
    [
        ({"cat": "dog"}, "of the photograph of a cat it answers 'Is there a cat.' with 'no', expected 'yes'"),
        ({"cup": "Is"}, "of the photograph of a cup it answers 'Is there a zebra.' with 'Yes.', expected 'no'"),
    ],
)
def test_a_wrong_answer_is_told(seen: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=f"scripted fails on an image that is known: {message}. Nothing is scored"):
        check_vqa_model(vqa_model(**seen), known_answers())


def test_a_score_that_is_not_finite_is_told() -> None:
    with pytest.raises(UserError, match="scripted gives scores that are not finite for the photograph of a cat"):
        check_vqa_model(vqa_model(math.nan), known_answers())
    assert check_vqa_model(vqa_model(0.9), known_answers()) == 6


def test_a_persons_own_images(tmp_path: Path) -> None:
    Image.new("RGB", (7, 5), "blue").save(tmp_path / "sea.png")
    row = {"image": "sea.png", "question": "Is it blue?", "answer": "yes"}
    (tmp_path / "sanity_images.jsonl").write_text(json.dumps(row) + "\n")
    (found,) = known_answers(tmp_path)
    assert found[:1] + found[2:] == ("sea.png", "Is it blue?", "yes") and found.image.size == (7, 5)
    (tmp_path / "sanity_images.jsonl").write_text('{"image": "sea.png"}\n')
    with pytest.raises(UserError, match="cannot be read as lines of image, question and answer: KeyError"):
        known_answers(tmp_path)
    (tmp_path / "sanity_images.jsonl").write_text("")
    with pytest.raises(UserError, match="no known image to be asked about first"):
        check_vqa_model(vqa_model(), known_answers(tmp_path))
    with pytest.raises(UserError, match="absent/sanity_images.jsonl cannot be read"):
        known_answers(tmp_path / "absent")


def test_a_known_answer_has_its_image() -> None:
    assert all(isinstance(each, KnownAnswer) and each.image.mode == "RGB" for each in known_answers())
