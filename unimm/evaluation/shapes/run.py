"""Reconstruction, question answering and generation on the shapes data set, with held-out scenes and prompts.

No model scores anything. The data set's analytic detector finds the objects of an image: reconstructions are compared
with their originals by these objects, generated images with their prompts by GenEval's rules
(https://arxiv.org/abs/2310.11513), and questions have one correct answer. The detector's score is a geometric overlap,
not a confidence, so every detection counts, in counting prompts too. A strict detector scores the same images as well
(`strict_scores`): it requires crisp shapes and nothing else on the canvas.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from unimm.config.schema import plain
from unimm.data.shapes import SHAPES, TAGS, Prompt, Scene, render, sample_prompt, sample_questions, sample_scene
from unimm.data.shapes.detector import detect
from unimm.data.shapes.strict import read_strictly
from unimm.evaluation.geneval.rules import summary, verdict
from unimm.evaluation.metrics.answers import same_answer
from unimm.evaluation.metrics.image_metrics import capped_psnr, mean_color_per_patch, ssim, to_uint8
from unimm.evaluation.runs.records import Key
from unimm.evaluation.shapes.arguments import ShapesPlan
from unimm.mllm.answering import answer_all
from unimm.mllm.draw_prompts import draw_prompts
from unimm.tokenizer.codebook_usage import CodebookUsage

QUESTION_KINDS = ("existence", "color", "count", "position")
WITHHELD = "withheld"  # prompts with a (color, shape) pair that never occurs in training
MAX_ANSWER_TOKENS = 16
DRAWS_PER_PROMPT = 200  # average number of tries per distinct prompt before prompts may repeat

Row = dict[str, Any]
Shown = tuple[Row, dict[str, Image.Image]]
"""A row and its images, by role: `original`, `drawn`."""
Wanted = Callable[[Sequence[Key]], bool]
"""Returns whether a batch with these keys must be computed."""
Scored = tuple[dict[str, float], list[Row]]
T = TypeVar("T")


def evaluate_reconstruction(tokenizer: Any, image_processor: Any, plan: ShapesPlan) -> Scored:
    """Encode images to ids and decode them; return `reconstruction_scores` and one row per compared image."""
    rows = rows_of(reconstructions(tokenizer, image_processor, plan))
    scores = reconstruction_scores(rows, tokenizer.config.codebook_size)
    return scores, [{name: row[name] for name in row if name != "ids"} for row in rows if "correct" in row]


@torch.inference_mode()
def reconstructions(
    tokenizer: Any, image_processor: Any, plan: ShapesPlan, wanted: Wanted = bool
) -> Iterator[list[Shown]]:
    """Yield rows with the `ids` of every image; compared images also have metrics and the objects on both sides."""
    rng = plan.rng("reconstruction")
    keys = [(f"reconstruction/{index:05}", 0) for index in range(max(plan.num_scenes, plan.codebook_scenes))]
    both_sides = set(keys[: plan.num_scenes])
    scenes = ((key, sample_scene(rng)) for key in keys)
    # Scenes of skipped batches are sampled too, so that the random stream stays the same after a resume.
    for batch in progress(scenes, plan.batch_size, "reconstruction", len(keys)):
        if not wanted([key for key, _ in batch]):
            continue
        images = [render(scene) for _, scene in batch]
        pixel_values = image_processor(images, return_tensors="pt")["pixel_values"].to(tokenizer.device)
        ids = tokenizer.encode(pixel_values).ids
        shown: list[Shown] = [
            (keyed_row(key, ids=codes), {}) for (key, _), codes in zip(batch, ids.tolist(), strict=True)
        ]
        if compared := sum(key in both_sides for key, _ in batch):
            originals = tokenizer.denormalize(pixel_values[:compared].float())
            scenes_compared = [scene for _, scene in batch[:compared]]
            # The compared images come first in a batch, and only they have a pair.
            pairs = _compare(originals, tokenizer.decode(ids[:compared]), tokenizer.config.grid, scenes_compared)
            shown[:compared] = [(row | found, pair) for (row, _), (found, pair) in zip(shown, pairs, strict=False)]
        yield shown


def reconstruction_scores(rows: Iterable[Row], codebook_size: int) -> dict[str, float]:
    """Compute agreement, the fraction of scenes whose reconstruction has the same detected colors and shapes as the
    original; psnr and psnr_mean_color in dB; ssim; codebook_use and perplexity of all ids."""
    rows, usage = list(rows), CodebookUsage(codebook_size)
    usage.update(torch.tensor([row["ids"] for row in rows]))
    compared = [row for row in rows if "correct" in row]
    scores = {"agreement": mean(row["correct"] for row in compared)}
    scores |= {name: mean(row[name] for row in compared) for name in ("psnr", "psnr_mean_color", "ssim")}
    return scores | {"codebook_use": usage.use, "perplexity": usage.perplexity}


def evaluate_chat(model: Any, processor: Any, plan: ShapesPlan) -> Scored:
    """Answer questions about new scenes greedily; return the accuracy per kind and one row per question."""
    rows = rows_of(answers(model, processor, plan))
    return chat_scores(rows), rows


@torch.inference_mode()
def answers(model: Any, processor: Any, plan: ShapesPlan, wanted: Wanted = bool) -> Iterator[list[Shown]]:
    """Yield one row per question, in batches."""
    asked = []
    for kind in QUESTION_KINDS:
        rng = plan.rng("chat", kind)
        asked += [((f"chat/{kind}/{i:04}", 0), sample_questions(rng, kind)) for i in range(plan.questions)]
    for batch in progress(asked, plan.batch_size, "chat"):
        if not wanted([key for key, _ in batch]):
            continue
        images = [render(scene) for _, (scene, _) in batch]
        questions = [(image, turn.question) for image, (_, (_, turn)) in zip(images, batch, strict=True)]
        shown: list[Shown] = []
        for (key, (_, turn)), (image, _), answer in zip(
            batch, questions, answer_questions(model, processor, questions), strict=True
        ):
            row = keyed_row(key, kind=turn.kind, question=turn.question, answer=answer, expected=turn.answer)
            shown.append((row | {"correct": same_answer(answer, turn.answer)}, {"original": image}))
        yield shown


def chat_scores(rows: Iterable[Row]) -> dict[str, float]:
    """Compute the accuracy per kind of question."""
    rows = list(rows)
    return {kind: mean(row["correct"] for row in rows if row["kind"] == kind) for kind in QUESTION_KINDS}


def evaluate_generation(model: Any, processor: Any, plan: ShapesPlan) -> Scored:
    """Draw held-out prompts and apply GenEval's rules; return `generation_scores` and one row per image."""
    rows = rows_of(drawings(model, processor, plan))
    return generation_scores(rows), rows


@torch.inference_mode()
def drawings(model: Any, processor: Any, plan: ShapesPlan, wanted: Wanted = bool) -> Iterator[list[Shown]]:
    """Yield one row per drawn image, in batches."""
    groups = {tag: held_out_prompts(plan, tag) for tag in TAGS} | {WITHHELD: held_out_prompts(plan, None)}
    jobs = [
        (group, index, prompt, plan.number("generation", group, str(index)))
        for group, prompts in groups.items()
        for index, prompt in enumerate(prompts)
    ]
    for batch in progress(jobs, plan.prompts_at_once, "generation"):
        keys = [
            (f"generation/{group}/{index:03}", k) for group, index, *_ in batch for k in range(plan.images_per_prompt)
        ]
        if not wanted(keys):
            continue
        texts, seeds = [prompt.prompt for *_, prompt, _ in batch], [seed for *_, seed in batch]
        images = draw_prompts(model, processor, texts, seeds, plan.images_per_prompt, **plan.sampling)
        shown: list[Shown] = []
        for index, (key, image) in enumerate(zip(keys, images, strict=True)):
            group, _, prompt, seed = batch[index // plan.images_per_prompt]
            shown.append((keyed_row(key, seed=seed, group=group) | score_drawing(prompt, image), {"drawn": image}))
        yield shown


def generation_scores(rows: Iterable[Row]) -> dict[str, float]:
    """Compute the mean per tag, `overall` (the mean of the six tags) and `withheld`."""
    rows = list(rows)
    by_tag = summary([row for row in rows if row["group"] != WITHHELD])
    withheld = mean(row["correct"] for row in rows if row["group"] == WITHHELD)
    return {name: by_tag[name] for name in (*TAGS, "overall")} | {WITHHELD: withheld}


def strict_scores(part: str, rows: Iterable[Row]) -> dict[str, float]:
    """Return the scores of a part by the strict detector: agreement, or those of `generation_scores`."""
    rows = [row | {"correct": row["strict"]} for row in rows if "strict" in row]
    if part == "reconstruction":
        return {"agreement": mean(row["correct"] for row in rows)}
    return generation_scores(rows) if part == "generation" else {}


def held_out_prompts(plan: ShapesPlan, tag: str | None) -> list[Prompt]:
    """Return held-out prompts, repeated only if the tag has too few; `tag` None: prompts with a withheld pair."""
    rng = plan.rng("prompts", tag or WITHHELD)
    prompts: dict[str, Prompt] = {}
    for _ in range(DRAWS_PER_PROMPT * plan.prompts):
        prompt = sample_prompt(rng, tag, split="test", withheld=tag is None)
        prompts.setdefault(prompt.prompt, prompt)
        if len(prompts) == plan.prompts:
            break
    found = list(prompts.values())
    return [found[index % len(found)] for index in range(plan.prompts)]


def read_objects(image: Image.Image | np.ndarray) -> Counter[tuple[str, str]]:
    """Detect the objects of an image and count each (color, shape)."""
    return Counter((item.color, item.shape) for item in detect(image))


def rows_of(batches: Iterable[list[Shown]]) -> list[Row]:
    return [row for batch in batches for row, _ in batch]


def keyed_row(key: Key, **fields: Any) -> Row:
    item, sample = key
    return {"item": item, "sample": sample, **fields}


def _compare(
    originals: torch.Tensor, pixels: torch.Tensor, grid: tuple[int, int], scenes: Sequence[Scene]
) -> Iterator[Shown]:
    """Yield one row per pair of images [B, 3, H, W] of a scene; both are rounded to 8 bits, as files would be."""
    originals, pixels = to_uint8(originals), to_uint8(pixels)
    reference, decoded = originals.float() / 255, pixels.float() / 255
    painted = to_uint8(mean_color_per_patch(reference, reference.shape[-2] // grid[0])).float() / 255
    metrics = {
        "psnr": capped_psnr(decoded, reference),
        "psnr_mean_color": capped_psnr(painted, reference),
        "ssim": ssim(decoded, reference),
    }
    triples = zip(_arrays(originals), _arrays(pixels), scenes, strict=True)
    for index, (before, after, scene) in enumerate(triples):
        expected, found = read_objects(before), read_objects(after)
        row: Row = {"correct": found == expected, "expected": names(expected), "found": names(found)}
        strictly = read_strictly(after)
        there = Counter((item.color, item.shape) for item in scene.objects)
        row |= {"strict": strictly.shows(there), "refusals": list(strictly.refusals)}
        pair = {"original": Image.fromarray(before), "drawn": Image.fromarray(after)}
        yield row | {name: float(values[index]) for name, values in metrics.items()}, pair


def answer_questions(model: Any, processor: Any, questions: Sequence[tuple[Image.Image, str]]) -> list[str]:
    """Answer (image, question) pairs greedily, as one left-padded batch."""
    messages = [
        [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
        for image, question in questions
    ]
    return [each.text for each in answer_all(model, processor, messages, max_new_tokens=MAX_ANSWER_TOKENS)]


def score_drawing(prompt: Prompt, image: Image.Image) -> Row:
    """Apply GenEval's rules and the strict reading to one drawn image."""
    detections = [item.as_rule_input() for item in detect(image)]
    scored = verdict(prompt.metadata(), detections, class_names=SHAPES, threshold=0, counting_threshold=0)
    found = names(Counter((item["color"], item["label"]) for item in detections))
    row = {"tag": prompt.tag, "prompt": prompt.prompt, "correct": scored.correct}
    row |= {"reasons": scored.reasons, "found": found, "detections": plain(detections)}
    refused = refusals(prompt.metadata(), image)
    return row | {"strict": not refused, "refusals": refused}


def refusals(metadata: Mapping[str, Any], image: Image.Image) -> list[str]:
    """Return why, by the strict detector, an image does not show exactly the prompt with this metadata."""
    read, asked = read_strictly(image), sum(rule["count"] for rule in metadata["include"])
    detections = [item.as_rule_input() for item in read.objects]
    scored = verdict(metadata, detections, class_names=SHAPES, threshold=0, counting_threshold=0)
    surplus = [f"{len(detections)} objects, {asked} were asked for"] if len(detections) > asked else []
    return [*read.refusals, *scored.reasons, *surplus]


def _arrays(images: torch.Tensor) -> np.ndarray:
    """Convert uint8 [B, 3, H, W] to an array [B, H, W, 3]."""
    return images.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def names(objects: Counter[tuple[str, str]]) -> list[str]:
    return sorted(f"{color} {shape}" for color, shape in objects.elements())


def mean(values: Iterable[Any]) -> float:
    return float(np.mean(list(values)))


def progress(items: Iterable[T], size: int, name: str, total: int | None = None) -> Iterator[list[T]]:
    """Yield batches of `size`, with a progress bar that counts items."""
    with tqdm(items, total=total, desc=name, leave=False) as bar:
        iterator = iter(bar)
        while batch := list(islice(iterator, size)):
            yield batch
