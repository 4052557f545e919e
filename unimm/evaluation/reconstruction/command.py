"""The command that evaluates the reconstructions of an image tokenizer: `unimm eval tok`, eval/reconstruction.py."""

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from unimm.data.image_files import save_image_atomically
from unimm.data.image_streams import to_array
from unimm.data.images import load_image
from unimm.errors import UserError
from unimm.evaluation.generation.feature_spaces import (
    FeatureSpace,
    InceptionSpace,
    TokenizerSpace,
    load_space,
    space_settings,
)
from unimm.evaluation.generation.run import SCORE_SPLITS, PairedSets
from unimm.evaluation.metrics.distributions import PRDC_NEIGHBOURS
from unimm.evaluation.metrics.image_metrics import HIGHEST_PSNR
from unimm.evaluation.reconstruction.arguments import BENCH, parse
from unimm.evaluation.reconstruction.run import (
    Compared,
    ReconstructionPlan,
    Reconstructions,
    check_finite,
    compared_images,
    evaluate_images,
    summarized,
)
from unimm.evaluation.runs.arguments import recorded_arguments
from unimm.evaluation.runs.evaluated_model import EvaluatedModel, load_evaluated_model
from unimm.evaluation.runs.records import unreadable
from unimm.evaluation.runs.store import Key, Manifest, Record, RunStore, processes
from unimm.networks.perceptual import LPIPS, load_lpips
from unimm.runs.provenance import file_sha256, git_commit, model_fingerprint
from unimm.runs.report import Report
from unimm.tokenizer import ImageTokenizer
from unimm.tokenizer.codebook_usage import CodebookUsage


def main(argv: Sequence[str] | None = None, description: str | None = None) -> None:
    """Parse the arguments and run the command."""
    run(parse(argv, description))


def run(arguments: argparse.Namespace) -> None:
    """Load the tokenizer, score its reconstructions, and report the scores."""
    report = Report(arguments.json if processes().is_main_process else None)
    plan = ReconstructionPlan(
        arguments.source,
        arguments.num_images or None,
        arguments.kmeans_source,
        seed=arguments.seed,
        protocol=arguments.protocol,
        score_size=arguments.score_size,
    )
    with report.timed("load"):
        evaluated = load_evaluated_model(arguments.model)
        reference = load_evaluated_model(arguments.reference).tokenizer if arguments.reference else None
        lpips = load_lpips(arguments.lpips_trunk, arguments.lpips_heads) if arguments.lpips_trunk else None
        named = load_space(arguments.inception, arguments.fd_encoder, efficientnet=arguments.efficientnet)
    space = named or TokenizerSpace(reference or evaluated.tokenizer, original=reference is not None)
    compared = _may_compare(len(plan.images()), space, asked_for=named is not None)
    with report.timed("reconstruction"):
        if arguments.output is None:
            sets = PairedSets(space)
            found = evaluate_images(
                evaluated.tokenizer,
                evaluated.image_processor,
                plan,
                reference,
                on_batch=lambda batch: sets.add(batch.originals, batch.drawn),
                lpips=lpips,
            )
            compared = compared and _may_compare(len(found.rows), space, asked_for=False)
            distances = sets.figures() if compared else None
        else:
            manifest = _manifest(evaluated, plan, reference, named, arguments)
            found, distances = recorded_images(
                evaluated, plan, reference, arguments.output, manifest, space=space if compared else None, lpips=lpips
            )
    if not processes().is_main_process:
        return
    if distances is None:
        report.say(f"{len(found.rows)} images are no distribution: the sets are not compared.")
    for name, reason in found.unreadable.items():
        report.say(f"left out, {name}: {reason}")
    for name, value in found.scores.items():
        error = f" ± {found.errors[name]:.4f}" if name in found.errors else ""
        report.say(f"{name:<22} {value:10.4f}{error}")
    for name, value in (distances or {}).items():
        report.say(f"{name:<22} {value:10.4f}")
    report.say(f"{space.name}: sha256 {space.describe()['sha256']}")
    if lpips is not None:
        trunk = file_sha256(arguments.lpips_trunk)
        report.say(f"lpips_vgg: sha256 of the trunk {trunk}")
        report.add(lpips={"network": "vgg16", "trunk_sha256": trunk})
    report.add(
        distances=distances,
        space=space.describe(),
        reconstruction=found.scores,
        standard_errors=found.errors,
        source=plan.source,
        num_images=len(found.rows),
        unreadable=found.unreadable,
        protocol=_protocol(plan),
        seed=plan.seed,
        commit=git_commit(),
    )
    report.write()


def recorded_images(
    evaluated: EvaluatedModel,
    plan: ReconstructionPlan,
    reference: ImageTokenizer | None,
    folder: str,
    manifest: Manifest,
    *,
    space: FeatureSpace | None = None,
    lpips: LPIPS | None = None,
) -> tuple[Reconstructions, dict[str, Any] | None]:
    """Evaluate as `evaluate_images` does, with every image recorded in `folder`; an interrupted run is resumed.

    Also returns the distances in `space` between the stored originals and reconstructions, None if not compared.
    """
    size = evaluated.tokenizer.config.codebook_size
    with RunStore.open(folder, manifest) as store:
        todo = set(store.split([(name, 0) for name in plan.images().names], together=plan.batch_size))

        def bad(name: str, error: UserError) -> None:
            if (name, 0) in todo:
                store.append(Record(BENCH, name, seed=plan.seed, reason=unreadable(error)))

        batches = compared_images(
            evaluated.tokenizer,
            evaluated.image_processor,
            plan,
            reference,
            lpips,
            wanted=lambda names: any((name, 0) in todo for name in names),
            bad=bad,
        )
        for batch in batches:
            _keep(store, batch, todo, plan.seed, size)
        summary = store.finish(
            lambda records: _summary(records, size) | _distances(store, records, space, plan.batch_size)
        )
        return _reconstructions(store.records(), size), summary["distances"]


def _keep(store: RunStore, batch: Compared, todo: set[Key], seed: int, codebook_size: int) -> None:
    """Save both images and the record of every missing row of a batch."""
    for index, row in enumerate(batch.rows()):
        name = row.pop("name")
        if (name, 0) not in todo:
            continue
        try:
            check_finite(row)
        except UserError as error:
            store.append(Record(BENCH, name, seed=seed, reason=unreadable(error)))
            continue
        original, drawn = store.image_path(name, role="original"), store.image_path(name)
        save_image_atomically(Image.fromarray(batch.originals[index]), original)
        save_image_atomically(Image.fromarray(batch.drawn[index]), drawn)
        own = CodebookUsage(codebook_size)
        own.update(batch.ids[index])
        store.append(
            Record(
                BENCH,
                name,
                seed=seed,
                inputs={"original_path": store.inside(original)},
                output_path=str(drawn),
                raw_scores=row | {"entropy_of_image": own.entropy, "ids": batch.ids[index].tolist()},
            )
        )


def _may_compare(count: int, space: FeatureSpace, *, asked_for: bool) -> bool:
    """Return whether `count` images suffice to compare distributions.

    Raises UserError if they do not and the user named a network (`asked_for`).
    """
    least = max(PRDC_NEIGHBOURS + 1, SCORE_SPLITS if isinstance(space, InceptionSpace) else 0)
    if count < least and asked_for:
        raise UserError(f"{count} images are no distribution: {space.name} compares sets of at least {least}.")
    return count >= least


def _distances(
    store: RunStore, records: Sequence[Record], space: FeatureSpace | None, batch_size: int
) -> dict[str, Any]:
    """Compare the two sets on disk, for the summary."""
    if space is None:
        return {"distances": None}
    sets, records = PairedSets(space), [record for record in records if not record.is_unreadable]
    if not _may_compare(len(records), space, asked_for=False):
        return {"distances": None}
    for start in range(0, len(records), batch_size):
        batch = records[start : start + batch_size]
        originals = [load_image(store.folder / record.inputs["original_path"]) for record in batch]
        drawn = [load_image(store.folder / str(record.output_path)) for record in batch]
        sets.add(to_array(originals), to_array(drawn))
    return {"distances": sets.figures(), "space": space.describe()}


def _reconstructions(records: list[Record], codebook_size: int) -> Reconstructions:
    usage = CodebookUsage(codebook_size)
    lost = {record.item: record.reason for record in records if record.is_unreadable}
    records = [record for record in records if record.item not in lost]
    if records:
        usage.update(torch.tensor([record.raw_scores["ids"] for record in records]))
    rows = [
        {"name": record.item} | {name: value for name, value in record.raw_scores.items() if name not in _OWN}
        for record in records
    ]
    return summarized(rows, usage, lost)


_OWN = ("ids", "entropy_of_image")  # fields of one image that are not averaged over the set


def _summary(records: list[Record], codebook_size: int) -> dict[str, Any]:
    found = _reconstructions(records, codebook_size)
    counted = {"num_images": len(found.rows), "unreadable": sorted(found.unreadable)}
    return {"reconstruction": found.scores, "standard_errors": found.errors, **counted}


def _manifest(
    evaluated: EvaluatedModel,
    plan: ReconstructionPlan,
    reference: ImageTokenizer | None,
    named: FeatureSpace | None,
    arguments: argparse.Namespace,
) -> Manifest:
    tokenizer, space = evaluated.tokenizer, {}
    weights = {"tokenizer": model_fingerprint(tokenizer)}
    if named is not None:
        space = named.describe()
        given = next(each for each in ("inception", "efficientnet", "fd_encoder") if getattr(arguments, each))
        weights[given] = space["sha256"]
    if plan.kmeans_source:
        weights["kmeans_source"] = plan.kmeans_sha256()
    for name in ("lpips_trunk", "lpips_heads"):
        if path := getattr(arguments, name):
            weights[name] = file_sha256(path)
    return Manifest(
        BENCH,
        plan.images_sha256(),
        plan.seed,
        settings={
            "protocol": _protocol(plan) | {"image_size": tokenizer.config.image_size},
            "space": space_settings(space),
            "kmeans_codes": plan.kmeans_codes,
            "mean": list(evaluated.image_processor.image_mean),
            "std": list(evaluated.image_processor.image_std),
            "device": tokenizer.device.type,
            "dtype": str(tokenizer.dtype),
        },
        weights=weights if reference is None else weights | {"reference": model_fingerprint(reference)},
        arguments=recorded_arguments(arguments),
    )


def _protocol(plan: ReconstructionPlan) -> dict[str, Any]:
    return dataclasses.asdict(plan.rules) | {"score_size": plan.score_size, "highest_psnr": HIGHEST_PSNR}
