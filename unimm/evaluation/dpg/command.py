"""Command line of DPG-Bench (`unimm eval dpg`, eval/dpg.py)."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unimm.errors import UserError
from unimm.evaluation.dpg.arguments import BENCH, parse
from unimm.evaluation.dpg.grids import GridImages, write_grids
from unimm.evaluation.dpg.prompts import OFFICIAL_CSV, Prompts, read_prompts, read_question_file
from unimm.evaluation.dpg.run import Images, score_images
from unimm.evaluation.dpg.summary import table
from unimm.evaluation.runs.arguments import recorded_arguments
from unimm.evaluation.runs.drawn_images import DrawnImages
from unimm.evaluation.runs.evaluated_model import EvaluatedModel, load_evaluated_model
from unimm.evaluation.runs.sanity_checks import KnownAnswer, check_vqa_model, known_answers
from unimm.evaluation.runs.store import Manifest, RunStore, content_sha256, processes
from unimm.evaluation.vqa import VQAModel, load_vqa_model
from unimm.runs.provenance import model_fingerprint
from unimm.runs.report import Report
from unimm.sampling import sampling_options


def main(argv: Sequence[str] | None = None, description: str | None = None) -> None:
    """Parse the arguments and run the command."""
    run(parse(argv, description))


def run(arguments: argparse.Namespace) -> None:
    """Draw or read images, ask the questions, and report. Raise UserError for invalid files."""
    report = Report(arguments.json if processes().is_main_process else None)
    prompts = read_question_file(arguments.dpg_csv) if arguments.dpg_csv else read_prompts(arguments.prompts)
    if prompts.blob not in (None, OFFICIAL_CSV) and processes().is_main_process:
        report.say(f"{arguments.dpg_csv} is not the published question file: its git name is {prompts.blob}.")
    prompts = prompts.limited(arguments.limit)
    grids, evaluated, vqa_model = None, None, None
    with report.timed("load"):
        if arguments.images is not None:
            options = {"num_images": arguments.num_images, "allow_missing": arguments.allow_missing}
            grids = GridImages(arguments.images, prompts, arguments.resolution, **options)
        else:
            evaluated = load_evaluated_model(arguments.model, arguments.device)
        if arguments.vqa_model is not None:
            options = {"device": arguments.device, "batch_size": arguments.vqa_batch_size}
            vqa_model = load_vqa_model(arguments.vqa_model, arguments.vqa_kind, **options)
    known = [] if vqa_model is None or arguments.no_sanity_check else known_answers(arguments.sanity_images)
    manifest = _manifest(arguments, prompts, grids, evaluated, vqa_model, known)
    if vqa_model is not None and not arguments.no_sanity_check:
        with report.timed("sanity_check"):
            report.add(sanity_images=check_vqa_model(vqa_model, known))
    with report.timed("score"), RunStore.open(arguments.output, manifest) as store:
        images: Images | None = grids
        if images is None:
            assert evaluated is not None
            count, sampling = arguments.num_images, sampling_options(arguments)
            images = DrawnImages(evaluated.model, evaluated.processor, prompts.texts, count, store, sampling)
        summary = score_images(store, images, prompts, vqa_model)
    missing = grids.missing if grids is not None else []
    if processes().is_main_process:
        report.say(table(summary))
        if vqa_model is not None:
            report.say("no known image was asked about" if not known else f"{len(known)} known answers were right")
        if missing:
            report.say(f"{len(missing)} of {len(prompts.texts)} prompts have no grid and no score.")
        if grids is None:
            report.say(str(write_grids(store.folder / "grids", {key: store.image_path(*key) for key in images.keys})))
        report.add(**summary, missing=missing)
        report.write()


def _manifest(
    arguments: argparse.Namespace,
    prompts: Prompts,
    grids: GridImages | None,
    evaluated: EvaluatedModel | None,
    vqa_model: VQAModel | None,
    known: Sequence[KnownAnswer],
) -> Manifest:
    """Build the run's manifest. Raise UserError if the model cannot draw, or would score its own images."""
    weights: dict[str, str] = {}
    settings: dict[str, Any] = {"num_images": arguments.num_images, "question_file": prompts.blob}
    if evaluated is not None:
        if evaluated.model is None:
            raise UserError(f"{arguments.model} is an image tokenizer and cannot draw prompts: name a unified model.")
        weights["model"] = model_fingerprint(evaluated.model)
        settings |= {"sampling": sampling_options(arguments), **evaluated.runs_on}
    if grids is not None:
        weights["images"] = content_sha256(grids.content())
        settings |= {"resolution": arguments.resolution, "missing": len(grids.missing)}
    if vqa_model is not None:
        weights["scorer"] = vqa_model.fingerprint
        settings |= {"scorer": vqa_model.describe(), "vqa_batch_size": arguments.vqa_batch_size}
        asked = [(each.name, each.question, each.expected) for each in known]
        settings["sanity_images"] = "not asked" if arguments.no_sanity_check else content_sha256(asked)
        own = weights.get("model") == vqa_model.fingerprint
        if (own or _same_folder(arguments)) and not arguments.allow_self_scoring:
            raise UserError(
                "The model under test is its own scorer: name another --vqa-model, or add --allow-self-scoring."
            )
    questions = content_sha256([prompts.texts, prompts.rows])
    return Manifest(BENCH, questions, arguments.seed, settings, weights, arguments=recorded_arguments(arguments))


def _same_folder(arguments: argparse.Namespace) -> bool:
    """Return whether --model and --vqa-model are one folder; with --images, --model only names who drew them."""
    return arguments.model is not None and Path(arguments.model).resolve() == Path(arguments.vqa_model).resolve()
