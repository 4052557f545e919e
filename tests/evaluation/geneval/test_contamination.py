"""Captions against prompts: each kind of match once, and what is no match at all."""

import json
from pathlib import Path

import pytest

from unimm.errors import UserError
from unimm.evaluation.geneval.contamination import normalize_caption, overlap, read_captions
from unimm.evaluation.geneval.prompts import official_prompts

PROMPTS = [prompt["prompt"] for prompt in official_prompts()]


def kind(caption: str) -> tuple[str, str] | None:
    """(kind, tag) of the one match of a caption, found in the counts."""
    found = overlap([caption], PROMPTS)
    counts = {"exact": found.exact, "normalized": found.normalized}
    hits = [(name, "") for name, count in counts.items() if count]
    hits += [("template", tag) for tag in found.template] + [("any class", tag) for tag in found.template_any_class]
    assert len(hits) <= 1
    assert list(found.examples.values()) == [[caption]] * len(hits)
    return hits[0] if hits else None


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a photo of a bench", ("exact", "")),
        ("A photo of a bench.", ("normalized", "")),
        ("a  photo of two clocks", ("normalized", "")),
        ("a photo of four toothbrushes", ("template", "counting")),  # the benchmark writes "toothbrushs"
        ("a photo of a keyboard", ("template", "single_object")),  # COCO's own name of the computer keyboard
        ("a photo of a red dog and a green hot dog", ("template", "color_attr")),
        ("a photo of a dog and a hot dog", ("template", "two_object")),
        ("a photo of a hot dog above a dog", ("template", "position")),
        ("a photo of a brown zebra", ("template", "colors")),
        ("a photo of a red fox and a green garden gnome", ("any class", "color_attr")),
        ("a photo of a fox left of a gnome", ("any class", "position")),
        ("a photo of three foxes", ("any class", "counting")),
        ("a photo of a fox", None),  # with any noun, every caption of a single thing would match
        ("a painting of a dog and a hot dog", None),
        ("a photo of five dogs", None),
        ("two dogs run over a meadow", None),
    ],
)
def test_kinds_of_match(caption: str, expected: tuple[str, str] | None) -> None:
    assert kind(caption) == expected


def test_every_prompt_meets_itself_and_its_template() -> None:
    found = overlap(PROMPTS, PROMPTS)
    assert (found.captions, found.exact, len(found.prompts_met)) == (553, 553, 553)
    others = overlap(PROMPTS, ["a photo of nothing"])
    assert sum(others.template.values()) == 553
    tags = {tag: sum(prompt["tag"] == tag for prompt in official_prompts()) for tag in others.template}
    assert others.template == tags


def test_long_captions_do_not_match(unimm_data) -> None:  # type: ignore[no-untyped-def]
    rewritten = list(read_captions(unimm_data("evaldata/geneval/evaluation_metadata_long.bagel.jsonl")))
    found = overlap(rewritten, PROMPTS)
    assert (found.captions, len(found.lines()), found.examples) == (553, 5, {})


def test_captions_of_text_and_json(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a dog\n\n a cat \n")
    assert list(read_captions(tmp_path / "a.txt")) == ["a dog", "a cat"]
    rows = [{"caption": "a dog", "url": "u"}, {"text": "a cat"}, {"prompt": "a cow"}, "a fox"]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert list(read_captions(tmp_path / "a.jsonl")) == ["a dog", "a cat", "a cow", "a fox"]
    (tmp_path / "b.jsonl").write_text('{"url": "u"}')
    with pytest.raises(UserError, match="line 1 has no caption: give one of caption, text, prompt"):
        list(read_captions(tmp_path / "b.jsonl"))
    (tmp_path / "c.jsonl").write_text("a dog")
    with pytest.raises(UserError, match="line 1 is no JSON"):
        list(read_captions(tmp_path / "c.jsonl"))
    with pytest.raises(UserError, match="Cannot read the captions"):
        list(read_captions(tmp_path / "d.txt"))


def test_normalized() -> None:
    assert normalize_caption("  A Photo, of TWO\tdogs! ") == "a photo of two dogs"
