"""DPG-Bench: draw the prompts or read a folder of 2 x 2 grids, and ask a VQA model every question about every image.

An image depends only on its prompt, its sample number and the run's seed, and a prompt's images are always drawn
together, so interruptions and the number of processes do not change results. A record holds the question rows and the
answers as written, so the scores of `rules.py` are pure functions of the records. A run uses one VQA model.
"""

import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from PIL import Image
from tqdm.auto import tqdm

from unimm.errors import UserError
from unimm.evaluation.dpg.arguments import BENCH
from unimm.evaluation.dpg.prompts import Prompts, Rows
from unimm.evaluation.dpg.summary import summarize_records
from unimm.evaluation.runs.bad_images import scored_or_error
from unimm.evaluation.runs.records import unreadable
from unimm.evaluation.runs.store import Key, Record, RunStore
from unimm.evaluation.vqa import VQAModel


class Images(Protocol):
    """A source of images: drawn by a model or read from grids."""

    keys: list[Key]

    def load(self, block: Sequence[Key]) -> list[tuple[Path, Image.Image | UserError]]:
        """Return each image's file together with the image, or with the error if it cannot be read."""
        ...

    def seed(self, key: Key) -> int:
        """Return the seed that the image was drawn with, 0 if unknown."""
        ...


def score_images(store: RunStore, images: Images, prompts: Prompts, vqa_model: VQAModel | None) -> dict[str, Any]:
    """Ask the questions about every image without a record, finish the run and return its summary.

    Without a `vqa_model`, images are drawn and nothing is asked.
    """
    described = {} if vqa_model is None else vqa_model.describe()
    size = len({sample for _, sample in images.keys})
    for block in tqdm(store.split_blocks(images.keys, size), desc="DPG", unit="prompt"):
        start, loaded = time.perf_counter(), images.load(block)
        rows = prompts.rows.get(block[0][0], [])  # a block holds the images of one prompt
        found = scored_or_error([image for _, image in loaded], functools.partial(_ask, vqa_model, rows))
        for key, (path, _), scores in zip(block, loaded, found, strict=True):
            if key in store.done:
                continue
            item, sample = key
            record = Record(
                BENCH,
                item,
                sample,
                seed=images.seed(key),
                inputs={"prompt": prompts.texts[item], "rows": rows},
                output_path=str(path),
                raw_scores=_unanswered(rows) if isinstance(scores, UserError) else scores,
                reason=unreadable(scores) if isinstance(scores, UserError) else "",
                scorer=described,
            )
            store.append(record, seconds=(time.perf_counter() - start) / size)
    return store.finish(summarize_records)


def _unanswered(rows: Rows) -> dict[str, Any]:
    """Return the scores of an unreadable image: an empty answer to every question, which every rule counts as no."""
    return {"answers": {str(int(row["proposition_id"])): "" for row in rows}} if rows else {}


def _ask(vqa_model: VQAModel | None, rows: Rows, images: Sequence[Image.Image]) -> list[dict[str, Any]]:
    """Return the scores of each image, asked separately from the others."""
    return [{} if vqa_model is None else _answers_about(vqa_model, image, rows) for image in images]


def _answers_about(vqa_model: VQAModel, image: Image.Image, rows: Rows) -> dict[str, Any]:
    asked = vqa_model.answer_yes_no([image] * len(rows), [row["question_natural_language"] for row in rows])
    numbers = [str(int(row["proposition_id"])) for row in rows]
    scores: dict[str, Any] = {"answers": {n: each.answer for n, each in zip(numbers, asked, strict=True)}}
    if asked and asked[0].probability is not None:
        scores["probabilities"] = {n: each.probability for n, each in zip(numbers, asked, strict=True)}
    if guessed := [n for n, each in zip(numbers, asked, strict=True) if each.guessed]:
        scores["guessed"] = guessed
    return scores
