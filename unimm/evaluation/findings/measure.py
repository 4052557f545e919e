"""Measure one trained cell: reconstruction, distance, probes, questions, ids under a GPT, drawings, maps."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.cluster.vq import kmeans2
from scipy.stats import binomtest

from unimm.class_conditional.drawing import load_drawer
from unimm.data.image_files import save_image_atomically
from unimm.evaluation.findings.plan import MEASURED, Measures, Probe
from unimm.evaluation.findings.verdict import Figure
from unimm.evaluation.generation.class_samples import SamplesPlan, drawn_batches
from unimm.evaluation.generation.feature_spaces import POOL, FeatureSpace
from unimm.evaluation.generation.run import Collected, PairedSets
from unimm.evaluation.metrics.bootstrap import bootstrap_mean
from unimm.evaluation.metrics.frechet import frechet_distance
from unimm.evaluation.probe.run import ProbePlan, probe_tokenizer
from unimm.evaluation.reconstruction.run import Compared, ReconstructionPlan, compared_images, evaluate_images
from unimm.evaluation.shapes.arguments import ShapesPlan
from unimm.evaluation.shapes.run import evaluate_chat
from unimm.mllm import load
from unimm.mllm.swap_tokenizer import swap_image_tokenizer
from unimm.sampling import SAMPLED
from unimm.tokenizer import ImageTokenizer
from unimm.tokenizer.loading import load_with_processor

Figures = dict[str, Figure]
SHOWN_IMAGES, MAP_CLUSTERS, MAP_TILE = 8, 6, 64
MAP_COLORS = np.array(
    [(31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189), (140, 86, 75)], np.uint8
)


def measure(measures: Measures, legs: Mapping[str, Path], folder: Path, space: FeatureSpace | None) -> Figures:
    """Measure a cell; panels and maps are saved into `folder`.

    Args:
        legs: the folders of its trained legs by name.
        space: the feature space of the distances, needed if `measures` has any.
    """
    tokenizer, image_processor = load_with_processor(legs[MEASURED])
    sets = PairedSets(space) if measures.distance and space is not None else None

    def on_batch(batch: Compared) -> None:
        if sets is not None:
            sets.add(batch.originals, batch.drawn)

    plan = ReconstructionPlan(measures.source, measures.num_images)
    found = evaluate_images(tokenizer, image_processor, plan, on_batch=on_batch)
    figures = {name: _mean_of([row[name] for row in found.rows]) for name in ("psnr", "ssim")}
    figures |= {"use": Figure(found.scores["codebook_use"]), "perplexity": Figure(found.scores["perplexity"])}
    if sets is not None:
        figures["distance"] = _distance(sets.drawn, sets.originals)
    shown = ReconstructionPlan(measures.shown or measures.source, SHOWN_IMAGES)
    _save_images(tokenizer, image_processor, shown, folder, maps=measures.maps)
    if measures.probe is not None:
        figures |= _probed(tokenizer, image_processor, measures.probe)
    if measures.questions:
        figures |= _answered(legs, measures.questions)
    if "c2i" in legs:
        figures |= _predicted(legs["c2i"])
        if sets is not None:
            drawn = _drawn(legs["c2i"], measures.num_images, sets.space)
            figures["drawn_distance"] = _distance(drawn, sets.originals)
    return figures


def _mean_of(values: list[float]) -> Figure:
    found = bootstrap_mean(values, range(len(values)))
    return Figure(found.value, found.low, found.high)


def _share(right: int, count: int) -> Figure:
    """Return a share of test images with Wilson's 95 % interval."""
    interval = binomtest(right, count).proportion_ci(method="wilson")
    return Figure(right / count, float(interval.low), float(interval.high))


def _probed(tokenizer: ImageTokenizer, image_processor: Any, probe: Probe) -> Figures:
    plan = ProbePlan(
        probe.source,
        probe.test_source,
        probe.num_train,
        probe.num_test,
        kinds=("features", "lookup"),
        epochs=probe.epochs,
        warmup_epochs=max(1, probe.epochs // 9),
        base_rates=(0.3, 3.0),
        flip=False,
    )
    found = probe_tokenizer(tokenizer, image_processor, plan)
    names = {"probe_features": "features", "probe_codes": "lookup"}
    return {name: _share(round(found[kind]["linear"] * probe.num_test), probe.num_test) for name, kind in names.items()}


def _answered(legs: Mapping[str, Path], questions: int) -> Figures:
    """Ask the default model, as it is, with the cell's tokenizer in place of its own; and the model retrained on it."""
    plan = ShapesPlan(questions=questions)
    model, processor = load(device="cpu", dtype=torch.float32)
    swap_image_tokenizer(model, legs[MEASURED])
    figures = {"chat_kept": _mean_of([float(row["correct"]) for row in evaluate_chat(model, processor, plan)[1]])}
    if "chat" in legs:
        model, processor = load(legs["chat"], device="cpu", dtype=torch.float32)
        rows = evaluate_chat(model, processor, plan)[1]
        figures["chat_retrained"] = _mean_of([float(row["correct"]) for row in rows])
    return figures


def _predicted(folder: Path) -> Figures:
    """Read the held-out loss of a GPT over the ids, and the entropy of the ids alone, in nats an id."""
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    loss, entropy = float(result["held_out_loss"]), float(result["unigram_entropy"])
    return {"ar_loss": Figure(loss), "ar_gain": Figure(entropy - loss)}


def _drawn(folder: Path, count: int, space: FeatureSpace) -> Collected:
    """Collect the features of images drawn by class, without guidance."""
    drawn = Collected()
    for images in drawn_batches(load_drawer(folder, "cpu"), SamplesPlan(count), SAMPLED):
        drawn.add(space.features(images))
    return drawn


def _distance(drawn: Collected, originals: Collected) -> Figure:
    """Return the Fréchet distance of two sets of equally many images."""
    return Figure(frechet_distance(drawn.statistics[POOL].moments, originals.statistics[POOL].moments))


# ---- images ----


def _save_images(
    tokenizer: ImageTokenizer, image_processor: Any, plan: ReconstructionPlan, folder: Path, *, maps: bool
) -> None:
    """Save a panel of images above their reconstructions, and with `maps` their K-means maps."""
    (batch,) = compared_images(tokenizer, image_processor, plan)
    _save(
        np.concatenate([np.concatenate(list(images), axis=1) for images in (batch.originals, batch.drawn)]),
        folder / "panel.png",
    )
    if maps:
        _save(kmeans_maps(tokenizer, image_processor, batch.originals), folder / "maps.png")


def kmeans_maps(tokenizer: ImageTokenizer, image_processor: Any, originals: np.ndarray) -> np.ndarray:
    """Return images [B, H, W, 3] above the clusters of their features, and those of their codes (VQRAE, figure 4)."""
    images = [Image.fromarray(image) for image in originals]
    pixel_values = image_processor(images=images, return_tensors="pt").pixel_values
    with torch.inference_mode():
        encoded = tokenizer.encode(pixel_values)
        tables: list[tuple[torch.Tensor, tuple[int, int]]] = [
            (encoded.features, tokenizer.config.patch_grid),
            (tokenizer.lookup(encoded.ids), tokenizer.config.grid),
        ]
    side = (MAP_TILE, MAP_TILE)
    rows = [np.concatenate([np.asarray(image.resize(side)) for image in images], axis=1)]
    for vectors, grid in tables:
        flat = vectors.flatten(0, 1).double().numpy()
        labels = kmeans2(flat, MAP_CLUSTERS, minit="++", rng=0)[1]
        maps = MAP_COLORS[labels].reshape(len(images), *grid, 3)
        rows.append(
            np.concatenate(
                [np.asarray(Image.fromarray(m).resize(side, Image.Resampling.NEAREST)) for m in maps], axis=1
            )
        )
    return np.concatenate(rows)


def _save(array: np.ndarray, path: Path) -> None:
    save_image_atomically(Image.fromarray(array), path)
