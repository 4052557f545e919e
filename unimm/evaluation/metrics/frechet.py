"""Fréchet distance between two sets of features (FID, sFID and FD in any feature space), from streaming statistics.

    ‖μ_x - μ_y‖² + tr Σ_x + tr Σ_y - 2 tr (Σ_x Σ_y)^½        (Heusel et al. 2017, https://arxiv.org/abs/1706.08500)

Everything is float64. Means and scatter matrices merge exactly over batches and processes (Chan et al. 1983). The last
trace is the sum of the square roots of the eigenvalues of Σ_x^½ Σ_y Σ_x^½, which is symmetric. ADM's evaluator takes
scipy's square root of the product instead; that agrees to 1e-12 on covariances of full rank and fails on others, which
occur for any N below the feature width.

The distance decreases with N for any images, so distances at different N are not comparable.
"""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from unimm.errors import UserError


@dataclass(frozen=True)
class Moments:
    """Mean [D] and covariance [D, D] (over N - 1); `count` is N, None if a file does not state it."""

    mean: np.ndarray
    covariance: np.ndarray
    count: int | None = None


class FeatureStatistics:
    """Streaming mean and covariance of features.

    Args:
        width: D, the number of features.
    """

    def __init__(self, width: int) -> None:
        self.count = 0
        self.mean = np.zeros(width)  # [D]
        self.scatter = np.zeros((width, width))  # [D, D], the sum of (x - mean)(x - mean)^T

    def update(self, features: Any) -> None:
        """Add features [B, D] of any float type. Raises ValueError for another shape or non-finite features."""
        batch = np.asarray(features, dtype=np.float64)
        if batch.ndim != 2 or batch.shape[1] != len(self.mean):
            raise ValueError(f"features of width {len(self.mean)} are [B, {len(self.mean)}], not {list(batch.shape)}")
        if not np.isfinite(batch).all():
            raise ValueError(f"{int((~np.isfinite(batch)).any(axis=1).sum())} of {len(batch)} features are not finite")
        if len(batch):
            mean = batch.mean(axis=0)
            self._add(len(batch), mean, (batch - mean).T @ (batch - mean))

    def merge(self, other: Self) -> None:
        """Add the statistics of another process. Raises ValueError for another width."""
        if len(other.mean) != len(self.mean):
            raise ValueError(f"features of width {len(other.mean)} cannot join features of width {len(self.mean)}")
        if other.count:
            self._add(other.count, other.mean, other.scatter)

    @property
    def moments(self) -> Moments:
        """Return mean and covariance so far. Raises ValueError for fewer than two features: there is no covariance."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 features, not {self.count}")
        return Moments(self.mean.copy(), self.scatter / (self.count - 1), self.count)

    def _add(self, count: int, mean: np.ndarray, scatter: np.ndarray) -> None:
        # pairwise update of Chan et al. 1983: exact, without the cancellation of sums of squares
        total, offset = self.count + count, mean - self.mean
        self.scatter += scatter + np.outer(offset, offset) * (self.count * count / total)
        self.mean += offset * (count / total)
        self.count = total


def moments_of(features: Any) -> Moments:
    """Compute the moments of features [N, D]."""
    array = np.asarray(features)
    statistics = FeatureStatistics(array.shape[1])
    statistics.update(array)
    return statistics.moments


def frechet_distance(x: Moments, y: Moments) -> float:
    """Compute the Fréchet distance in its symmetric form, clamped at 0 against rounding errors.

    Raises ValueError for moments of different widths.
    """
    if x.mean.shape != y.mean.shape:
        raise ValueError(f"moments of widths {len(x.mean)} and {len(y.mean)} belong to different feature spaces")
    values, vectors = np.linalg.eigh(x.covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    product = np.linalg.eigvalsh(root @ y.covariance @ root)
    cross = np.sqrt(np.maximum(product, 0)).sum()
    apart = np.square(x.mean - y.mean).sum() + np.trace(x.covariance) + np.trace(y.covariance)
    return max(0.0, float(apart - 2 * cross))


def require_same_count(x: Moments, y: Moments) -> None:
    """Raise UserError if two sets hold different numbers of images."""
    if x.count != y.count:
        raise UserError(f"The sets hold {x.count} and {y.count} images; the distance depends on N: use equal numbers.")
