"""The command that checks memorization: it generates images from the captions of a set, and finds the nearest image of
the set for each (eval/nearest.py).

A generated image is right if no other image of the set is nearer to it, in pixels, than the one whose caption was the
prompt. The tokenizer's reconstructions are measured beside it: they are the upper bound for generated images.
"""

import argparse
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from unimm.data.image_files import save_image_atomically
from unimm.data.image_streams import to_array
from unimm.data.resizing import crop
from unimm.data.sources.registry import open_images
from unimm.data.sources.storage import data_path
from unimm.errors import UserError
from unimm.evaluation.nearest.arguments import BENCH, parse
from unimm.evaluation.nearest.rules import nearest_images
from unimm.evaluation.runs.arguments import recorded_arguments
from unimm.evaluation.runs.bad_images import each_or_error
from unimm.evaluation.runs.evaluated_model import EvaluatedModel, load_evaluated_model
from unimm.evaluation.runs.html_report import write_report
from unimm.evaluation.runs.records import UNREADABLE, unreadable, unreadable_names
from unimm.evaluation.runs.store import Key, Manifest, Record, RunStore, content_sha256, sample_seed
from unimm.mllm.draw_prompts import draw_prompts
from unimm.runs.provenance import git_commit, model_fingerprint
from unimm.runs.report import Report
from unimm.sampling import sampling_options

PARTS = ("drawing", "reconstruction")
SCORER = {"name": "nearest image of the set", "rule": "no other image has a smaller mean squared difference"}


def main(argv: Sequence[str] | None = None, description: str | None = None) -> None:
    """Parse the arguments and run the command."""
    run(parse(argv, description))


def run(arguments: argparse.Namespace) -> None:
    """Generate images, find their nearest images, and report the matches."""
    report = Report(arguments.json)
    with report.timed("load"):
        evaluated = load_evaluated_model(arguments.model)
        if evaluated.model is None:
            raise UserError(f"{arguments.model} is an image tokenizer and cannot draw: give a unified model.")
        size = evaluated.tokenizer.config.image_size
        names, originals, bad = captioned(arguments.source, arguments.num_images, size)
    keys = [(f"{part} {row}: {name}", 0) for part in PARTS for row, name in enumerate(names)]
    manifest = _manifest(evaluated, names, originals, arguments)
    with RunStore.open(arguments.output, manifest) as store, report.timed("nearest"):
        for key in store.split([(f"{UNREADABLE} {row}", 0) for row in bad]):
            store.append(Record(BENCH, *key, reason=unreadable(bad[int(key[0].split()[1])])))
        for part, wanted in zip(PARTS, (keys[: len(names)], keys[len(names) :]), strict=True):
            _record(store, part, evaluated, names, originals, wanted, arguments)
        summary = store.finish(_summary)
    for part in PARTS:
        found = summary[part]
        report.say(
            f"{part:<15} {found['matches']} of {found['images']} are nearest to their own image "
            f"({found['share']:.1%}; by chance {1 / len(names):.2%}), mean rank {found['mean_rank']:.1f}"
        )
    if lost := summary["unreadable"]:
        report.say(f"left out, because they cannot be read: {', '.join(lost)}")
    report.add(**summary, seed=arguments.seed, commit=git_commit())
    if arguments.page is not None:
        write_report(arguments.output, arguments.page)
        report.say(arguments.page)
    report.write()


def captioned(source: str, count: int, size: int) -> tuple[list[str], np.ndarray, dict[int, UserError]]:
    """Return the captions and images, uint8 [N, size, size, 3], of a source, and the errors of unreadable rows, by row.

    Reads the first `count` rows; 0 reads all.

    Raises:
        UserError: the source cannot be read, or has fewer than two captioned images.
    """
    images = open_images(data_path(source))
    read = each_or_error(range(min(count or len(images), len(images))), images.__getitem__)
    rows = [row for row in read if not isinstance(row, UserError)]
    bad = {index: row for index, row in enumerate(read) if isinstance(row, UserError)}
    if len(rows) < 2 or not all(row["text"].strip() for row in rows):
        raise UserError(f"{source} needs at least two images, each with a caption (column text).")
    return [row["text"] for row in rows], to_array([crop(row["image"], size) for row in rows]), bad


def _record(
    store: RunStore,
    part: str,
    evaluated: EvaluatedModel,
    names: list[str],
    originals: np.ndarray,
    keys: list[Key],
    arguments: argparse.Namespace,
) -> None:
    """Generate and score the missing samples of one part."""
    row_of = {key: row for row, key in enumerate(keys)}
    make = _DRAW[part]
    for block in tqdm(store.split_blocks(keys, arguments.batch_size), desc=part, unit="batch"):
        rows = np.array([row_of[key] for key in block])
        seeds = [sample_seed(arguments.seed, BENCH, *key) for key in block]
        images = make(evaluated, [names[row] for row in rows], originals[rows], seeds, sampling_options(arguments))
        nearest, ranks = nearest_images(to_array(images), originals, rows)
        for key, row, seed, image, found, rank in zip(block, rows, seeds, images, nearest, ranks, strict=True):
            if key in store.done:
                continue
            original = Image.fromarray(originals[row])
            store.append(
                Record(
                    BENCH,
                    key[0],
                    key[1],
                    seed=seed,
                    inputs={
                        "part": part,
                        "prompt": names[row],
                        "original_path": store.inside(
                            save_image_atomically(original, store.image_path(key[0], role="original"))
                        ),
                    },
                    output_path=str(save_image_atomically(image, store.image_path(key[0]))),
                    raw_scores={"rank": int(rank)},
                    verdict=bool(rank == 1),
                    reason="" if rank == 1 else f"nearer to another: {names[found]}",
                    scorer=SCORER,
                )
            )


Draw = Callable[[EvaluatedModel, list[str], np.ndarray, list[int], dict[str, Any]], list[Image.Image]]


def _drawn(
    evaluated: EvaluatedModel, names: list[str], _: np.ndarray, seeds: list[int], sampling: dict
) -> list[Image.Image]:
    return draw_prompts(evaluated.model, evaluated.processor, names, seeds, **sampling)


@torch.inference_mode()
def _copied(evaluated: EvaluatedModel, _: list[str], originals: np.ndarray, *__: Any) -> list[Image.Image]:
    images = [Image.fromarray(original) for original in originals]
    pixel_values = evaluated.image_processor(images=images, return_tensors="pt").pixel_values
    ids = evaluated.tokenizer.encode(pixel_values.to(evaluated.tokenizer.device)).ids
    return list(evaluated.processor.postprocess(evaluated.tokenizer.decode(ids)))


_DRAW: dict[str, Draw] = {"drawing": _drawn, "reconstruction": _copied}


def _summary(records: list[Record]) -> dict[str, Any]:
    """Return, for each part, how many images are nearest to their own image; and the unreadable rows."""
    found: dict[str, Any] = {"unreadable": unreadable_names(records)}
    for part in PARTS:
        own = [record for record in records if record.inputs.get("part") == part]
        matches = sum(bool(record.verdict) for record in own)
        ranks = [record.raw_scores["rank"] for record in own]
        found[part] = {
            "matches": matches,
            "images": len(own),
            "share": matches / len(own),
            "mean_rank": sum(ranks) / len(ranks),
        }
    return found


def _manifest(
    evaluated: EvaluatedModel, names: list[str], originals: np.ndarray, arguments: argparse.Namespace
) -> Manifest:
    return Manifest(
        BENCH,
        content_sha256([*names, hashlib.sha256(originals.tobytes()).hexdigest()]),
        arguments.seed,
        settings={
            "source": arguments.source,
            "sampling": evaluated.model.generation_config.image_generation | sampling_options(arguments),
            "batch_size": arguments.batch_size,
            "image_size": evaluated.tokenizer.config.image_size,
            "device": evaluated.tokenizer.device.type,
            "dtype": str(evaluated.model.dtype),
        },
        weights={"model": model_fingerprint(evaluated.model)},
        arguments=recorded_arguments(arguments),
    )
