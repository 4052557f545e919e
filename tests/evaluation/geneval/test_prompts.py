"""The regenerated list against the official one, and what another file of prompts is called."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from unimm.errors import UserError
from unimm.evaluation.geneval.prompts import (
    OFFICIAL_SHA256,
    PromptTrack,
    check_prompt,
    official_prompts,
    read_prompts,
    to_jsonl,
    track_of,
)
from unimm.evaluation.geneval.rules import TAGS

Data = Callable[[str], Path]
GOOD = {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}], "prompt": "a photo of a red dog"}


def test_the_list_is_the_official_one() -> None:
    """The hash is that of the official file (djghosh13/geneval, prompts/evaluation_metadata.jsonl)."""
    assert hashlib.sha256(to_jsonl(official_prompts()).encode()).hexdigest() == OFFICIAL_SHA256
    assert OFFICIAL_SHA256 == "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"
    tags = Counter(prompt["tag"] for prompt in official_prompts())
    assert tags == dict(zip(TAGS, (80, 99, 80, 94, 100, 100), strict=True))


def test_the_list_equals_the_official_files(unimm_data: Data) -> None:
    metadata = unimm_data("evaldata/geneval/evaluation_metadata.jsonl").read_text(encoding="utf-8")
    assert to_jsonl(official_prompts()) == metadata
    prompts = unimm_data("evaldata/geneval/generation_prompts.txt").read_text(encoding="utf-8").split("\n")
    assert [prompt["prompt"] for prompt in official_prompts()] == [line for line in prompts if line]


def test_another_seed_is_another_list() -> None:
    assert official_prompts(44) != official_prompts()
    assert track_of(official_prompts(44)) == "geneval-own-prompts"


def test_rewritten_prompts_are_a_track_of_their_own(unimm_data: Data) -> None:
    track = read_prompts(unimm_data("evaldata/geneval/evaluation_metadata_long.bagel.jsonl"))
    assert (track.name, len(track.prompts)) == ("geneval-rewritten", 553)


def test_a_copy_of_the_official_list_is_geneval(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(to_jsonl(official_prompts()[:7]) + "\n", encoding="utf-8")
    assert read_prompts(path) == PromptTrack("geneval", official_prompts()[:7])
    one_word_more = [*official_prompts()[:6], official_prompts()[6] | {"prompt": "a fine photo"}]
    assert track_of(one_word_more) == "geneval-rewritten"
    assert PromptTrack("geneval", official_prompts()).sha256 == OFFICIAL_SHA256


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tag": "scene"}, "has the tag 'scene'; GenEval has single_object"),
        ({"include": []}, "asks for nothing"),
        ({"prompt": " "}, "asks for nothing"),
        ({"include": [{"class": "dog", "count": 0}]}, "asks for nothing"),
        ({"include": [{"class": "dog"}]}, "is no GenEval metadata with tag, include and prompt (KeyError: 'count')"),
        ({"include": [{"class": "dog", "count": 1, "color": "mauve"}]}, "names the colour 'mauve'"),
        ({"include": [{"class": "dog", "count": 1, "position": ["near", 0]}]}, "a position without a meaning"),
        ({"include": [{"class": "dog", "count": 1, "position": ["above", 3]}]}, "a position without a meaning"),
        ({"include": [{"class": "dog", "count": 1, "position": ["above", 0]}]}, "a position without a meaning"),
        ({"include": [{"class": "", "count": 1}]}, "names a class without letters"),
    ],
)
def test_what_cannot_be_judged_is_refused(change: dict[str, Any], message: str) -> None:
    assert check_prompt(json.dumps(GOOD), "here") == GOOD
    with pytest.raises(UserError) as error:
        check_prompt(json.dumps(GOOD | change), "here")
    assert message in str(error.value)
    assert "here" in str(error.value)


def test_files_that_hold_no_prompts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Cannot read the prompts"):
        read_prompts(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="holds no prompt"):
        read_prompts(tmp_path / "empty.jsonl")
    (tmp_path / "text.jsonl").write_text(json.dumps(GOOD) + "\na photo of a dog\n")
    with pytest.raises(UserError, match="line 2 is no GenEval metadata"):
        read_prompts(tmp_path / "text.jsonl")
