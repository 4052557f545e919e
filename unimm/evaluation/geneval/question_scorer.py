"""Score GenEval's images with a VQA model and compare its verdicts with the detector's.

The verdicts are the records of a separate run next to the detector's, and are never mixed with them.
"""

import functools
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from PIL import Image
from tqdm.auto import tqdm

from unimm.data.images import load_image
from unimm.errors import UserError
from unimm.evaluation.geneval.prompts import Metadata
from unimm.evaluation.geneval.questions import Agreement, Question, agreement, mean_score, questions, score_answers
from unimm.evaluation.geneval.summary import summarize_records
from unimm.evaluation.runs.bad_images import each_or_error, scored_or_error
from unimm.evaluation.runs.records import unreadable
from unimm.evaluation.runs.store import Key, Record, RunStore
from unimm.runs.provenance import write_atomically

BENCH = "geneval-vqa"
DISAGREEMENTS = "disagreements.jsonl"


class AnswersQuestions(Protocol):
    """The interface of a VQA model; `unimm.evaluation.vqa.load_vqa_model` returns one."""

    def answer(self, images: Sequence[Image.Image], questions: Sequence[str]) -> list[str]: ...

    def describe(self) -> dict[str, Any]: ...


def question_images(
    store: RunStore,
    raw_images: Mapping[Key, Path],
    prompts: Mapping[str, Metadata],
    vqa_model: AnswersQuestions,
    batch_size: int,
) -> dict[str, Any]:
    """Ask the questions about every image without a record, finish the run and return its summary."""
    described = vqa_model.describe()
    blocks = store.split_blocks(sorted(raw_images), batch_size)
    for block in tqdm(blocks, desc="questions", unit="batch", disable=not blocks):
        start = time.perf_counter()
        asked = [questions(prompts[item]) for item, _ in block]
        images = each_or_error([raw_images[key] for key in block], load_image)
        pairs = zip(images, asked, strict=True)
        shown = [image if isinstance(image, UserError) else (image, each) for image, each in pairs]
        given = scored_or_error(shown, functools.partial(_answers, vqa_model))
        seconds = (time.perf_counter() - start) / len(block)
        for key, each, answers in zip(block, asked, given, strict=True):
            if key in store.done:
                continue
            record = Record(
                BENCH,
                *key,
                inputs=dict(prompts[key[0]]),
                output_path=str(raw_images[key]),
                scorer=described,
                **_scored(each, answers),
            )
            store.append(record, seconds=seconds)
    return store.finish(lambda records: _summary(records) | {"scorer": described})


def _answers(vqa_model: AnswersQuestions, pairs: Sequence[tuple[Image.Image, list[Question]]]) -> list[list[str]]:
    """Return the answers to the questions about each image; all images share one call."""
    images = [image for image, asked in pairs for _ in asked]
    answers = iter(vqa_model.answer(images, [question.text for _, asked in pairs for question in asked]))
    return [[next(answers) for _ in asked] for _, asked in pairs]


def _scored(asked: Sequence[Question], answers: list[str] | UserError) -> dict[str, Any]:
    """Return the record fields that the answers fill; an image that cannot be read counts as wrong."""
    if isinstance(answers, UserError):
        reason = unreadable(answers)
        return {"raw_scores": {"score": 0.0, "unparsed": 0}, "verdict": False, "reason": reason}
    found = score_answers(asked, answers)
    rows = [
        question._asdict() | {"answer": answer, "read": read}
        for question, answer, read in zip(asked, answers, found.read, strict=True)
    ]
    scores = {"answers": rows, "score": found.score, "unparsed": found.read.count(None)}
    return {"raw_scores": scores, "verdict": found.correct, "reason": "\n".join(found.reasons)}


def compare_scorers(first: Sequence[Record], second: Sequence[Record], folder: Path) -> Agreement:
    """Compare the detector's and the VQA model's verdicts; write the images they disagree on as JSON lines.

    Raises:
        ValueError: the two did not score the same images.
    """
    by_key = {record.key: record for record in first}
    answered = {record.key: record for record in second}
    found = agreement(_verdicts(first), _verdicts(second))
    lines = []
    for key in sorted([*found.only_first, *found.only_second]):
        row = {"item": key[0], "sample": key[1], "prompt": by_key[key].inputs["prompt"]}
        row |= {"detector": by_key[key].verdict, "detector_reason": by_key[key].reason}
        row |= {"questions": answered[key].verdict, "questions_reason": answered[key].reason}
        lines.append(json.dumps(row | {"output_path": by_key[key].output_path}) + "\n")
    write_atomically(folder / DISAGREEMENTS, "".join(lines))
    return found


def _verdicts(records: Sequence[Record]) -> dict[Key, bool]:
    return {record.key: bool(record.verdict) for record in records}


def _summary(records: Sequence[Record]) -> dict[str, Any]:
    rows = [{"tag": record.inputs["tag"], "score": record.raw_scores["score"]} for record in records]
    return summarize_records(records) | {"mean_answers": mean_score(rows)}
