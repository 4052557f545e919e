"""Metrics between two sets of image features: KID, inception score, precision, recall, density and coverage.

Pure functions of features [N, D] and probabilities [N, classes], computed in float64. Subsets and permutations, which
affect the scores, come from numpy's RandomState(2020), as in torch-fidelity; ADM's conventions have functions or
arguments of their own. The Fréchet distance (FID) is in `frechet`.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

SEED = 2020
ADM_SPLIT = 5000  # probabilities in one block of ADM's inception score
ADM_NEIGHBOURS, PRDC_NEIGHBOURS = 3, 5


class MeanAndStd(NamedTuple):
    """Mean and standard deviation over subsets or splits; the population's deviation, as torch-fidelity prints it."""

    mean: float
    std: float


class Manifolds(NamedTuple):
    """Precision and recall (Kynkäänniemi et al. 2019, https://arxiv.org/abs/1904.06991), density and coverage (Naeem et
    al. 2020, https://arxiv.org/abs/2002.09797)."""

    precision: float
    recall: float
    density: float
    coverage: float


def squared_mmd(x: Tensor, y: Tensor) -> float:
    """Compute the unbiased squared maximum mean discrepancy with the kernel (x·y / D + 1)³; may be negative.

    Raises ValueError if a set has fewer than two features, or for different widths.
    """
    _check_pair(x, y)
    x, y = x.double(), y.double()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    within = sum((k.sum() - k.diagonal().sum()) / (len(k) * (len(k) - 1)) for k in (kernel(x, x), kernel(y, y)))
    return float(within - 2 * kernel(x, y).mean())


def kernel_distance(x: Tensor, y: Tensor, *, subsets: int = 100, size: int = 1000, seed: int = SEED) -> MeanAndStd:
    """Compute the kernel distance (KID, Bińkowski et al. 2018, https://arxiv.org/abs/1801.01401) over random subsets.

    Raises ValueError if a set has fewer than `size` features.
    """
    _check_pair(x, y)
    if min(len(x), len(y)) < size:
        raise ValueError(f"subsets of {size} need as many features; there are {len(x)} and {len(y)}")
    rng = np.random.RandomState(seed)
    estimates = []
    for _ in range(subsets):
        first, second = (torch.from_numpy(rng.choice(len(side), size, replace=False)) for side in (x, y))
        estimates.append(squared_mmd(x[first], y[second]))
    return MeanAndStd(float(np.mean(estimates)), float(np.std(estimates)))


def inception_score(probabilities: Tensor, *, splits: int = 10, seed: int | None = SEED) -> MeanAndStd:
    """Compute the inception score (Salimans et al. 2016, https://arxiv.org/abs/1606.03498).

    It is exp of the mean KL divergence to the mean, over equal splits of a fixed permutation; `seed` None keeps the
    given order. Raises ValueError for fewer probabilities than splits.
    """
    count = len(probabilities)
    if count < splits:
        raise ValueError(f"{splits} splits need as many images; there are {count}")
    if seed is not None:
        probabilities = probabilities[torch.from_numpy(np.random.RandomState(seed).permutation(count))]
    bounds = [i * count // splits for i in range(splits + 1)]
    scores = [_score(probabilities[start:stop]) for start, stop in zip(bounds, bounds[1:], strict=False)]
    return MeanAndStd(float(np.mean(scores)), float(np.std(scores)))


def adm_inception_score(probabilities: Tensor, split: int = ADM_SPLIT) -> float:
    """Compute ADM's inception score, the mean over consecutive blocks. It collapses if images are sorted by class."""
    return float(np.mean([_score(block) for block in probabilities.split(split)]))


def manifolds(
    real: Tensor,
    generated: Tensor,
    *,
    neighbours: int = ADM_NEIGHBOURS,
    density_neighbours: int = PRDC_NEIGHBOURS,
    block: int = 4096,
) -> Manifolds:
    """Compute precision, recall, density and coverage from k-nearest-neighbor balls.

    Each point of a set has a ball that reaches to its k-th neighbor; the metrics count which points of the other set
    lie inside. `block` rows of distances are held in memory at once.

    Raises ValueError if a set is not larger than the number of neighbors, or for different widths.
    """
    _check_pair(real, generated)
    widest = max(neighbours, density_neighbours)
    if min(len(real), len(generated)) <= widest:
        raise ValueError(f"{widest} neighbours need more features; there are {len(real)} and {len(generated)}")
    real, generated = real.double(), generated.double()
    real_radii = _squared_radii(real, (neighbours, density_neighbours), block)
    generated_radii = _squared_radii(generated, (neighbours,), block)[0]
    recalled, precise, inside, covered = 0, 0, 0, torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for rows in generated.split(block):
        distances = _squared_distances(rows, real)  # [b, N real]
        precise += int((distances <= real_radii[0]).any(dim=1).sum())
        within = distances <= real_radii[1]
        inside += int(within.sum())
        covered |= within.any(dim=0)
    for rows in real.split(block):
        recalled += int((_squared_distances(rows, generated) <= generated_radii).any(dim=1).sum())
    density = inside / (density_neighbours * len(generated))
    return Manifolds(precise / len(generated), recalled / len(real), density, float(covered.double().mean()))


def _score(probabilities: Tensor) -> float:
    p = probabilities.double()
    divergence = torch.xlogy(p, p) - torch.xlogy(p, p.mean(dim=0, keepdim=True))
    return float(divergence.sum(dim=1).mean().exp())


def _squared_radii(points: Tensor, neighbours: tuple[int, ...], block: int) -> list[Tensor]:
    """Return, for each k in `neighbours`, the squared distances [N] of the points to their k-th neighbors."""
    found: list[list[Tensor]] = [[] for _ in neighbours]
    for rows in points.split(block):
        # one more: the nearest point of each row is the point itself
        nearest = _squared_distances(rows, points).topk(max(neighbours) + 1, dim=1, largest=False).values
        for radii, k in zip(found, neighbours, strict=True):
            radii.append(nearest[:, k])
    return [torch.cat(radii) for radii in found]


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Compute squared distances [A, D], [B, D] -> [A, B], clamped at 0 against rounding errors."""
    return (x.square().sum(dim=1)[:, None] + y.square().sum(dim=1) - 2 * x @ y.T).clamp(min=0)


def _check_pair(x: Tensor, y: Tensor) -> None:
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        shapes = f"{list(x.shape)} and {list(y.shape)}"
        raise ValueError(f"two sets of features [N, D] of one width and at least 2 rows are compared, not {shapes}")
