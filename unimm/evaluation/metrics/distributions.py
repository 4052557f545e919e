"""Two sets of images compared by their features, beside the Fréchet distance: kernel distance, inception score,
precision, recall, density and coverage.

Pure functions of features [N, D] and probabilities [N, classes]; float64 inside. Special here is what decides the
figures and is seldom said: subsets and permutations come from numpy's RandomState(2020), as torch-fidelity's do, and
ADM's conventions have functions or arguments of their own.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

SEED = 2020
ADM_SPLIT = 5000  # probabilities in one block of ADM's inception score
ADM_NEIGHBOURS, PRDC_NEIGHBOURS = 3, 5


class MeanAndStd(NamedTuple):
    """Over subsets or splits; the deviation is the population's, as torch-fidelity prints it."""

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
    """Unbiased estimate of the squared maximum mean discrepancy with the kernel (x·y / D + 1)³; may be negative.

    Raises ValueError for fewer than two features on a side or different widths.
    """
    _check_pair(x, y)
    x, y = x.double(), y.double()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    within = sum((k.sum() - k.diagonal().sum()) / (len(k) * (len(k) - 1)) for k in (kernel(x, x), kernel(y, y)))
    return float(within - 2 * kernel(x, y).mean())


def kernel_distance(x: Tensor, y: Tensor, *, subsets: int = 100, size: int = 1000, seed: int = SEED) -> MeanAndStd:
    """Kernel distance (KID, Bińkowski et al. 2018, https://arxiv.org/abs/1801.01401) over random subsets.

    Raises ValueError where a side holds fewer than `size` features.
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


def block_kernel_distance(x: Tensor, y: Tensor, *, size: int = 1000) -> MeanAndStd:
    """The same over disjoint blocks in the given order (Zaremba et al. 2013): every feature once, no randomness.

    What does not fill a block is left over. Raises ValueError where a side does not fill one.
    """
    _check_pair(x, y)
    blocks = min(len(x), len(y)) // size
    if not blocks:
        raise ValueError(f"blocks of {size} need as many features; there are {len(x)} and {len(y)}")
    estimates = [squared_mmd(x[i * size : (i + 1) * size], y[i * size : (i + 1) * size]) for i in range(blocks)]
    return MeanAndStd(float(np.mean(estimates)), float(np.std(estimates)))


def inception_score(probabilities: Tensor, *, splits: int = 10, seed: int | None = SEED) -> MeanAndStd:
    """exp of the mean KL divergence to the mean (Salimans et al. 2016, https://arxiv.org/abs/1606.03498), over equal
    splits of a fixed permutation; `seed` None keeps the given order.

    Raises ValueError for fewer probabilities than splits.
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
    """ADM's: the mean over consecutive blocks. Images that come class by class make it collapse."""
    return float(np.mean([_score(block) for block in probabilities.split(split)]))


def manifolds(
    real: Tensor,
    generated: Tensor,
    *,
    neighbours: int = ADM_NEIGHBOURS,
    density_neighbours: int = PRDC_NEIGHBOURS,
    block: int = 4096,
) -> Manifolds:
    """How the balls around the points of one set, each as wide as to its k-th neighbour, hold the points of the other.

    `block` rows of distances stand in memory at once.

    Raises ValueError where a set is not larger than the number of neighbours, or for different widths.
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
    """Per number of neighbours the squared distance [N] of each point to that neighbour; itself is not counted."""
    found: list[list[Tensor]] = [[] for _ in neighbours]
    for rows in points.split(block):
        nearest = _squared_distances(rows, points).topk(max(neighbours) + 1, dim=1, largest=False).values
        for radii, k in zip(found, neighbours, strict=True):
            radii.append(nearest[:, k])
    return [torch.cat(radii) for radii in found]


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """[A, D] and [B, D] -> [A, B]; rounding does not take a distance below 0."""
    return (x.square().sum(dim=1)[:, None] + y.square().sum(dim=1) - 2 * x @ y.T).clamp(min=0)


def _check_pair(x: Tensor, y: Tensor) -> None:
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        shapes = f"{list(x.shape)} and {list(y.shape)}"
        raise ValueError(f"two sets of features [N, D] of one width and at least 2 rows are compared, not {shapes}")
