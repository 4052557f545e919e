"""Kinds of phrasing as an axis of the evaluation on the shapes data set: drawings and answers by the kind of wording,
trained kinds against kinds that never occur in training, and requests for what the world does not hold."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from unimm.data.conversations import conversation, message
from unimm.data.shapes import Prompt, Turn, render, sample_prompt, sample_questions
from unimm.data.shapes.phrasings import (
    HELD_OUT,
    QUESTION_KINDS,
    REQUEST_KINDS,
    UNSEEN_WORDS,
    reworded_question,
    sample_request,
    sample_unknown_request,
    with_word,
)
from unimm.data.shapes.things import REFUSAL, UNSEEN_THINGS
from unimm.data.shapes.world import Scene
from unimm.evaluation.metrics.answers import same_answer
from unimm.evaluation.runs.records import Key
from unimm.evaluation.shapes.arguments import ShapesPlan
from unimm.evaluation.shapes.run import (
    QUESTION_KINDS as ASKED_KINDS,
)
from unimm.evaluation.shapes.run import (
    Row,
    Shown,
    Wanted,
    keyed_row,
    mean,
    progress,
    score_drawing,
)
from unimm.mllm.answering import answer_all
from unimm.mllm.draw_prompts import draw_prompts

UNSEEN, UNKNOWN = "unseen_words", "unknown"
MAX_ANSWER_TOKENS = 40
DRAWN, SAID = "drawing", "answer"


def phrasing_keys(plan: ShapesPlan) -> tuple[list[Key], int]:
    """Return the keys of all drawings, then of all answers, and the batch size."""
    drawn = [(f"phrasing/{DRAWN}/{kind}/{i:03}", 0) for kind in (*REQUEST_KINDS, UNSEEN) for i in range(_few(plan))]
    said = [(f"phrasing/{SAID}/{kind}/{i:03}", 0) for kind in (*QUESTION_KINDS, UNKNOWN) for i in range(_some(plan))]
    return drawn + said, plan.batch_size


def _few(plan: ShapesPlan) -> int:
    """Return the number of drawings per kind."""
    return max(1, plan.prompts // 5 * 2)


def _some(plan: ShapesPlan) -> int:
    """Return the number of questions per kind."""
    return max(1, plan.questions // 10)


@torch.inference_mode()
def phrasing(model: Any, processor: Any, plan: ShapesPlan, wanted: Wanted = bool) -> Iterator[list[Shown]]:
    """Yield one row per drawing and answer, in batches."""
    keys = phrasing_keys(plan)[0]
    drawn = [key for key in keys if key[0].split("/")[1] == DRAWN]
    yield from _drawings(model, processor, plan, drawn, wanted)
    yield from _answers(model, processor, plan, keys[len(drawn) :], wanted)


def _drawings(model: Any, processor: Any, plan: ShapesPlan, keys: list[Key], wanted: Wanted) -> Iterator[list[Shown]]:
    rngs = {kind: plan.rng("phrasing", DRAWN, kind) for kind in (*REQUEST_KINDS, UNSEEN)}
    jobs = [(key, _request(rngs[_kind(key)], _kind(key))) for key in keys]
    for batch in progress(jobs, plan.batch_size, "phrasing, drawings"):
        if not wanted([key for key, _ in batch]):
            continue
        seeds = [plan.number(key[0]) for key, _ in batch]
        images = draw_prompts(model, processor, [prompt.prompt for _, prompt in batch], seeds, **plan.sampling)
        shown: list[Shown] = []
        for (key, prompt), seed, image in zip(batch, seeds, images, strict=True):
            row = keyed_row(key, seed=seed, group=f"{DRAWN}/{_kind(key)}") | score_drawing(prompt, image)
            shown.append((row, {"drawn": image}))
        yield shown


def _answers(model: Any, processor: Any, plan: ShapesPlan, keys: list[Key], wanted: Wanted) -> Iterator[list[Shown]]:
    rngs = {kind: plan.rng("phrasing", SAID, kind) for kind in (*QUESTION_KINDS, UNKNOWN)}
    jobs = [(key, _asked(rngs[_kind(key)], _kind(key), number)) for number, key in enumerate(keys)]
    for batch in progress(jobs, plan.batch_size, "phrasing, answers"):
        if not wanted([key for key, _ in batch]):
            continue
        images = [None if scene is None else render(scene) for _, (scene, _) in batch]
        asked = [
            [message("user", turn.question)] if image is None else conversation(image, [(turn.question, "")])[:1]
            for image, (_, (_, turn)) in zip(images, batch, strict=True)
        ]
        answers = answer_all(model, processor, asked, max_new_tokens=MAX_ANSWER_TOKENS)
        shown: list[Shown] = []
        for (key, (_, turn)), image, answer in zip(batch, images, answers, strict=True):
            row = keyed_row(key, group=f"{SAID}/{_kind(key)}", question=turn.question, expected=turn.answer)
            row |= {"answer": answer.text, "correct": same_answer(answer.text, turn.answer)}
            shown.append((row, {} if image is None else {"original": image}))
        yield shown


def phrasing_scores(rows: Iterable[Row]) -> dict[str, float]:
    """Compute the share that is right per kind of drawing and answer, after the means over trained kinds and over
    held-out kinds; `unseen_words` and `unknown` are no kinds of phrasing and in no mean."""
    rows = list(rows)
    groups = dict.fromkeys(row["group"] for row in rows)
    each = {group: mean(row["correct"] for row in rows if row["group"] == group) for group in groups}
    scores: dict[str, float] = {}
    for what in (DRAWN, SAID):
        own = {group.partition("/")[2]: value for group, value in each.items() if group.startswith(f"{what}/")}
        for name, held_out in (("trained", False), ("held_out", True)):
            found = [own[kind] for kind in own if kind not in (UNSEEN, UNKNOWN) and (kind in HELD_OUT) == held_out]
            if found:
                scores[f"{what}s_{name}"] = mean(found)
    return scores | each


def _kind(key: Key) -> str:
    return key[0].split("/")[2]


def _request(rng: np.random.Generator, kind: str) -> Prompt:
    if kind != UNSEEN:
        return sample_request(rng, kind, split="test")[1]
    while True:
        prompt = sample_prompt(rng, split="test")
        text = prompt.prompt
        for word, other in UNSEEN_WORDS.items():
            text = with_word(text, word, other)
        if text != prompt.prompt:
            return replace(prompt, prompt=text)


def _asked(rng: np.random.Generator, kind: str, number: int) -> tuple[Scene | None, Turn]:
    """Sample a scene (None: there is no image) and a question about it."""
    if kind == UNKNOWN:
        return None, Turn(kind, sample_unknown_request(rng, UNSEEN_THINGS), REFUSAL)
    while True:
        scene, turn = sample_questions(rng, ASKED_KINDS[number % len(ASKED_KINDS)])
        worded = reworded_question(rng, turn, kind)
        if worded is not None:
            return scene, worded
        number += 1  # the kind has no wording for questions like this one
