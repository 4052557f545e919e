"""Edits and interleaved answers on the shapes data set, scored by both detectors (no model scores anything).

An edit is right if what the instruction asks for is found in the drawn image; each object that it does not name must be
found again where it was. An interleaved answer is right if its text names exactly the objects of the image in it,
whatever was asked for.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from PIL import Image

from unimm.data.conversations import message
from unimm.data.editing import edit_request
from unimm.data.interleaved import sample_interleaved
from unimm.data.shapes import COLORS, SHAPES, Prompt, render
from unimm.data.shapes.detector import background_of, detect
from unimm.data.shapes.edits import KINDS, Edit, sample_edit
from unimm.data.shapes.strict import read_strictly
from unimm.english import NUMBERS, plural
from unimm.evaluation.runs.records import Key
from unimm.evaluation.shapes.arguments import ShapesPlan
from unimm.evaluation.shapes.run import (
    Row,
    Shown,
    Wanted,
    keyed_row,
    mean,
    names,
    progress,
    read_objects,
    score_drawing,
)
from unimm.mllm.answering import chat_inputs
from unimm.mllm.draw_prompts import draw_conversations

MAX_TEXT_TOKENS = 48
NAMED = re.compile(
    rf"(?:\b({'|'.join(NUMBERS)}) )?\b({'|'.join(COLORS)}) (?:({'|'.join(map(plural, SHAPES))})|({'|'.join(SHAPES)}))\b"
)


# ---- edits -----------------------------------------------------------------------------------------------------------


def edit_keys(plan: ShapesPlan) -> tuple[list[Key], int]:
    """Return the keys of all edits, `plan.prompts` of each kind, and the batch size."""
    return [(f"edits/{kind}/{index:03}", 0) for kind in KINDS for index in range(plan.prompts)], plan.batch_size


@torch.inference_mode()
def edits(model: Any, processor: Any, plan: ShapesPlan, wanted: Wanted = bool) -> Iterator[list[Shown]]:
    """Yield one row per edited image, in batches."""
    rngs = {kind: plan.rng("edits", kind) for kind in KINDS}
    jobs = [(key, sample_edit(rngs[key[0].split("/")[1]], key[0].split("/")[1])) for key in edit_keys(plan)[0]]
    for batch in progress(jobs, plan.batch_size, "edits"):
        if not wanted([key for key, _ in batch]):
            continue
        sources = [render(edit.source) for _, edit in batch]
        asked = [[edit_request(image, edit.instruction)] for image, (_, edit) in zip(sources, batch, strict=True)]
        seeds = [plan.number(key[0]) for key, _ in batch]
        drawn = draw_conversations(model, processor, asked, seeds, **plan.sampling)
        shown: list[Shown] = []
        for (key, edit), seed, source, image in zip(batch, seeds, sources, drawn, strict=True):
            row = keyed_row(key, seed=seed, kind=edit.kind, prompt=edit.instruction) | score_edit(edit, image)
            shown.append((row, {"original": source, "drawn": image}))
        yield shown


def score_edit(edit: Edit, image: Image.Image) -> Row:
    """Return `correct` and `strict`, and which of the kept objects are found again (`kept`, `strict_kept`)."""
    tone, found, strictly = background_of(image), detect(image), read_strictly(image)
    kept, strict_kept = edit.unchanged(found), edit.unchanged(strictly.objects)
    correct = edit.holds(found, tone)
    seen = names(Counter((each.color, each.shape) for each in found))
    reasons = [] if correct else [f"found {', '.join(seen) or 'nothing'} on {tone}"]
    row = {"correct": correct, "reasons": reasons, "found": seen, "kept": kept, "strict_kept": strict_kept}
    return row | {"strict": edit.holds(strictly.objects, tone), "refusals": list(strictly.refusals)}


def edit_scores(rows: Iterable[Row]) -> dict[str, float]:
    """Compute the share of right edits per kind, their mean `overall`, and the share of kept objects found again."""
    rows = list(rows)
    scores = {kind: mean(row["correct"] for row in rows if row["kind"] == kind) for kind in KINDS}
    return scores | {"overall": mean(scores.values()), "unchanged": mean(each for row in rows for each in row["kept"])}


# ---- interleaved answers ---------------------------------------------------------------------------------------------


def interleaved_keys(plan: ShapesPlan) -> tuple[list[Key], int]:
    """Return the keys of all interleaved answers, and the batch size."""
    return [(f"interleaved/{index:03}", 0) for index in range(plan.prompts)], plan.batch_size


@torch.inference_mode()
def interleaved(model: Any, processor: Any, plan: ShapesPlan, wanted: Wanted = bool) -> Iterator[list[Shown]]:
    """Yield one row per answer, in batches."""
    rng = plan.rng("interleaved")
    jobs = [(key, *sample_interleaved(rng, split="test")) for key in interleaved_keys(plan)[0]]
    for batch in progress(jobs, plan.batch_size, "interleaved"):
        if not wanted([key for key, *_ in batch]):
            continue
        requests, seeds = [request for _, request, _ in batch], [plan.number(key[0]) for key, *_ in batch]
        shown: list[Shown] = []
        drawn = draw_and_say(model, processor, requests, seeds, **plan.sampling)
        for (key, request, prompt), seed, (image, text) in zip(batch, seeds, drawn, strict=True):
            row = keyed_row(key, seed=seed, prompt=request, answer=text) | score_answer(prompt, image, text)
            shown.append((row, {} if image is None else {"drawn": image}))
        yield shown


def draw_and_say(
    model: Any, processor: Any, requests: Sequence[str], seeds: Sequence[int], **sampling: Any
) -> list[tuple[Image.Image | None, str]]:
    """Return the first image (None without one) and the text after it of the interleaved answers to requests."""
    inputs = chat_inputs(model, processor, [[message("user", request)] for request in requests])
    images = {"image_generation": sampling} if sampling else {}
    room = model.num_image_tokens + 2 + MAX_TEXT_TOKENS
    written = model.generate(
        **inputs, generation_mode="interleaved", seed=list(seeds), do_sample=False, max_new_tokens=room, **images
    )
    answers: list[tuple[Image.Image | None, str]] = []
    for parts in processor.split_parts(written[:, inputs["input_ids"].shape[1] :]):
        places = [place for place, part in enumerate(parts) if part["type"] == "image"]
        image, after = None, 0
        if places:
            token_ids = model.visual_vocabulary.token_ids(parts[places[0]]["ids"][None])
            (image,) = processor.postprocess(model.decode_image_tokens(token_ids))
            after = places[0] + 1
        answers.append((image, " ".join(part["text"] for part in parts[after:] if part["type"] == "text").strip()))
    return answers


def score_answer(prompt: Prompt, image: Image.Image | None, text: str) -> Row:
    """Return whether a text names exactly the objects of its image (`correct`), and whether the image shows the prompt
    (`drawn`), by both detectors."""
    if image is None:
        reasons = ["no image"]
        return {"correct": False, "reasons": reasons, "drawn": False, "strict": False, "strict_drawn": False}
    scored, named, strictly = score_drawing(prompt, image), named_objects(text), read_strictly(image)
    correct = named == read_objects(image)
    row = {"correct": correct, "reasons": [] if correct else [f"named {', '.join(names(named)) or 'nothing'}"]}
    row |= {"found": scored["found"], "drawn": scored["correct"], "strict_drawn": scored["strict"]}
    return row | {"strict": strictly.shows(named), "refusals": list(strictly.refusals)}


def named_objects(text: str) -> Counter[tuple[str, str]]:
    """Count the (color, shape) that a text names: "a red circle and two blue rings"."""
    found: Counter[tuple[str, str]] = Counter()
    singular = {plural(shape): shape for shape in SHAPES}
    for number, color, many, one in NAMED.findall(text):
        found[color, one or singular[many]] += NUMBERS.index(number) if number else 1
    return +found


def interleaved_scores(rows: Iterable[Row]) -> dict[str, float]:
    """Compute `named`, the share of answers whose text names what was drawn, and `drawn`, the share of right
    drawings."""
    rows = list(rows)
    return {"named": mean(row["correct"] for row in rows), "drawn": mean(row["drawn"] for row in rows)}
