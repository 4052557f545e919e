"""Command line of GenEval (`unimm eval gen`, eval/geneval.py): draw or read images and score them.

The scorer is first checked on known images. With `--vqa`, a VQA model scores the same images a second time. Other modes
compare verdicts with human annotations (`--calibrate`), search training captions for the prompts (`--contamination`),
or write the prompts (`--write-prompts`).
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch

from unimm.errors import UserError
from unimm.evaluation.geneval.arguments import BENCH, parse
from unimm.evaluation.geneval.color_votes import load_color_voter
from unimm.evaluation.geneval.contamination import overlap, read_captions
from unimm.evaluation.geneval.detector import load_detector
from unimm.evaluation.geneval.files import ImageFolder, official_results, read_folder, read_sanity_images, write_folder
from unimm.evaluation.geneval.human_agreement import (
    PAPER_AGREEMENT,
    agreement_table,
    compare_by_tag,
    human_verdicts,
    read_annotations,
)
from unimm.evaluation.geneval.prompts import (
    OFFICIAL_TRACK,
    Metadata,
    PromptTrack,
    official_prompts,
    read_prompts,
    to_jsonl,
    track_of,
)
from unimm.evaluation.geneval.question_scorer import BENCH as QUESTIONS_BENCH
from unimm.evaluation.geneval.question_scorer import DISAGREEMENTS, compare_scorers, question_images
from unimm.evaluation.geneval.rules import Thresholds
from unimm.evaluation.geneval.run import (
    SHAPES_TRACK,
    DrawnPrompts,
    GenevalPlan,
    GivenImages,
    Images,
    score_images,
    shapes_track,
)
from unimm.evaluation.geneval.scorers import DetectorScorer, Scorer, ShapesScorer
from unimm.evaluation.geneval.summary import table
from unimm.evaluation.runs.arguments import recorded_arguments
from unimm.evaluation.runs.evaluated_model import EvaluatedModel, load_evaluated_model
from unimm.evaluation.runs.records import read_records
from unimm.evaluation.runs.store import Key, Manifest, RunStore, content_sha256, processes
from unimm.evaluation.vqa import load_vqa_model
from unimm.runs.provenance import model_fingerprint, write_atomically
from unimm.runs.report import Report
from unimm.sampling import sampling_options

RESULTS, QUESTIONS = "geneval_results.jsonl", "questions"
RECORDED_SCORE = 0.05  # detections are kept from here on, so that other thresholds can be tried without a detector
SHAPES_PROMPTS = 50  # per tag, if --limit is not given


def main(argv: Sequence[str] | None = None, description: str | None = None) -> None:
    """Parse the arguments and run the command."""
    run(parse(argv, description))


def run(arguments: argparse.Namespace) -> None:
    """Run the mode that the command line selects.

    Raises:
        UserError: unreadable files, or a scorer that fails on known images.
    """
    report = Report(arguments.json if processes().is_main_process else None)
    if arguments.calibrate is not None:
        _calibrate(arguments, report)
    elif arguments.contamination is not None:
        _contamination(arguments, report)
    elif arguments.write_prompts is not None:
        write_atomically(arguments.write_prompts, to_jsonl(_track(arguments).prompts))
        report.say(arguments.write_prompts)
    else:
        _score(arguments, report)
    if processes().is_main_process:
        report.write()


def _score(arguments: argparse.Namespace, report: Report) -> None:
    """Draw or read the images, score them, and write the results."""
    plan, given = _plan(arguments), _given(arguments)
    track = _track(arguments) if given is None else _track_of_folder(given)
    prompts = plan.choose(track) if given is None else given.prompts
    with report.timed("load"):
        scorer = _scorer(arguments)
        _check_classes(prompts, scorer)
        evaluated = _evaluated(arguments) if given is None else None
    with report.timed("sanity_check"):
        known = scorer.check(
            scorer.sanity_images() if arguments.sanity_images is None else read_sanity_images(arguments.sanity_images)
        )
    weights = scorer.weights()
    settings: dict[str, Any] = {"track": track.name, "batch_size": plan.batch_size, "scorer": scorer.describe()}
    if given is not None:
        weights["images"] = content_sha256(given.content())
    if evaluated is not None:
        weights["model"] = model_fingerprint(evaluated.model)
        settings |= {"num_images": plan.num_images, "limit": plan.limit, "sampling": plan.sampling}
        settings |= evaluated.runs_on
    asked = content_sha256(prompts.items())
    manifest = Manifest(BENCH, asked, plan.seed, settings, weights, arguments=recorded_arguments(arguments))
    with report.timed("score"), RunStore.open(arguments.output, manifest) as store:
        images: Images
        if evaluated is not None:
            images = DrawnPrompts(evaluated.model, evaluated.processor, prompts, plan, store)
        else:
            assert given is not None
            images = GivenImages(given)
        summary = score_images(store, images, scorer, plan.batch_size)
    paths = dict(zip(images.keys, images.paths(images.keys), strict=True))
    if processes().is_main_process:
        report.say(f"{track.name}, scored by {scorer.name} ({known} known images scored correctly)\n{table(summary)}")
        report.add(track=track.name, sanity_images=known, **summary)
        folder = Path(arguments.output)
        write_atomically(folder / RESULTS, official_results(read_records(folder), scorer))
        if arguments.export is not None:
            write_folder(arguments.export, prompts, paths)
    if arguments.vqa_model is not None:
        _second_scorer(arguments, report, paths, prompts, manifest)


def _given(arguments: argparse.Namespace) -> ImageFolder | None:
    """Read the folder given by --images, if any."""
    return None if arguments.images is None else read_folder(arguments.images)


def _evaluated(arguments: argparse.Namespace) -> EvaluatedModel:
    """Load the model under test. Raise UserError for an image tokenizer alone."""
    evaluated = load_evaluated_model(arguments.model, arguments.device)
    if evaluated.model is None:
        raise UserError(f"{arguments.model} is an image tokenizer and cannot draw: give a unified model.")
    return evaluated


def _check_classes(prompts: Mapping[str, Metadata], scorer: Scorer) -> None:
    """Raise UserError, before anything is drawn, if a prompt names a class that the scorer does not know."""
    for item, prompt in prompts.items():
        for rule in (*prompt["include"], *prompt.get("exclude", ())):
            if rule["class"] not in scorer.class_names:
                raise UserError(
                    f"Prompt {item} ({prompt['prompt']!r}) asks for {rule['class']!r}, which {scorer.name} cannot "
                    f"find: it knows {len(scorer.class_names)} classes, from {scorer.class_names[0]!r} to "
                    f"{scorer.class_names[-1]!r}."
                )


def _second_scorer(
    arguments: argparse.Namespace,
    report: Report,
    images: Mapping[Key, Path],
    prompts: Mapping[str, Metadata],
    manifest: Manifest,
) -> None:
    """Score the same images with a VQA model and report where it disagrees with the detector."""
    with report.timed("load_vqa"):
        scorer = load_vqa_model(arguments.vqa_model, device=arguments.device)
    folder, described = Path(arguments.output), scorer.describe()
    settings = manifest.settings | {"scorer": described}
    weights = manifest.weights | {"vqa": described["sha256"]}
    asked = replace(manifest, bench=QUESTIONS_BENCH, settings=settings, weights=weights)
    with report.timed("questions"), RunStore.open(folder / QUESTIONS, asked) as store:
        summary = question_images(store, images, prompts, scorer, arguments.batch_size)
    if not processes().is_main_process:
        return
    found = compare_scorers(read_records(folder), read_records(folder / QUESTIONS), folder)
    report.say(f"{settings['track']}, scored by the answers of {described['name']}\n{table(summary)}")
    parted = len(found.only_first) + len(found.only_second)
    report.say(f"  the two scorers agree on {found.rate:.1%} of the images; {parted} to look at in {DISAGREEMENTS}")
    report.add(questions=summary, scorers_agree=found.rate)


def _plan(arguments: argparse.Namespace) -> GenevalPlan:
    sampling = sampling_options(arguments)
    return GenevalPlan(arguments.num_images, arguments.limit, arguments.seed, arguments.batch_size, sampling)


def _track_of_folder(folder: ImageFolder) -> PromptTrack:
    prompts = list(folder.prompts.values())
    return PromptTrack(track_of(prompts), prompts)


def _track(arguments: argparse.Namespace) -> PromptTrack:
    if arguments.shapes and arguments.prompts is not None:
        return read_prompts(arguments.prompts)._replace(name=f"{SHAPES_TRACK}-own-prompts")
    if arguments.shapes:
        return shapes_track(arguments.seed, arguments.limit or SHAPES_PROMPTS)
    if arguments.prompts is not None:
        return read_prompts(arguments.prompts)
    return PromptTrack(OFFICIAL_TRACK, official_prompts())


def _scorer(arguments: argparse.Namespace) -> Scorer:
    chosen = {option.name: getattr(arguments, option.name) for option in fields(Thresholds)}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    if arguments.shapes:
        if chosen:
            raise UserError(f"--shapes has no thresholds: leave out {', '.join(sorted(chosen))}.")
        return ShapesScorer()
    thresholds = Thresholds(**chosen)
    place = {
        "device": torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")),
        "dtype": getattr(torch, arguments.dtype),
    }
    # The detector must keep every score that a threshold, now or in a later recount, could accept.
    lowest = min(RECORDED_SCORE, thresholds.threshold, thresholds.counting_threshold)
    detector = load_detector(arguments.detector, min_score=lowest, batch_size=arguments.batch_size, **place)
    voter = load_color_voter(arguments.clip, background=arguments.background, crop=not arguments.no_crop, **place)
    return DetectorScorer(detector, voter, thresholds)


def _calibrate(arguments: argparse.Namespace, report: Report) -> None:
    """Compare recorded verdicts with the majority of human raters, per tag."""
    if arguments.verdicts is None:
        raise UserError("--calibrate needs --verdicts DIR, the folder of a finished run on the annotated images.")
    records = read_records(arguments.verdicts)
    verdicts = {(int(record.item), record.sample): bool(record.verdict) for record in records}
    prompts = official_prompts()
    for path in arguments.calibrate:
        people = human_verdicts(read_annotations(path), prompts)
        found = {}
        for question in ("rules", "caption"):
            majority = {key: getattr(scored, question) for key, scored in people.items()}
            rows = compare_by_tag(verdicts, majority, prompts)
            report.say(f"{path}: {question}, as most raters have it (the paper's detector: {PAPER_AGREEMENT:.0%})")
            report.say(agreement_table(rows))
            found[question] = {tag: row._asdict() for tag, row in rows.items()}
        report.add(**{Path(path).name: found})


def _contamination(arguments: argparse.Namespace, report: Report) -> None:
    """Count captions that match the track's prompts or their templates."""
    track = _track(arguments)
    found = overlap(read_captions(arguments.contamination), [prompt["prompt"] for prompt in track.prompts])
    report.say("\n".join([f"{arguments.contamination} against {track.name}", *found.lines()]))
    report.add(track=track.name, **asdict(found))
