"""The second judge of GenEval's pictures: a model that answers questions about them, and where the two part.

Its verdicts are records of a run of their own, beside the detector's, and never stand in one column with them.
"""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from PIL import Image
from tqdm.auto import tqdm

from unimm.benchmarks.store import Key, Record, RunStore
from unimm.data.images import load_image
from unimm.evaluation.geneval_prompts import Metadata
from unimm.evaluation.geneval_questions import Agreement, agreement, judge_answers, mean_score, questions
from unimm.evaluation.geneval_summary import summarize_records
from unimm.provenance import write_atomically

BENCH = "geneval-vqa"
DISAGREEMENTS = "disagreements.jsonl"


class AnswersQuestions(Protocol):
    """What a judge must be able to do; `unimm.benchmarks.vqa.load_judge` gives one."""

    def answer(self, images: Sequence[Image.Image], questions: Sequence[str]) -> list[str]: ...

    def describe(self) -> dict[str, Any]: ...


def question_pictures(
    store: RunStore,
    pictures: Mapping[Key, Path],
    prompts: Mapping[str, Metadata],
    judge: AnswersQuestions,
    batch_size: int,
) -> dict[str, Any]:
    """Ask about every picture that the run has no record of, and finish it; gives its summary."""
    described = judge.describe()
    blocks = store.split_blocks(sorted(pictures), batch_size)
    for block in tqdm(blocks, desc="questions", unit="batch", disable=not blocks):
        start = time.perf_counter()
        asked = [questions(prompts[item]) for item, _ in block]
        images = [load_image(pictures[key]) for key in block]
        shown = [image for image, each in zip(images, asked, strict=True) for _ in each]
        answers = iter(judge.answer(shown, [question.text for each in asked for question in each]))
        seconds = (time.perf_counter() - start) / len(block)
        for (item, sample), each in zip(block, asked, strict=True):
            given = [next(answers) for _ in each]
            if (item, sample) in store.done:
                continue
            answered = judge_answers(each, given)
            rows = [
                question._asdict() | {"answer": answer, "read": read}
                for question, answer, read in zip(each, given, answered.read, strict=True)
            ]
            record = Record(
                BENCH,
                item,
                sample,
                inputs=dict(prompts[item]),
                output_path=str(pictures[item, sample]),
                raw_scores={"answers": rows, "score": answered.score, "unparsed": answered.read.count(None)},
                verdict=answered.correct,
                reason="\n".join(answered.reasons),
                judge=described,
            )
            store.append(record, seconds=seconds)
    return store.finish(lambda records: _summary(records) | {"judge": described})


def compare_judges(first: Sequence[Record], second: Sequence[Record], folder: Path) -> Agreement:
    """Agreement of the detector's and the questions' verdicts; the pictures that they part on, as JSON lines.

    Raises:
        ValueError: the two did not judge the same pictures.
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
