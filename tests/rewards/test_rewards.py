"""Rewards: the detectors' verdicts on known scenes, similarities against the bare CLIP, and answers to questions."""

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import CLIPModel

from tests.evaluation.tiny_scorers import save_scorer
from unimm.data.shapes import render, sample_prompt
from unimm.data.shapes.edits import sample_edit
from unimm.data.shapes.prompts import Prompt, scene_for
from unimm.errors import UserError
from unimm.evaluation.geneval.color_votes import prepare_view
from unimm.evaluation.shapes.run import score_drawing
from unimm.evaluation.vqa import YesNo
from unimm.mllm import load
from unimm.rewards import RewardConfig, build_reward, shapes
from unimm.rewards.questions import OwnAnswersReward, VQAReward, shapes_questions


def scenes(count: int) -> list[tuple[Prompt, Image.Image]]:
    rng = np.random.default_rng(3)
    prompts = [sample_prompt(rng, split="test") for _ in range(count)]
    return [(prompt, render(scene_for(rng, prompt))) for prompt in prompts]


def speckled(image: Image.Image) -> Image.Image:
    """The image with a speck of 20 pixels in a corner, which is no object to either detector."""
    speck = Image.new("RGB", (5, 4), "black" if sum(image.getpixel((0, 0))) > 300 else "white")  # type: ignore[arg-type]
    marked = image.copy()
    marked.paste(speck, (1, 1))
    return marked


def test_shapes_are_rewarded_as_the_benchmark_judges_them() -> None:
    shown = scenes(12)
    prompts = [prompt for prompt, _ in shown]
    images = [image for _, image in shown[6:]] + [image for _, image in shown[:6]]  # half a turn: mostly wrong
    images += [speckled(image) for _, image in shown]  # the strict detector refuses them
    images += [image for _, image in shown]
    prompts = prompts * 3
    rows = [score_drawing(*each) for each in zip(prompts, images, strict=True)]
    texts, metadata = [prompt.prompt for prompt in prompts], [prompt.metadata() for prompt in prompts]
    first = build_reward(RewardConfig("shapes")).score(texts, metadata, images)
    strict = build_reward(RewardConfig("shapes_strict")).score(texts, metadata, images)
    assert first == [float(row["correct"]) for row in rows]
    assert strict == [float(row["strict"]) for row in rows]
    assert first[24:] == strict[24:] == [1.0] * 12
    assert sum(first[:12]) < 6 and sum(strict[12:24]) == 0 < sum(first[12:24])


def test_several_processes_score_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with processors to spare; errors cross the processes, too."""
    shown = scenes(20)
    texts, metadata = [prompt.prompt for prompt, _ in shown] * 2, [prompt.metadata() for prompt, _ in shown] * 2
    images = [image for _, image in shown] + [image for _, image in shown[3:] + shown[:3]]
    for kind in ("shapes", "shapes_strict"):
        reward = build_reward(RewardConfig(kind))
        expected = reward.score(texts, metadata, images)
        with monkeypatch.context() as patched:
            patched.setattr(os, "cpu_count", lambda: 16)
            shapes._pool.cache_clear()
            assert shapes._pool() is not None
            assert reward.score(texts, metadata, images) == expected and 0 < sum(expected) < 40
            with pytest.raises(UserError, match="rules"):
                reward.score(texts, [*metadata[:-1], {}], images)
            shapes._pool().shutdown()  # type: ignore[union-attr]
        shapes._pool.cache_clear()


@pytest.mark.parametrize("kind", ["shapes", "shapes_strict"])
def test_edits_are_rewarded_for_what_changed_what_stayed_and_nothing_else(kind: Any) -> None:
    rng, reward = np.random.default_rng(5), build_reward(RewardConfig(kind))
    edits = [sample_edit(rng, name) for name in ("color", "count", "position", "background") for _ in range(8)]
    texts, rules = [edit.instruction for edit in edits], [{"edit": edit} for edit in edits]
    edited = reward.score(texts, rules, [render(edit.target) for edit in edits])
    assert edited == pytest.approx([1.0] * 32)
    copied = reward.score(texts, rules, [render(edit.source) for edit in edits])
    assert copied == pytest.approx([(2 if edit.kind == "position" else 1) / 3 for edit in edits])
    moved = next(edit for edit in edits if edit.kind == "color" and edit.kept)
    alone = replace(moved.target, objects=(moved.changed,))
    assert reward.score([""], [{"edit": moved}], [render(alone)]) == pytest.approx([1 / 3])
    drawn = scenes(1)[0]
    mixed = reward.score([drawn[0].prompt, ""], [drawn[0].metadata(), rules[0]], [drawn[1], render(edits[0].target)])
    assert mixed == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("kind", ["shapes", "shapes_strict", "own_answers"])
def test_prompts_without_rules_are_refused(kind: Any) -> None:
    reward = build_reward(RewardConfig(kind), own_model=lambda: None)  # type: ignore[arg-type, return-value]
    with pytest.raises(UserError, match="reads GenEval's rules, and a prompt has no tag and include"):
        reward.score(["a cat"], [{"prompt": "a cat"}], [Image.new("RGB", (8, 8))])


def test_compressibility_is_the_size_of_the_file() -> None:
    flat, noise = (
        Image.new("RGB", (64, 64), "red"),
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)),
    )
    found = build_reward(RewardConfig("jpeg")).score(["", ""], [{}, {}], [flat, noise])
    buffer = io.BytesIO()
    noise.save(buffer, "JPEG", quality=95)
    assert found[1] == -len(buffer.getvalue()) / 1000 < found[0] < 0


@pytest.mark.parametrize("kind", ["clip", "hpsv2", "pickscore"])
def test_similarities_are_those_of_the_bare_clip(kind: Any, tmp_path: Path) -> None:
    _, folder = save_scorer(tmp_path)
    images = [image for _, image in scenes(3)]
    texts = ["a photo of a red bench", "a cat", "a photo of a blue bus " * 9]  # the last is cut at the text's length
    found = build_reward(RewardConfig(kind, path=str(folder))).score(texts, [{}] * 3, images)
    model = CLIPModel.from_pretrained(folder).eval()
    reward: Any = build_reward(RewardConfig(kind, path=str(folder)))
    for n, (text, image) in enumerate(zip(texts, images, strict=True)):
        tokens = reward.tokenizer([text], truncation=True, max_length=16, return_tensors="pt")
        with torch.no_grad():
            output = model(
                input_ids=tokens["input_ids"],
                attention_mask=tokens["attention_mask"],
                pixel_values=prepare_view(image, 32)[None],
            )
        expected = (
            output.logits_per_image
            if kind == "pickscore"
            else F.cosine_similarity(output.image_embeds, output.text_embeds)
        )
        assert found[n] == pytest.approx(expected.item(), abs=1e-5)


def test_geneval_rewards_what_its_detector_finds(tmp_path: Path) -> None:
    detector, clip = save_scorer(tmp_path, found="bench")
    reward = build_reward(RewardConfig("geneval", path=str(detector), color_path=str(clip)))
    rules = [
        {"tag": "single_object", "include": [{"class": name, "count": 1}], "prompt": name} for name in ("bench", "cat")
    ]
    assert reward.score(["", ""], rules, [Image.new("RGB", (64, 64), "gray")] * 2) == [1.0, 0.0]


class Fixed:
    """A VQA model that answers from a table."""

    def __init__(self, answers: dict[str, str], probability: float | None = None) -> None:
        self.answers, self.probability = answers, probability

    def answer(self, images: Sequence[Image.Image], questions: Sequence[str]) -> list[str]:
        return [self.answers.get(question, "no") for question in questions]

    def answer_yes_no(self, images: Sequence[Image.Image], questions: Sequence[str]) -> list[YesNo]:
        return [YesNo("yes", self.probability) for _ in questions]


def test_a_vqa_model_rewards_the_share_of_right_answers() -> None:
    rules = {
        "tag": "color_attr",
        "include": [{"class": "cat", "count": 1, "color": "red"}, {"class": "dog", "count": 1, "color": "blue"}],
    }
    image = Image.new("RGB", (8, 8))
    answers = {
        "Is there a cat in the picture?": "yes",
        "What color is the cat?": "red",
        "What color is the dog?": "red",
    }
    assert VQAReward(Fixed(answers)).score(["x"], [rules], [image]) == [0.5]
    assert VQAReward(Fixed({}, 0.7)).score(["a cat"], [{}], [image]) == [0.7]
    with pytest.raises(UserError, match="no probability of yes"):
        VQAReward(Fixed({})).score(["a cat"], [{}], [image])


def test_the_embedded_model_rewards_scenes_that_show_their_prompts() -> None:
    model, processor = load()

    @contextmanager
    def own() -> Iterator[Any]:
        yield model

    reward = OwnAnswersReward(own, processor, in_shapes=True)
    shown = scenes(16)
    texts, rules = [prompt.prompt for prompt, _ in shown], [prompt.metadata() for prompt, _ in shown]
    images = [image for _, image in shown]
    right = reward.score(texts, rules, images)
    wrong = reward.score(texts, rules, images[5:] + images[:5])
    assert np.mean(right) > 0.85 > 0.5 > np.mean(wrong)
    assert all(0 <= value <= 1 for value in right + wrong)


def test_questions_follow_from_the_rules() -> None:
    rules = {
        "include": [
            {"class": "ring", "count": 2},
            {"class": "square", "count": 1, "color": "red", "position": ["above", 0]},
        ]
    }
    asked = [(each.text, each.expected) for each in shapes_questions(rules)]
    assert asked == [
        ("How many rings are there?", "two"),
        ("How many squares are there?", "one"),
        ("What color is the square?", "red"),
        ("Is there a red square?", "yes"),
        ("Where is the square relative to the ring?", "above"),
    ]


def test_settings_of_a_reward() -> None:
    with pytest.raises(UserError, match="The reward clip needs a model: give path"):
        RewardConfig("clip")
    with pytest.raises(UserError, match="needs a CLIP that names colors: give color_path"):
        RewardConfig("geneval", path="detector")
    with pytest.raises(UserError, match="there is no /nowhere/clip"):
        RewardConfig("clip", path="/nowhere/clip").require("rewards.clip")
