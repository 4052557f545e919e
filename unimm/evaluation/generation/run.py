"""Compare generated images with real ones: FID, sFID, inception score, kernel distance, precision and recall.

The same code compares reconstructions with their originals. Sets come from a folder, a parquet file or the ADM
evaluator's npz; a reference npz may hold statistics (`mu`, `sigma`, `mu_s`, `sigma_s`) instead of images or beside
them, like the published ones. Images of another size are never resized silently, and sets of different N are never
compared, because the distance depends on N. An unreadable image, or a rare one of another size, is left out and named;
it still counts toward the N of its set. Processes share the images and merge exact statistics.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from unimm.data.image_streams import to_array
from unimm.data.sources.storage import data_path
from unimm.errors import UserError
from unimm.evaluation.generation.class_samples import write_npz
from unimm.evaluation.generation.feature_spaces import POOL, PROBABILITIES, SPATIAL, FeatureSpace
from unimm.evaluation.metrics.distributions import (
    PRDC_NEIGHBOURS,
    adm_inception_score,
    inception_score,
    kernel_distance,
    manifolds,
)
from unimm.evaluation.metrics.frechet import FeatureStatistics, Moments, frechet_distance, require_same_count
from unimm.evaluation.runs.image_sets import ImageSet, image_set, read_npz
from unimm.evaluation.runs.store import processes
from unimm.runs.provenance import appearing

KERNEL_SUBSETS, KERNEL_SIZE, SCORE_SPLITS = 100, 1000, 10
MAX_ODD_SHARE = 0.01  # of a set; more images that differ in size from the first one are an error
ADM_STATISTICS = {POOL: ("mu", "sigma"), SPATIAL: ("mu_s", "sigma_s")}


@dataclass
class Collected:
    """The features of a set: streaming statistics of every kind, and all pooled features and probabilities.

    `count` images were processed; the `unreadable` ones were left out.
    """

    statistics: dict[str, FeatureStatistics] = field(default_factory=dict)
    kept: dict[str, list[Tensor]] = field(default_factory=dict)
    count: int = 0
    unreadable: list[str] = field(default_factory=list)

    def add(self, features: dict[str, Tensor]) -> None:
        """Add one batch of features. Raises UserError if a feature is not finite."""
        for name, values in features.items():
            if not torch.isfinite(values).all():
                raise UserError("The network gives features that are not finite: are its weights whole?")
            if name != PROBABILITIES:
                self.statistics.setdefault(name, FeatureStatistics(values.shape[1])).update(values.double().numpy())
            if name != SPATIAL:
                self.kept.setdefault(name, []).append(values.float())
        self.count += len(features[POOL])

    def merged(self) -> "Collected":
        """Return, on every process, what all processes have collected, in rank order."""
        if processes().num_processes == 1:
            return self
        whole = Collected()
        for part in gather_object([self]):
            for name, statistics in part.statistics.items():
                whole.statistics.setdefault(name, FeatureStatistics(len(statistics.mean))).merge(statistics)
            for name, values in part.kept.items():
                whole.kept.setdefault(name, []).extend(values)
            whole.count += part.count
            whole.unreadable += part.unreadable
        return whole

    def all(self, name: str) -> Tensor | None:
        return torch.cat(self.kept[name]) if name in self.kept else None


@dataclass(frozen=True)
class Reference:
    """The reference set: moments by kind, and the pooled features if there are images; the `unreadable` ones are in
    neither."""

    moments: dict[str, Moments]
    pool: Tensor | None = None
    unreadable: tuple[str, ...] = ()


class PairedSets:
    """Originals and their reconstructions as two sets; `add` takes batches, uint8 [B, H, W, 3].

    If one image of a pair has non-finite features, the pair is left out of both sets, and counted.
    """

    def __init__(self, space: FeatureSpace) -> None:
        self.space, self.originals, self.drawn, self.left_out = space, Collected(), Collected(), 0

    def add(self, originals: np.ndarray, drawn: np.ndarray) -> None:
        pair = [self.space.features(originals), self.space.features(drawn)]
        kept = finite_rows(pair[0]) & finite_rows(pair[1])
        if kept.any() and not kept.all():
            self.left_out += int((~kept).sum())
            pair = [{kind: values[kept] for kind, values in features.items()} for features in pair]
        self.originals.add(pair[0])
        self.drawn.add(pair[1])

    def figures(self) -> dict[str, Any]:
        """Compute the scores of `compare`, with the originals as the reference."""
        moments = {kind: statistics.moments for kind, statistics in self.originals.statistics.items()}
        reference = Reference(moments, self.originals.all(POOL))
        found = compare(self.drawn, reference, space=self.space)
        return found | ({"left_out": self.left_out} if self.left_out else {})


def collect(space: FeatureSpace, images: ImageSet, batch_size: int = 50) -> Collected:
    """Compute the features of a set; each process takes a contiguous part of the images.

    Raises:
        UserError: too many images differ from the first one in size, or fewer than two can be read.
    """
    first, size = _first_readable(images)
    state, total = processes(), len(images)
    own = range(
        total * state.process_index // state.num_processes, total * (state.process_index + 1) // state.num_processes
    )
    part = ImageSet(lambda i: images.load(own[i]), [images.names[i] for i in own])
    collected = Collected()
    batches = part.batches(batch_size, bad=lambda name, error: collected.unreadable.append(name))
    odd = 0
    for batch in tqdm(batches, total=-(-len(part) // batch_size), desc=space.name, unit="batch"):
        for name, image in batch:
            odd += image.size != size
            if odd > MAX_ODD_SHARE * total:
                raise UserError(
                    f"{name} has {image.width} x {image.height} pixels and {first} {size[0]} x {size[1]}, and {odd} of "
                    f"{total} images differ: bring them to one size first; the filter decides the figures."
                )
        alike = [(name, image) for name, image in batch if image.size == size]
        collected.unreadable += [name for name, image in batch if image.size != size]
        if alike:
            _collect_batch(collected, space, alike)
    whole = collected.merged()
    if whole.count < 2:
        raise UserError(f"{whole.count} of {total} images can be read, and at least 2 are a distribution.")
    return whole


def _collect_batch(collected: Collected, space: FeatureSpace, batch: Sequence[tuple[str, Image.Image]]) -> None:
    """Add the features of a batch; an image with non-finite features is left out and named.

    If no image of the batch has finite features, `Collected.add` raises: then the network is at fault.
    """
    features = space.features(to_array([image for _, image in batch]))
    kept = finite_rows(features)
    if kept.any() and not kept.all():
        collected.unreadable += [name for (name, _), finite in zip(batch, kept.tolist(), strict=True) if not finite]
        features = {kind: values[kept] for kind, values in features.items()}
    collected.add(features)


def finite_rows(features: dict[str, Tensor]) -> Tensor:
    """Return a mask [B] of the images whose features are all finite."""
    return torch.stack([torch.isfinite(values).flatten(1).all(dim=1) for values in features.values()]).all(dim=0)


def _first_readable(images: ImageSet) -> tuple[str, tuple[int, int]]:
    """Return the name and the size of the first image that can be read.

    Raises UserError if there is none, or if the set has fewer than two images.
    """
    if len(images) < 2:
        raise UserError(f"{len(images)} images are no distribution: give at least 2.")
    reason: UserError | None = None
    for index, name in enumerate(images.names):
        try:
            return name, images.load(index).size
        except UserError as error:
            reason = reason or error
    raise UserError(f"None of {len(images)} images can be read; the first: {reason}")


def read_reference(source: str, space: FeatureSpace, count: int | None, batch_size: int = 50) -> Reference:
    """Read the reference set: ADM's npz with statistics, images or both, or images from another source.

    Raises:
        UserError: as `collect`; or the npz has neither, malformed statistics, or statistics of another feature space.
    """
    path = data_path(source)
    moments: dict[str, Moments] = {}
    images = True
    if path.suffix == ".npz":
        arrays = read_npz(path)
        moments = {kind: _moments(arrays, names, path) for kind, names in ADM_STATISTICS.items() if names[0] in arrays}
        images = "arr_0" in arrays
        if moments and space.name != (written := str(arrays.get("space", "inception"))):
            raise UserError(f"{path} holds statistics of {written}, and the images are compared by {space.name}.")
    if not images and not moments:
        raise UserError(f"{path} holds neither images (arr_0) nor statistics (mu, sigma).")
    if not images:
        return Reference(moments)
    collected = collect(space, image_set(source, None if moments else count), batch_size)
    own = {kind: statistics.moments for kind, statistics in collected.statistics.items()}
    return Reference(own | moments, collected.all(POOL), tuple(collected.unreadable))


def compare(
    generated: Collected, reference: Reference, *, space: FeatureSpace, kernel_size: int | None = None
) -> dict[str, Any]:
    """Compute all scores of a set against a reference that the space and the reference allow.

    `fid` and `sfid` (Inception), `fd_NAME` (any other space); `kid` with `kernel_size` images per subset (1000, or as
    many as there are), `precision`, `recall`, `density`, `coverage`; `inception_score` over 10 splits of a fixed
    permutation and `inception_score_adm` over blocks of 5000 in the given order; `count` and `count_reference`.

    Raises:
        UserError: the sets differ in size or feature width, or hold fewer images than a score needs.
    """
    inception, found = space.name == "inception", dict[str, Any]()
    found |= {"count": generated.count, "count_reference": reference.moments[POOL].count}
    if generated.unreadable or reference.unreadable:
        found |= {"unreadable": list(generated.unreadable), "unreadable_reference": list(reference.unreadable)}
    for kind, moments in reference.moments.items():
        if kind not in generated.statistics:
            raise UserError(f"The reference has statistics of the kind {kind}, which {space.name} does not give.")
        own = generated.statistics[kind].moments
        if moments.mean.shape != own.mean.shape:
            raise UserError(
                f"The reference has features of width {len(moments.mean)}, {space.name} of width {len(own.mean)}."
            )
        if moments.count is not None:
            require_same_count(_whole(own, generated.unreadable), _whole(moments, reference.unreadable))
        name = {POOL: "fid", SPATIAL: "sfid"}[kind] if inception else f"fd_{space.name}"
        found[name] = frechet_distance(moments, own)
    pool, probabilities = generated.all(POOL), generated.all(PROBABILITIES)
    assert pool is not None
    if reference.pool is not None:
        smaller = min(len(pool), len(reference.pool))
        size = min(KERNEL_SIZE, smaller) if kernel_size is None else kernel_size
        if generated.unreadable or reference.unreadable:
            size = min(size, smaller)  # left-out images must not make the requested subset size an error
        if smaller <= PRDC_NEIGHBOURS or size > smaller:
            raise UserError(
                f"Subsets of {size} images and {PRDC_NEIGHBOURS} neighbours need more than {smaller} images."
            )
        distance = kernel_distance(reference.pool, pool, subsets=KERNEL_SUBSETS, size=size)
        found |= {"kid": distance.mean, "kid_std": distance.std, "kid_subset_size": size}
        found |= manifolds(reference.pool, pool)._asdict()
    if probabilities is not None:
        if len(probabilities) < SCORE_SPLITS:
            raise UserError(
                f"The inception score takes {SCORE_SPLITS} splits; {len(probabilities)} images are too few."
            )
        score = inception_score(probabilities, splits=SCORE_SPLITS)
        found |= {"inception_score": score.mean, "inception_score_std": score.std}
        found["inception_score_adm"] = adm_inception_score(probabilities)
    return found


def _whole(moments: Moments, unreadable: Sequence[str]) -> Moments:
    """Return the moments with N including unreadable images: sets are comparable if their requested sizes are equal."""
    return replace(moments, count=None if moments.count is None else moments.count + len(unreadable))


def write_images_npz(
    source: str, path: str | Path, count: int | None = None, unreadable: Sequence[str] = ()
) -> tuple[int, ...]:
    """Write a set of images, without the `unreadable` ones, as the ADM evaluator's npz; return the array's shape.

    Raises:
        UserError: another image cannot be read, sizes differ, or the file cannot be written.
    """
    images = image_set(source, count)
    kept = [index for index, name in enumerate(images.names) if name not in set(unreadable)]
    width, height = images.load(kept[0]).size
    shape = (len(kept), height, width, 3)
    write_npz(Path(path), shape, (to_array([images.load(index)]) for index in kept))
    return shape


def write_statistics(path: str | Path, collected: Collected, space: FeatureSpace) -> None:
    """Write the statistics of a set in the format of ADM's reference files, and the name of the space.

    Raises UserError if the file cannot be written.
    """
    arrays: dict[str, Any] = {"space": np.array(space.name), "count": np.array(collected.count)}
    for kind, (mean, covariance) in ADM_STATISTICS.items():
        if kind in collected.statistics:
            moments = collected.statistics[kind].moments
            arrays |= {mean: moments.mean, covariance: moments.covariance}
    with appearing(path, "statistics") as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def _moments(arrays: dict[str, np.ndarray], names: Iterable[str], path: Path) -> Moments:
    mean, covariance = (arrays.get(name) for name in names)
    if mean is None or covariance is None or mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise UserError(f"{path} holds {' and '.join(names)} that are no mean [D] and covariance [D, D].")
    count = int(arrays["count"]) if "count" in arrays else None
    return Moments(mean.astype(np.float64), covariance.astype(np.float64), count)
