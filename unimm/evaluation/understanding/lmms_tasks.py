"""lmms-eval's understanding tasks on data from the hub or from a local folder, and the scoring of single answers.

Local data is used through an overlay of the shipped task. The overlay is written at run time, keeps prompts and scoring
as they are, and has a name of its own (a shipped name would take precedence over ours). Rows are built from the
documents without their images, so every score can be recomputed from the records alone.
"""

import argparse
import ast
import copy
import importlib.util
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from unimm.errors import UserError
from unimm.evaluation.metrics.answers import same_answer
from unimm.evaluation.metrics.open_answers import plain_open
from unimm.evaluation.understanding.rules import choice_fields, first_letter, mmmu_choice, same_text
from unimm.evaluation.understanding.textvqa import plain_accuracy, process, soft_accuracy

Row = dict[str, Any]
Document = Mapping[str, Any]
HUB_OWNER = "lmms-lab-encoder"
OCR_PROMPT = {"pre_prompt": "", "post_prompt": "\nAnswer the question using a single word or phrase.", "ocr": True}
BARE_PROMPT = {"pre_prompt": "", "post_prompt": ""}
"""For models trained on the shapes data set, which know its questions word for word and nothing else."""


@dataclass(frozen=True)
class Benchmark:
    """One lmms-eval task, and the location of its data.

    Args:
        definition: path of the YAML file, relative to lmms_eval/tasks.
        repository: repository on the hub, and folder name in a local collection.
        split: split of the data.
        columns: columns used by prompts and scores.
        row: builds a row from a document and an answer to it: `answer`, `expected`, and the fields that the scores
            group by.
        config: configuration of the data set on the hub; the folder of that name in a local copy.
        changes: overrides of the YAML's fields.
    """

    definition: str
    repository: str
    split: str
    columns: tuple[str, ...]
    row: Callable[[Document, str], Row]
    config: str | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)


def _mme(document: Document, answer: str) -> Row:
    return {**_yes_no(document, answer), "question_id": str(document["question_id"])}


def _pope(document: Document, answer: str) -> Row:
    return {**_yes_no(document, answer), "image": str(document.get("image_source", document["question_id"]))}


def _yes_no(document: Document, answer: str) -> Row:
    expected = document["answer"].lower().strip().replace(".", "")
    return {"answer": answer, "expected": expected, "category": document["category"]}


def _gqa(document: Document, answer: str) -> Row:
    expected = document["answer"]
    plain = float(same_answer(answer, expected))
    return _exact(answer, expected, float(same_text(answer, expected)), plain, lost=same_text(answer, ""))


def _exact(answer: str, expected: Any, score: float, plain: float, *, lost: bool) -> Row:
    """Return the row of an answer that is compared as a whole; `lost`: normalization leaves nothing of the answer."""
    return {"answer": answer, "expected": expected, "score": score, "plain_score": plain, "unparsed": lost}


def _textvqa(document: Document, answer: str) -> Row:
    annotated = list(document["answers"])
    plain = plain_accuracy(answer, annotated)
    return _exact(answer, annotated, soft_accuracy(answer, annotated), plain, lost=not process(answer))


def _mmbench(document: Document, answer: str) -> Row:
    from lmms_eval.tasks._task_utils.mcq_extract import extract_mcq_answer
    from lmms_eval.tasks.mmbench.en_utils import mmbench_evaluator

    item = {**{letter: document[letter] for letter in "ABCD"}, "prediction": answer.strip()}
    choices = sorted(mmbench_evaluator.build_choices(item))
    choice = mmbench_evaluator.prefetch_answer(item) or extract_mcq_answer(item["prediction"], choices=choices)
    options = {letter: str(document[letter]) for letter in choices}
    return {
        "answer": answer,
        "expected": document["answer"],
        "choice": choice or None,
        **choice_fields(answer, choice or None, options),
        "index": int(document["index"]),
        "category": document["category"],
        "l2": document["L2-category"],
    }


def _seed(document: Document, answer: str) -> Row:
    options = {letter: str(document[f"choice_{letter.lower()}"]) for letter in "ABCD"}
    row = {"answer": answer, "expected": document["answer"], "data_type": document["data_type"]}
    letter = first_letter(answer)
    return row | choice_fields(answer, letter if letter in options else None, options)


def _mmmu(document: Document, answer: str) -> Row:
    from lmms_eval.tasks.mmmu.utils import eval_open, parse_open_response

    row = {"answer": answer, "expected": document["answer"], "id": document["id"], "options": None}
    if document["question_type"] != "multiple-choice":
        row |= {"correct": bool(eval_open(document["answer"], parse_open_response(answer)))}
        return row | {"plain_correct": plain_open(answer, document["answer"]), "unparsed": not answer.strip()}
    options = dict(zip(string.ascii_uppercase, map(str, ast.literal_eval(document["options"])), strict=False))
    choice = mmmu_choice(answer, options)
    row |= {"correct": choice == document["answer"], "options": len(options) if choice is None else None}
    fields = choice_fields(answer, choice, options)
    plain = fields["plain_choice"]
    row |= {"plain_correct": None if plain is None else plain == document["answer"]}
    return row | {"unparsed": choice is None or fields["guessed"]}


def _ai2d(document: Document, answer: str) -> Row:
    expected = string.ascii_uppercase[int(document["answer"])]
    stripped = answer.lstrip()
    letter = stripped[:1] if stripped[1:2] == "." and stripped[:1] in string.ascii_uppercase else answer
    options = dict(zip(string.ascii_uppercase, map(str, document["options"]), strict=False))
    read = next((each for each in options if same_text(letter, each)), None)
    fields = choice_fields(answer, read, options)
    row = {"answer": answer, "expected": expected, "score": float(same_text(letter, expected))}
    return row | {"plain_choice": fields["plain_choice"], "unparsed": read is None or fields["guessed"]}


_YES_NO_COLUMNS = ("question_id", "question", "answer", "category", "image")
_TEXTVQA = Benchmark(
    "textvqa/textvqa_val.yaml",
    "textvqa",
    "validation",
    ("question_id", "question", "image", "ocr_tokens", "answers"),
    _textvqa,
)
_MME = Benchmark("mme/mme.yaml", "MME", "test", _YES_NO_COLUMNS, _mme)
_POPE = Benchmark("pope/pope.yaml", "POPE", "test", _YES_NO_COLUMNS, _pope)
BENCHMARKS: dict[str, Benchmark] = {
    "mme": _MME,
    "pope": _POPE,
    "gqa": Benchmark(
        "gqa/gqa.yaml",
        "GQA",
        "testdev",
        ("question", "answer", "image"),
        _gqa,
        "testdev_balanced_instructions",
    ),
    "textvqa": _TEXTVQA,
    "textvqa_ocr": Benchmark(
        _TEXTVQA.definition,
        _TEXTVQA.repository,
        _TEXTVQA.split,
        _TEXTVQA.columns,
        _textvqa,
        changes={"lmms_eval_specific_kwargs": {"default": OCR_PROMPT}},
    ),
    "mmbench": Benchmark(
        "mmbench/mmbench_en_dev_static.yaml",
        "MMBench",
        "dev",
        ("index", "question", "hint", "answer", *"ABCD", "category", "image", "source", "L2-category", "split"),
        _mmbench,
        "en",
    ),
    "seed": Benchmark(
        "seedbench/seedbench.yaml",
        "SEED-Bench",
        "test",
        ("question_id", "question", *(f"choice_{letter}" for letter in "abcd"), "answer", "data_type", "image"),
        _seed,
    ),
    "mmmu": Benchmark(
        "mmmu/mmmu_val.yaml",
        "MMMU",
        "validation",
        ("id", "question", "options", "answer", "question_type", *(f"image_{number}" for number in range(1, 8))),
        _mmmu,
    ),
    "ai2d": Benchmark("ai2d/ai2d.yaml", "ai2d", "test", ("question", "options", "answer", "image"), _ai2d),
    "shapes_mme": Benchmark(
        _MME.definition,
        "shapes_MME",
        "test",
        _YES_NO_COLUMNS,
        _mme,
        changes={"lmms_eval_specific_kwargs": {"default": BARE_PROMPT}},
    ),
    "shapes_pope": Benchmark(
        _POPE.definition,
        "shapes_POPE",
        "test",
        _YES_NO_COLUMNS,
        _pope,
        changes={"lmms_eval_specific_kwargs": {"default": BARE_PROMPT}},
    ),
}


def write_overlays(
    names: Sequence[str], folder: Path, *, data: str | Path | None = None, hub_owner: str = HUB_OWNER
) -> list[str]:
    """Write one task file per benchmark into `folder` and return the names of the tasks.

    Args:
        data: a folder with one folder per benchmark, named after its repository; None for the hub.
        hub_owner: owner of the repositories on the hub; lmms-eval moved from `lmms-lab` to `lmms-lab-encoder`.

    Raises:
        UserError: the data is missing, or lacks a required column.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        benchmark = BENCHMARKS[name]
        place = _hub(benchmark, hub_owner) if data is None else _local(benchmark, Path(data))
        task = {"include": str(_definition(benchmark)), "task": task_name(name), **place, **benchmark.changes}
        (folder / f"{task_name(name)}.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    return [task_name(name) for name in names]


def task_name(name: str) -> str:
    """Return the task name of our overlay of a benchmark."""
    return f"unimm_{name}"


def _definition(benchmark: Benchmark) -> Path:
    found = importlib.util.find_spec("lmms_eval")
    if found is None or not found.submodule_search_locations:
        raise UserError("lmms-eval is not installed: pip install 'unimm[lmms]'.")
    path = Path(found.submodule_search_locations[0]) / "tasks" / benchmark.definition
    if not path.is_file():
        raise UserError(f"The installed lmms-eval has no {benchmark.definition}: take version 0.7.3, which was tested.")
    return path


def _hub(benchmark: Benchmark, owner: str) -> dict[str, Any]:
    return {"dataset_path": f"{owner}/{benchmark.repository}"}


def _local(benchmark: Benchmark, data: Path) -> dict[str, Any]:
    """Return the task fields for a local copy: parquet files as on the hub, or a folder written by `save_to_disk`."""
    folders = sorted(path for path in data.iterdir() if path.is_dir())
    folder = next((each for each in folders if each.name.lower() == benchmark.repository.lower()), None)
    if folder is None:
        raise UserError(
            f"There is no folder {benchmark.repository} in {data}: put the data of {_source(benchmark)} there."
        )
    kept: dict[str, Any] = {"dataset_name": None}
    if benchmark.definition.startswith("gqa"):
        kept["process_docs"] = None  # would fetch the images from the hub
    if (folder / "dataset_dict.json").is_file():
        return kept | {"dataset_path": str(folder), "dataset_kwargs": {"load_from_disk": True}}
    places = [folder / part for part in (benchmark.config, "data") if part is not None] + [folder]
    files = next((found for place in places if (found := sorted(place.glob(f"{benchmark.split}*.parquet")))), None)
    if files is None:
        raise UserError(f"{folder} holds no {benchmark.split}-*.parquet, nor does its folder data: look at its layout.")
    _check_columns(benchmark, files[0])
    paths = [str(path.resolve()) for path in files]
    return kept | {"dataset_path": "parquet", "dataset_kwargs": {"data_files": {benchmark.split: paths}}}


def _source(benchmark: Benchmark) -> str:
    return f"https://huggingface.co/datasets/{HUB_OWNER}/{benchmark.repository}"


def _check_columns(benchmark: Benchmark, file: Path) -> None:
    from pyarrow.parquet import read_schema

    found = read_schema(file).names
    if missing := [name for name in benchmark.columns if name not in found]:
        joined = " (GQA's images are a second table: join them by imageId first)" if "image" in missing else ""
        raise UserError(f"{file} has no column {', '.join(missing)}{joined}; it has {', '.join(found)}.")


def run_tasks(model: Any, tasks: Sequence[str], overlays: Path, output: Path, limit: int | None) -> dict[str, Any]:
    """Run the tasks and return lmms-eval's own metrics per task; {} on all processes but the main one.

    `model` is called on every document. Files written by the tasks (submissions) go into `output`.
    """
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    options = argparse.Namespace(output_path=str(output), process_with_media=False, reasoning_tags=None)
    found = simple_evaluate(
        model=model,
        tasks=list(tasks),
        task_manager=TaskManager(include_path=str(overlays), include_defaults=False, model_name="unimm"),
        limit=limit,
        log_samples=False,
        bootstrap_iters=0,
        cli_args=options,
        process_docs_parallel=1,  # MMMU's random choices would depend on the order of threads
    )
    if found is None:
        return {}
    return {name: _figures(metrics) for name, metrics in copy.deepcopy(found["results"]).items()}


def _figures(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers among lmms-eval's metrics, without the filter in their names and without standard errors."""
    numbers = {name.partition(",")[0]: value for name, value in metrics.items() if isinstance(value, int | float)}
    return {name: float(value) for name, value in numbers.items() if "stderr" not in name}
