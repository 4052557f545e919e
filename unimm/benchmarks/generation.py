"""Sets of drawn pictures against sets of real ones: FID, sFID, inception score, kernel distance, precision and recall.

Special here: the same code compares reconstructions with their originals. Sets come from a folder, a parquet file or
the ADM evaluator's npz; a reference npz may hold statistics (`mu`, `sigma`, `mu_s`, `sigma_s`) instead of pictures or
beside them, as the published ones do. Pictures of another size are never resized in silence, and sets of different N
never compared: the distance depends on N. Processes share the pictures and merge exact statistics.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor
from tqdm.auto import tqdm

from unimm.benchmarks.class_samples import write_npz
from unimm.benchmarks.feature_spaces import POOL, PROBABILITIES, SPATIAL, FeatureSpace
from unimm.benchmarks.pictures import PictureSet, picture_set, read_npz
from unimm.benchmarks.store import processes
from unimm.data.pictures import to_array
from unimm.data.places import data_path
from unimm.errors import UserError
from unimm.evaluation.distributions import (
    PRDC_NEIGHBOURS,
    adm_inception_score,
    inception_score,
    kernel_distance,
    manifolds,
)
from unimm.evaluation.frechet import FeatureStatistics, Moments, frechet_distance, require_same_count
from unimm.provenance import appearing

KERNEL_SUBSETS, KERNEL_SIZE, SCORE_SPLITS = 100, 1000, 10
ADM_STATISTICS = {POOL: ("mu", "sigma"), SPATIAL: ("mu_s", "sigma_s")}


@dataclass
class Collected:
    """What a feature space sees of a set: streaming statistics of every kind, and all pooled features and
    probabilities."""

    statistics: dict[str, FeatureStatistics] = field(default_factory=dict)
    kept: dict[str, list[Tensor]] = field(default_factory=dict)
    count: int = 0

    def add(self, features: dict[str, Tensor]) -> None:
        """Take in one batch of a `FeatureSpace`. Raises UserError where a feature is not finite."""
        for name, values in features.items():
            if not torch.isfinite(values).all():
                raise UserError("The network gives features that are not finite: are its weights whole?")
            if name != PROBABILITIES:
                self.statistics.setdefault(name, FeatureStatistics(values.shape[1])).update(values.double().numpy())
            if name != SPATIAL:
                self.kept.setdefault(name, []).append(values.float())
        self.count += len(features[POOL])

    def merged(self) -> "Collected":
        """What all processes have collected, in their order, on each of them."""
        if processes().num_processes == 1:
            return self
        whole = Collected()
        for part in gather_object([self]):
            for name, statistics in part.statistics.items():
                whole.statistics.setdefault(name, FeatureStatistics(len(statistics.mean))).merge(statistics)
            for name, values in part.kept.items():
                whole.kept.setdefault(name, []).extend(values)
            whole.count += part.count
        return whole

    def all(self, name: str) -> Tensor | None:
        return torch.cat(self.kept[name]) if name in self.kept else None


@dataclass(frozen=True)
class Reference:
    """What is compared with: moments by kind, and the pooled features where there are pictures."""

    moments: dict[str, Moments]
    pool: Tensor | None = None


class PairedSets:
    """Originals and their reconstructions as two sets; `add` takes them batch by batch, uint8 [B, H, W, 3]."""

    def __init__(self, space: FeatureSpace) -> None:
        self.space, self.originals, self.drawn = space, Collected(), Collected()

    def add(self, originals: np.ndarray, drawn: np.ndarray) -> None:
        self.originals.add(self.space.features(originals))
        self.drawn.add(self.space.features(drawn))

    def figures(self) -> dict[str, Any]:
        """Those of `compare`, the reference being the same pictures before they were reconstructed."""
        moments = {kind: statistics.moments for kind, statistics in self.originals.statistics.items()}
        reference = Reference(moments, self.originals.all(POOL))
        return compare(self.drawn, reference, space=self.space)


def collect(space: FeatureSpace, pictures: PictureSet, batch_size: int = 50) -> Collected:
    """The features of a set, shared by all processes in contiguous parts.

    Raises:
        UserError: a picture cannot be read or differs from the first one in size, or there are fewer than two.
    """
    if len(pictures) < 2:
        raise UserError(f"{len(pictures)} pictures are no distribution: give at least 2.")
    state, total = processes(), len(pictures)
    own = range(
        total * state.process_index // state.num_processes, total * (state.process_index + 1) // state.num_processes
    )
    part = PictureSet(lambda i: pictures.load(own[i]), [pictures.names[i] for i in own])
    size, collected = pictures.load(0).size, Collected()
    for batch in tqdm(part.batches(batch_size), total=-(-len(part) // batch_size), desc=space.name, unit="batch"):
        for name, image in batch:
            if image.size != size:
                raise UserError(
                    f"{name} has {image.width} x {image.height} pixels and {pictures.names[0]} {size[0]} x {size[1]}: "
                    "bring them to one size first; the filter decides the figures."
                )
        collected.add(space.features(to_array([image for _, image in batch])))
    return collected.merged()


def read_reference(source: str, space: FeatureSpace, count: int | None, batch_size: int = 50) -> Reference:
    """The reference set: ADM's npz with statistics, pictures or both, or pictures from elsewhere.

    Raises:
        UserError: as `collect`; statistics of another width or for another space than Inception.
    """
    path = data_path(source)
    moments: dict[str, Moments] = {}
    pictures = True
    if path.suffix == ".npz":
        arrays = read_npz(path)
        moments = {kind: _moments(arrays, names, path) for kind, names in ADM_STATISTICS.items() if names[0] in arrays}
        pictures = "arr_0" in arrays
        if moments and space.name != (written := str(arrays.get("space", "inception"))):
            raise UserError(f"{path} holds statistics of {written}, and the pictures are compared by {space.name}.")
    if not pictures and not moments:
        raise UserError(f"{path} holds neither pictures (arr_0) nor statistics (mu, sigma).")
    if not pictures:
        return Reference(moments)
    collected = collect(space, picture_set(source, None if moments else count), batch_size)
    own = {kind: statistics.moments for kind, statistics in collected.statistics.items()}
    return Reference(own | moments, collected.all(POOL))


def compare(
    generated: Collected, reference: Reference, *, space: FeatureSpace, kernel_size: int | None = None
) -> dict[str, Any]:
    """The figures of one set against another, each as far as the space and the reference allow.

    `fid` and `sfid` (Inception), `fd_NAME` (any other space); `kid` over `kernel_size` pictures a subset (1000, or as
    many as there are), `precision`, `recall`, `density`, `coverage`; `inception_score` over 10 splits of a fixed
    permutation and `inception_score_adm` over blocks of 5000 in the given order; `count` and `count_reference`.

    Raises:
        UserError: the sets differ in number, or hold fewer pictures than a figure needs.
    """
    inception, found = space.name == "inception", dict[str, Any]()
    found |= {"count": generated.count, "count_reference": reference.moments[POOL].count}
    for kind, moments in reference.moments.items():
        if kind not in generated.statistics:
            raise UserError(f"The reference has statistics of the kind {kind}, which {space.name} does not give.")
        own = generated.statistics[kind].moments
        if moments.mean.shape != own.mean.shape:
            raise UserError(
                f"The reference has features of width {len(moments.mean)}, {space.name} of width {len(own.mean)}."
            )
        if moments.count is not None:
            require_same_count(own, moments)
        name = {POOL: "fid", SPATIAL: "sfid"}[kind] if inception else f"fd_{space.name}"
        found[name] = frechet_distance(moments, own)
    pool, probabilities = generated.all(POOL), generated.all(PROBABILITIES)
    assert pool is not None
    if reference.pool is not None:
        smaller = min(len(pool), len(reference.pool))
        size = min(KERNEL_SIZE, smaller) if kernel_size is None else kernel_size
        if smaller <= PRDC_NEIGHBOURS or size > smaller:
            raise UserError(
                f"Subsets of {size} pictures and {PRDC_NEIGHBOURS} neighbours need more than {smaller} pictures."
            )
        distance = kernel_distance(reference.pool, pool, subsets=KERNEL_SUBSETS, size=size)
        found |= {"kid": distance.mean, "kid_std": distance.std, "kid_subset_size": size}
        found |= manifolds(reference.pool, pool)._asdict()
    if probabilities is not None:
        if len(probabilities) < SCORE_SPLITS:
            raise UserError(
                f"The inception score takes {SCORE_SPLITS} splits; {len(probabilities)} pictures are too few."
            )
        score = inception_score(probabilities, splits=SCORE_SPLITS)
        found |= {"inception_score": score.mean, "inception_score_std": score.std}
        found["inception_score_adm"] = adm_inception_score(probabilities)
    return found


def write_pictures_npz(source: str, path: str | Path, count: int | None = None) -> tuple[int, ...]:
    """A set of pictures as the ADM evaluator's npz; gives the array's shape.

    Raises:
        UserError: a picture cannot be read, sizes differ, or the file cannot be written.
    """
    pictures = picture_set(source, count)
    width, height = pictures.load(0).size
    shape = (len(pictures), height, width, 3)
    write_npz(Path(path), shape, (to_array([image]) for batch in pictures.batches(50) for _, image in batch))
    return shape


def write_statistics(path: str | Path, collected: Collected, space: FeatureSpace) -> None:
    """What ADM's reference files hold of a set, and the name of the space. Raises UserError where it cannot be
    written."""
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
