"""Command line of DPG-Bench (`unimm eval dpg`, eval/dpg.py)."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unimm.errors import UserError
from unimm.evaluation.dpg.run import (
    BENCH,
    GET_CSV,
    OFFICIAL_CSV,
    DrawnImages,
    GridImages,
    Images,
    Prompts,
    judge_images,
    read_prompts,
    read_question_file,
    table,
    write_grids,
)
from unimm.evaluation.runs.arguments import add_run_arguments, parse_run, recorded_arguments
from unimm.evaluation.runs.evaluated_model import EvaluatedModel, load_evaluated_model
from unimm.evaluation.runs.sanity_checks import KnownAnswer, check_vqa_model, known_answers
from unimm.evaluation.runs.store import Manifest, RunStore, content_sha256, processes
from unimm.evaluation.vqa import Judge, load_vqa_model
from unimm.runs.provenance import model_fingerprint
from unimm.runs.report import Report


def parser(description: str | None) -> argparse.ArgumentParser:
    """Build the argument parser; without a `description` this module's docstring is shown."""
    made = argparse.ArgumentParser(
        prog=None if description else "unimm eval dpg",
        description=description or __doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    asked = made.add_argument_group("what is drawn and asked")
    asked.add_argument("--dpg-csv", metavar="FILE", help="the benchmark's question file, dpg_bench.csv")
    asked.add_argument("--prompts", metavar="FILE", help="lines of item_id and prompt: draw only, ask nothing")
    asked.add_argument("--limit", type=int, help="the first prompts only")
    images = made.add_argument_group("images")
    images.add_argument("--model", help="a unified model that draws; the default comes with the library")
    images.add_argument("--images", metavar="DIR", help="judge these grids, ITEM.png, instead of drawing")
    images.add_argument("--resolution", type=int, help="with --images: the side of one image of a grid")
    images.add_argument("--allow-missing", action="store_true", help="with --images: count missing grids, go on")
    images.add_argument("--num-images", type=int, default=4, help="images of a prompt; the benchmark draws 4")
    images.add_argument("--guidance-scale", type=float, help="default: the checkpoint's own")
    images.add_argument("--temperature", type=float, help="default: the checkpoint's own")
    images.add_argument("--seed", type=int, default=0)
    judging = made.add_argument_group("judge")
    judging.add_argument("--judge", metavar="PATH", help="BLIP-VQA, ViLT, a chat model, or mplug (the official one)")
    judging.add_argument("--judge-kind", help="blip, vilt, chat or mplug; read from its configuration unless given")
    judging.add_argument("--judge-batch-size", type=int, default=16)
    judging.add_argument("--allow-self-judge", action="store_true", help="let the model judge its own images")
    known = judging.add_mutually_exclusive_group()
    known.add_argument("--canary", metavar="DIR", help="known images: canaries.jsonl of image, question and answer")
    known.add_argument("--no-canary", action="store_true", help="let the judge judge without known images")
    made.add_argument("--device", help="cpu, cuda, ...; a GPU where there is one")
    made.add_argument("--json", metavar="FILE", help="write the result, - for standard output")
    add_run_arguments(made)
    return made


def main(argv: Sequence[str] | None = None, description: str | None = None) -> None:
    """Draw or read images, ask the questions, and report. Raise UserError for invalid arguments or files."""
    arguments = parse_run(parser(description), argv, bench=BENCH)
    _check(arguments)
    report = Report(arguments.json if processes().is_main_process else None)
    prompts = read_question_file(arguments.dpg_csv) if arguments.dpg_csv else read_prompts(arguments.prompts)
    if prompts.blob not in (None, OFFICIAL_CSV) and processes().is_main_process:
        report.say(f"{arguments.dpg_csv} is not the published question file: its git name is {prompts.blob}.")
    prompts = prompts.limited(arguments.limit)
    grids, evaluated, judge = None, None, None
    with report.timed("load"):
        if arguments.images is not None:
            options = {"num_images": arguments.num_images, "allow_missing": arguments.allow_missing}
            grids = GridImages(arguments.images, prompts, arguments.resolution, **options)
        else:
            evaluated = load_evaluated_model(arguments.model, arguments.device)
        if arguments.judge is not None:
            options = {"device": arguments.device, "batch_size": arguments.judge_batch_size}
            judge = load_vqa_model(arguments.judge, arguments.judge_kind, **options)
    known = [] if judge is None or arguments.no_canary else known_answers(arguments.canary)
    manifest = _manifest(arguments, prompts, grids, evaluated, judge, known)
    if judge is not None and not arguments.no_canary:
        with report.timed("canary"):
            report.add(canaries=check_vqa_model(judge, known))
    with report.timed("score"), RunStore.open(arguments.output, manifest) as store:
        images: Images | None = grids
        if images is None:
            assert evaluated is not None
            count, sampling = arguments.num_images, _sampling(arguments)
            images = DrawnImages(evaluated.model, evaluated.processor, prompts, store, count, sampling)
        summary = judge_images(store, images, prompts, judge)
    missing = grids.missing if grids is not None else []
    if processes().is_main_process:
        report.say(table(summary))
        if judge is not None:
            report.say("no known image was asked about" if not known else f"{len(known)} known answers were right")
        if missing:
            report.say(f"{len(missing)} of {len(prompts.texts)} prompts have no grid and no score.")
        if grids is None:
            report.say(str(write_grids(store.folder / "grids", {key: store.image_path(*key) for key in images.keys})))
        report.add(**summary, missing=missing)
        report.write()


def _check(arguments: argparse.Namespace) -> None:
    if arguments.output is None:
        raise UserError("--output DIR is not given: images, answers and scores are kept there.")
    if (arguments.dpg_csv is None) == (arguments.prompts is None):
        raise UserError(f"Give either --dpg-csv FILE ({GET_CSV}), to draw and ask, or --prompts FILE, to draw only.")
    if (arguments.dpg_csv is None) != (arguments.judge is None):
        raise UserError("A judge needs questions and questions a judge: give --dpg-csv and --judge together.")
    if arguments.images is not None and (arguments.resolution is None or arguments.dpg_csv is None):
        raise UserError("--images needs --resolution, the side of one image of a grid, and --dpg-csv.")
    for name in ("num_images", "limit", "resolution", "judge_batch_size"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least 1.")


def _sampling(arguments: argparse.Namespace) -> dict[str, float]:
    given = {name: getattr(arguments, name) for name in ("guidance_scale", "temperature")}
    return {name: value for name, value in given.items() if value is not None}


def _manifest(
    arguments: argparse.Namespace,
    prompts: Prompts,
    grids: GridImages | None,
    evaluated: EvaluatedModel | None,
    judge: Judge | None,
    known: Sequence[KnownAnswer],
) -> Manifest:
    """Build the run's manifest. Raise UserError if the model cannot draw, or would score its own images."""
    weights: dict[str, str] = {}
    settings: dict[str, Any] = {"num_images": arguments.num_images, "question_file": prompts.blob}
    if evaluated is not None:
        if evaluated.model is None:
            raise UserError(f"{arguments.model} is an image tokenizer and cannot draw prompts: name a unified model.")
        weights["model"] = model_fingerprint(evaluated.model)
        settings |= {"sampling": _sampling(arguments), **evaluated.runs_on}
    if grids is not None:
        weights["images"] = content_sha256(grids.content())
        settings |= {"resolution": arguments.resolution, "missing": len(grids.missing)}
    if judge is not None:
        weights["judge"] = judge.fingerprint
        settings |= {"judge": judge.describe(), "judge_batch_size": arguments.judge_batch_size}
        asked = [(each.name, each.question, each.expected) for each in known]
        settings["canary"] = "not asked" if arguments.no_canary else content_sha256(asked)
        own = weights.get("model") == judge.fingerprint
        if (own or _same_folder(arguments)) and not arguments.allow_self_judge:
            raise UserError("The model under test is its own judge: name another --judge, or add --allow-self-judge.")
    questions = content_sha256([prompts.texts, prompts.rows])
    return Manifest(BENCH, questions, arguments.seed, settings, weights, arguments=recorded_arguments(arguments))


def _same_folder(arguments: argparse.Namespace) -> bool:
    """Return whether --model and --judge are one folder; with --images, --model only names who drew them."""
    return arguments.model is not None and Path(arguments.model).resolve() == Path(arguments.judge).resolve()
