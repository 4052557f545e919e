"""Spatial relations of two boxes, by GenEval's rule (https://arxiv.org/abs/2310.11513)."""

from collections.abc import Sequence

import numpy as np

Box = Sequence[float] | np.ndarray
RELATIONS = ("left of", "right of", "above", "below")


def relative_position(box_a: Box, box_b: Box, threshold: float = 0.1) -> set[str]:
    """Return the relations of box a to box b: none, one or two of "left of", "right of", "above", "below".

    `threshold` times the summed extents of the boxes is a dead zone around b's center, per axis.
    """
    a = np.asarray(box_a, dtype=np.float32)[:4].reshape(2, 2)
    b = np.asarray(box_b, dtype=np.float32)[:4].reshape(2, 2)
    offset = a.mean(axis=0) - b.mean(axis=0)
    extent = np.abs(a[1] - a[0]) + np.abs(b[1] - b[0])
    revised = np.maximum(np.abs(offset) - np.float32(threshold) * extent, 0) * np.sign(offset)
    if np.all(np.abs(revised) < 1e-3):
        return set()
    dx, dy = revised / np.linalg.norm(offset)  # the norm of the *unrevised* offset: a near miss stays below 0.5
    relations = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {name for name, holds in relations.items() if holds}
