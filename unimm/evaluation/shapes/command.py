"""Command line of the evaluation on the shapes data set (`unimm eval shapes`, eval/shapes.py)."""

import argparse
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from unimm.data.image_files import save_image_atomically
from unimm.data.shapes import TAGS
from unimm.errors import UserError
from unimm.evaluation.runs.arguments import recorded_arguments
from unimm.evaluation.runs.evaluated_model import EvaluatedModel, load_evaluated_model
from unimm.evaluation.runs.store import Key, Manifest, Record, RunStore, content_sha256
from unimm.evaluation.shapes.arguments import BENCH, ShapesPlan, parse
from unimm.evaluation.shapes.instructions import (
    edit_keys,
    edit_scores,
    edits,
    interleaved,
    interleaved_keys,
    interleaved_scores,
)
from unimm.evaluation.shapes.phrasing import phrasing, phrasing_keys, phrasing_scores
from unimm.evaluation.shapes.run import (
    QUESTION_KINDS,
    WITHHELD,
    Row,
    Shown,
    Wanted,
    answers,
    chat_scores,
    drawings,
    evaluate_chat,
    evaluate_generation,
    evaluate_reconstruction,
    generation_scores,
    held_out_prompts,
    reconstruction_scores,
    reconstructions,
    rows_of,
    strict_scores,
)
from unimm.runs.provenance import git_commit, model_fingerprint, write_atomically
from unimm.runs.report import Report
from unimm.sampling import sampling_options

SCORERS = {
    "reconstruction": {"name": "the world's analytic detector", "rule": "same colours and shapes on both sides"},
    "chat": {"name": "the one right answer", "rule": "equal after normalisation"},
    "generation": {"name": "the world's analytic detector", "rule": "GenEval's, every detection counts"},
    "edits": {"name": "the world's analytic detector", "rule": "what the instruction asks for is found"},
    "interleaved": {"name": "the world's analytic detector", "rule": "the text names the objects that are found"},
    "phrasing": {"name": "as in generation and chat", "rule": "as in generation and chat"},
}
ASKED = ("kind", "group", "question", "expected", "prompt")  # inputs of a row; its other fields are outputs

STRICT = "strict"

Scores = dict[str, dict[str, Any]]
"""Part -> its scores; STRICT -> part -> the scores that the strict detector computes as well."""


class Part(NamedTuple):
    """The functions of one part: measure it at once, measure it batch by batch, and compute scores from its rows."""

    evaluate: Callable[[EvaluatedModel, ShapesPlan], tuple[dict[str, float], list[Row]]]
    batches: Callable[[EvaluatedModel, ShapesPlan, Wanted], Iterator[list[Shown]]]
    scores: Callable[[list[Row], int], dict[str, float]]


def _part(
    batches: Callable[[Any, Any, ShapesPlan, Wanted], Iterator[list[Shown]]],
    scores: Callable[[list[Row]], dict[str, float]],
) -> Part:
    """Return the part of a unified model that has these batches and scores."""

    def evaluate(evaluated: EvaluatedModel, plan: ShapesPlan) -> tuple[dict[str, float], list[Row]]:
        rows = rows_of(batches(evaluated.model, evaluated.processor, plan, bool))
        return scores(rows), rows

    return Part(
        evaluate,
        lambda evaluated, plan, wanted: batches(evaluated.model, evaluated.processor, plan, wanted),
        lambda rows, _: scores(rows),
    )


MEASURES = {
    "reconstruction": Part(
        lambda evaluated, plan: evaluate_reconstruction(evaluated.tokenizer, evaluated.image_processor, plan),
        lambda evaluated, plan, wanted: reconstructions(evaluated.tokenizer, evaluated.image_processor, plan, wanted),
        reconstruction_scores,
    ),
    "chat": Part(
        lambda evaluated, plan: evaluate_chat(evaluated.model, evaluated.processor, plan),
        lambda evaluated, plan, wanted: answers(evaluated.model, evaluated.processor, plan, wanted),
        lambda rows, _: chat_scores(rows),
    ),
    "generation": Part(
        lambda evaluated, plan: evaluate_generation(evaluated.model, evaluated.processor, plan),
        lambda evaluated, plan, wanted: drawings(evaluated.model, evaluated.processor, plan, wanted),
        lambda rows, _: generation_scores(rows),
    ),
    "edits": _part(edits, edit_scores),
    "interleaved": _part(interleaved, interleaved_scores),
    "phrasing": _part(phrasing, phrasing_scores),
}
KEYS = {"edits": edit_keys, "interleaved": interleaved_keys, "phrasing": phrasing_keys}


def main(argv: Sequence[str] | None = None, description: str | None = None) -> None:
    """Parse the arguments and run the command."""
    run(parse(argv, description))


def run(arguments: argparse.Namespace) -> None:
    """Load the model, measure, and report."""
    plan, report = _plan_of(arguments), Report(arguments.json)
    with report.timed("load"):
        evaluated = load_evaluated_model(arguments.model)
    if evaluated.model is None and arguments.parts != ["reconstruction"]:
        raise UserError(
            f"{arguments.model} is an image tokenizer and cannot answer or draw: add --parts reconstruction."
        )
    if arguments.output is None:
        scores, rows = _measured(evaluated, plan, arguments.parts, report)
    else:
        scores, rows = _recorded(evaluated, plan, arguments, report)
    report.add(**scores, seed=plan.seed, commit=git_commit())
    if arguments.rows is not None:
        write_atomically(arguments.rows, "".join(json.dumps(row) + "\n" for row in rows))
    report.write()


def _measured(
    evaluated: EvaluatedModel, plan: ShapesPlan, parts: list[str], report: Report
) -> tuple[Scores, list[Row]]:
    scores, strict, rows = Scores(), Scores(), list[Row]()
    for part in parts:
        with report.timed(part):
            scores[part], scored = MEASURES[part].evaluate(evaluated, plan)
        strict[part] = _strict(part, scored)
        rows += [{"part": part, **row} for row in scored]
        report.say(_table({part: scores[part], STRICT: strict}))
    return scores | {STRICT: _present(strict)}, rows


def _strict(part: str, rows: list[Row]) -> dict[str, float]:
    """Return the scores of a part by the strict detector; empty if it scores none of it."""
    if part not in KEYS:
        return strict_scores(part, rows)
    renamed = {"correct": "strict", "kept": "strict_kept", "drawn": "strict_drawn"}
    strictly = [row | {old: row.get(new) for old, new in renamed.items()} for row in rows if "strict" in row]
    return MEASURES[part].scores(strictly, 0)


def _present(strict: Scores) -> Scores:
    return {part: values for part, values in strict.items() if values}


# ---- a run that is kept ----------------------------------------------------------------------------------------------


def _recorded(
    evaluated: EvaluatedModel, plan: ShapesPlan, arguments: argparse.Namespace, report: Report
) -> tuple[Scores, list[Row]]:
    """Measure as `_measured` does, recording every image and answer in `--output`."""
    size = evaluated.tokenizer.config.codebook_size
    with RunStore.open(arguments.output, _manifest(evaluated, plan, arguments)) as store:
        for part in arguments.parts:
            with report.timed(part):
                _record_part(store, evaluated, plan, part)
        scores: Scores = store.finish(lambda records: _scores(records, arguments.parts, size))
        rows = [{"part": _part_of(record), **_row_of(record)} for record in store.records()]
    report.say(_table(scores))
    return scores, rows


def _record_part(store: RunStore, evaluated: EvaluatedModel, plan: ShapesPlan, part: str) -> None:
    """Measure what a part still lacks and append its records."""
    keys, together = part_keys(part, plan)
    todo = set(store.split(keys, together=together))
    for batch in MEASURES[part].batches(evaluated, plan, lambda keys: any(key in todo for key in keys)):
        for row, images in batch:
            if (row["item"], row["sample"]) in todo:
                store.append(_record_of(store, plan, part, dict(row), images))


def part_keys(part: str, plan: ShapesPlan) -> tuple[list[Key], int]:
    """Return a part's keys in the order of measurement, and the batch size."""
    if part in KEYS:
        return KEYS[part](plan)
    if part == "reconstruction":
        count = max(plan.num_scenes, plan.codebook_scenes)
        return [(f"{part}/{index:05}", 0) for index in range(count)], plan.batch_size
    if part == "chat":
        return [(f"{part}/{kind}/{i:04}", 0) for kind in QUESTION_KINDS for i in range(plan.questions)], plan.batch_size
    keys = [
        (f"{part}/{group}/{index:03}", k)
        for group in (*TAGS, WITHHELD)
        for index in range(plan.prompts)
        for k in range(plan.images_per_prompt)
    ]
    return keys, plan.prompts_at_once * plan.images_per_prompt


def _record_of(store: RunStore, plan: ShapesPlan, part: str, row: Row, images: Mapping[str, Any]) -> Record:
    item, sample = row.pop("item"), row.pop("sample")
    paths = {
        "drawn": store.image_path(item, sample),
        "original": store.image_path(item, sample, role="original"),
    }
    for role, image in images.items():
        save_image_atomically(image, paths[role])
    inputs: dict[str, Any] = {"part": WITHHELD if row.get("group") == WITHHELD else part}
    if tag := row.pop("tag", row.get("kind")):
        inputs["tag"] = tag
    inputs |= {name: row.pop(name) for name in ASKED if name in row}
    if "original" in images:
        inputs["original_path"] = store.inside(paths["original"])
    verdict, reasons = row.pop("correct", None), row.pop("reasons", [])
    return Record(
        BENCH,
        item,
        sample,
        seed=row.pop("seed", plan.seed),
        inputs=inputs,
        output_path=str(paths["drawn"]) if "drawn" in images else None,
        raw_scores=row,
        verdict=verdict,
        reason="\n".join(reasons),
        scorer={} if verdict is None else SCORERS[part],
    )


def _part_of(record: Record) -> str:
    return record.item.partition("/")[0]


def _row_of(record: Record) -> Row:
    """Rebuild the row of a record, with the fields that scores and `--rows` need."""
    row = {"item": record.item, "sample": record.sample, **record.raw_scores}
    row |= {name: value for name, value in record.inputs.items() if name in (*ASKED, "tag")}
    if record.verdict is not None:
        row |= {"correct": record.verdict, "reasons": record.reason.splitlines()}
    return row


def _scores(records: Iterable[Record], parts: Sequence[str], codebook_size: int) -> Scores:
    records = list(records)
    rows = {part: [_row_of(record) for record in records if _part_of(record) == part] for part in parts}
    scores: Scores = {part: MEASURES[part].scores(own, codebook_size) for part, own in rows.items()}
    return scores | {STRICT: _present({part: _strict(part, own) for part, own in rows.items()})}


def _manifest(evaluated: EvaluatedModel, plan: ShapesPlan, arguments: argparse.Namespace) -> Manifest:
    asked = [prompt.metadata() for tag in (*TAGS, None) for prompt in held_out_prompts(plan, tag)]
    amounts = ("num_scenes", "codebook_scenes", "questions", "prompts", "images_per_prompt")
    return Manifest(
        BENCH,
        content_sha256(asked),
        plan.seed,
        settings={
            "protocol": "the shapes data set, held-out prompts, greedy answers",
            "parts": sorted(arguments.parts),
            **{name: getattr(plan, name) for name in amounts},
            "sampling": plan.sampling or "the checkpoint's own",
            "device": evaluated.tokenizer.device.type,
            "dtype": str(evaluated.tokenizer.dtype),
        },
        weights={"model": model_fingerprint(evaluated.model or evaluated.tokenizer)},
        arguments=recorded_arguments(arguments) | {"parts": ",".join(arguments.parts)},
    )


# ---- the command line ------------------------------------------------------------------------------------------------


def _plan_of(arguments: argparse.Namespace) -> ShapesPlan:
    given = vars(arguments)
    sizes = {name: given[name] for name in ShapesPlan.__dataclass_fields__ if name in given}
    return ShapesPlan(**sizes, sampling=sampling_options(arguments))


def _table(scores: Scores) -> str:
    lines, parts = [f"{'':<26} {'':>8} {STRICT:>8}"], [part for part in scores if part != STRICT]
    for part in parts:
        strict = scores[STRICT].get(part, {})
        rows = ((f"  {name:<24} {value:8.3f}", strict.get(name)) for name, value in scores[part].items())
        lines += [part, *(row if beside is None else f"{row} {beside:8.3f}" for row, beside in rows)]
    return "\n".join(lines)
