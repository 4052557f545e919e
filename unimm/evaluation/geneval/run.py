"""GenEval (https://arxiv.org/abs/2310.11513): generate an image per prompt and sample, or read a folder, and score it.

Image (item, sample) depends only on the run's seed and its own key, and batches always have the same members, so any
number of processes, interrupted or not, writes the same bytes. Scoring reads the file on disk. Every record holds all
detections, so the table can be recomputed under other thresholds.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tqdm.auto import tqdm

from unimm.data.images import load_image
from unimm.data.shapes import TAGS
from unimm.errors import UserError
from unimm.evaluation.geneval.arguments import BENCH
from unimm.evaluation.geneval.files import ImageFolder, item_name
from unimm.evaluation.geneval.prompts import Metadata, PromptTrack
from unimm.evaluation.geneval.scorers import Detection, Scorer
from unimm.evaluation.geneval.summary import summarize_records
from unimm.evaluation.runs.bad_images import each_or_error, scored_or_error
from unimm.evaluation.runs.drawn_images import DrawnImages
from unimm.evaluation.runs.records import unreadable
from unimm.evaluation.runs.store import Key, Record, RunStore
from unimm.evaluation.shapes.arguments import ShapesPlan
from unimm.evaluation.shapes.run import held_out_prompts

SHAPES_TRACK = "geneval-shapes"


@dataclass(frozen=True)
class GenevalPlan:
    """Number of prompts and images, and the sampling settings.

    Args:
        num_images: images per prompt; the benchmark draws four.
        limit: prompts per tag, None for all.
        batch_size: images per forward; the last bits of a result may depend on it, so the manifest records it.
        sampling: settings of `ImageSampling` that override the checkpoint's defaults.
    """

    num_images: int = 4
    limit: int | None = None
    seed: int = 0
    batch_size: int = 8
    sampling: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("num_images", "limit", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1.")

    def choose(self, track: PromptTrack) -> dict[str, Metadata]:
        """Return the prompts to draw by item, which is the index in the full track even under `limit`."""
        chosen, taken = {}, dict[str, int]()
        for index, prompt in enumerate(track.prompts):
            taken[prompt["tag"]] = taken.get(prompt["tag"], 0) + 1
            if self.limit is None or taken[prompt["tag"]] <= self.limit:
                chosen[item_name(index)] = prompt
        return chosen


class Images(Protocol):
    """A source of images: drawn by a model or read from a folder."""

    keys: list[Key]

    @property
    def prompts(self) -> Mapping[str, Metadata]: ...

    def paths(self, block: Sequence[Key]) -> list[Path]:
        """Return the files of these images, drawing those that are missing."""
        ...

    def seed(self, key: Key) -> int:
        """Return the seed that the image was drawn with, 0 if unknown."""
        ...


class DrawnPrompts(DrawnImages):
    """Images drawn by a unified model, with GenEval's prompts."""

    def __init__(
        self, model: Any, processor: Any, prompts: Mapping[str, Metadata], plan: GenevalPlan, store: RunStore
    ) -> None:
        texts = {item: prompt["prompt"] for item, prompt in prompts.items()}
        super().__init__(model, processor, texts, plan.num_images, store, plan.sampling)
        self.prompts = prompts


class GivenImages:
    """Images from a folder in the official layout."""

    def __init__(self, folder: ImageFolder) -> None:
        self.prompts, self.images, self.keys = folder.prompts, folder.images, sorted(folder.images)

    def paths(self, block: Sequence[Key]) -> list[Path]:
        return [self.images[key] for key in block]

    def seed(self, key: Key) -> int:
        return 0


def score_images(store: RunStore, raw_images: Images, scorer: Scorer, batch_size: int) -> dict[str, Any]:
    """Score every image without a record, finish the run and return its summary."""
    described = scorer.describe()
    blocks = store.split_blocks(raw_images.keys, batch_size)
    for block in tqdm(blocks, desc="GenEval", unit="batch", disable=not blocks):
        start = time.perf_counter()
        paths, prompts = raw_images.paths(block), [raw_images.prompts[item] for item, _ in block]
        images = each_or_error(paths, load_image)
        pairs = zip(images, prompts, strict=True)
        shown = [image if isinstance(image, UserError) else (image, prompt) for image, prompt in pairs]
        found = scored_or_error(shown, lambda pairs: scorer.detections(*map(list, zip(*pairs, strict=True))))
        seconds = (time.perf_counter() - start) / len(block)
        for key, path, prompt, detections in zip(block, paths, prompts, found, strict=True):
            if key in store.done:
                continue
            scored = _scored(scorer, prompt, detections)
            record = Record(
                BENCH,
                *key,
                seed=raw_images.seed(key),
                inputs=dict(prompt),
                output_path=str(path),
                scorer=described,
                **scored,
            )
            store.append(record, seconds=seconds)
    return store.finish(lambda records: summarize_records(records) | {"scorer": described})


def _scored(scorer: Scorer, prompt: Metadata, detections: list[Detection] | UserError) -> dict[str, Any]:
    """Return the record fields that the rules fill; an image that could not be read or scored counts as wrong."""
    if isinstance(detections, UserError):
        reason = unreadable(detections)
        return {"raw_scores": {"plain": False, "unparsed": 0}, "verdict": False, "reason": reason}
    scored, plain = scorer.verdict(prompt, detections), scorer.plain(prompt, detections)
    scores = {"detections": detections, "counts": scored.counts, "plain": plain.correct, "unparsed": plain.guessed}
    return {"raw_scores": scores, "verdict": scored.correct, "reason": "\n".join(scored.reasons)}


def shapes_track(seed: int, prompts_per_tag: int) -> PromptTrack:
    """Return `prompts_per_tag` held-out prompts of the shapes data set for each tag."""
    plan = ShapesPlan(prompts=prompts_per_tag, seed=seed)
    return PromptTrack(SHAPES_TRACK, [prompt.metadata() for tag in TAGS for prompt in held_out_prompts(plan, tag)])
