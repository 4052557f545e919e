"""The command that compares generated images with real ones: `unimm eval generation`, eval/generation.py."""

import argparse
from collections.abc import Sequence
from typing import Any

import torch

from unimm.evaluation.generation.arguments import BENCH, parse
from unimm.evaluation.generation.feature_spaces import FeatureSpace, load_space, space_settings
from unimm.evaluation.generation.run import (
    Collected,
    collect,
    compare,
    read_reference,
    write_images_npz,
    write_statistics,
)
from unimm.evaluation.runs.arguments import recorded_arguments
from unimm.evaluation.runs.image_sets import image_set, source_sha256
from unimm.evaluation.runs.store import Manifest, Record, RunStore, content_sha256, processes
from unimm.runs.provenance import git_commit
from unimm.runs.report import Report

KEY = ("sets", 0)  # a run has one record: scores belong to a set, not to an image

Figures = dict[str, Any]


def main(argv: Sequence[str] | None = None, description: str | None = None) -> None:
    """Parse the arguments and run the command."""
    run(parse(argv, description))


def run(arguments: argparse.Namespace) -> None:
    """Load the feature space, compare the sets, and report the scores. Raise UserError for invalid inputs."""
    report = Report(arguments.json if processes().is_main_process else None)
    with report.timed("load"):
        space = load_space(arguments.inception, arguments.encoder, arguments.device)
        assert space is not None
    described = space.describe()
    with report.timed("figures"):
        if arguments.output is None:
            found = _compared(arguments, space)
        else:
            found = _recorded(arguments, space, described)
    if not processes().is_main_process:
        return
    if arguments.write_npz is not None:
        write_images_npz(arguments.samples, arguments.write_npz, arguments.num_images, found.get("unreadable", []))
    for name, value in found.items():
        report.say(f"{name:<24} {value}" if not isinstance(value, float) else f"{name:<24} {value:12.5f}")
    report.say(f"{'features':<24} {space.name}, sha256 {described['sha256']}")
    report.add(generation=found, space=described, samples=arguments.samples, reference=arguments.reference)
    report.add(commit=git_commit())
    report.write()


def _compared(arguments: argparse.Namespace, space: FeatureSpace) -> Figures:
    """Compute the scores on all processes together; write the samples' statistics if requested."""
    reference = read_reference(arguments.reference, space, arguments.num_images, arguments.batch_size)
    generated = _collected(arguments, space)
    found = compare(generated, reference, space=space, kernel_size=arguments.kernel_size)
    if arguments.write_statistics is not None and processes().is_main_process:
        write_statistics(arguments.write_statistics, generated, space)
    return found


def _collected(arguments: argparse.Namespace, space: FeatureSpace) -> Collected:
    return collect(space, image_set(arguments.samples, arguments.num_images), arguments.batch_size)


def _recorded(arguments: argparse.Namespace, space: FeatureSpace, described: dict[str, Any]) -> Figures:
    """Compute the scores and keep them in the run's folder, or take them from there if it already has them."""
    with RunStore.open(arguments.output, _manifest(arguments, described)) as store:
        mine = store.split([KEY])
        if KEY not in store.done or arguments.write_statistics is not None:
            found = _compared(arguments, space)
            if mine:
                item, sample = KEY
                inputs = {"samples": arguments.samples, "reference": arguments.reference}
                store.append(Record(BENCH, item, sample, inputs=inputs, raw_scores={"distances": found}))
        summary = store.finish(lambda records: {**records[0].raw_scores, "space": described})
    figures: Figures = summary["distances"]
    return figures


def _manifest(arguments: argparse.Namespace, described: dict[str, Any]) -> Manifest:
    count = arguments.num_images
    return Manifest(
        BENCH,
        content_sha256([source_sha256(source, count) for source in (arguments.samples, arguments.reference)]),
        seed=0,
        settings={
            "space": space_settings(described),
            "num_images": count,
            "kernel_size": arguments.kernel_size,
            "batch_size": arguments.batch_size,
            "device": torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")).type,
        },
        weights={described["name"]: described["sha256"]},
        arguments=recorded_arguments(arguments),
    )
