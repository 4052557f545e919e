"""Nearest images against float64 brute force."""

import numpy as np
import pytest

from unimm.evaluation.nearest.rules import nearest_images


def test_as_brute_force_over_all_pairs():
    rng = np.random.default_rng(0)
    references = rng.integers(0, 256, (23, 2, 1, 3), dtype=np.uint8)
    own = rng.integers(0, 23, 40)
    noise = rng.integers(-200, 201, (40, 2, 1, 3))
    drawn = np.clip(references[own].astype(int) + noise, 0, 255).astype(np.uint8)
    nearest, ranks = nearest_images(drawn, references, own)
    for image, found, rank, row in zip(drawn, nearest, ranks, own, strict=True):
        distances = [float(((image.astype(float) - other) ** 2).mean()) for other in references]
        assert distances[found] == min(distances)
        assert rank == 1 + sum(distance < distances[row] for distance in distances)
    assert (ranks == 1).any() and (ranks > 1).any()


def test_equal_images_are_no_rivals():
    twins = np.zeros((3, 2, 2, 3), np.uint8)
    twins[2] = 9
    nearest, ranks = nearest_images(twins[:2], twins, np.array([1, 0]))
    assert nearest.tolist() == [0, 0] and ranks.tolist() == [1, 1]


def test_another_size_is_refused():
    with pytest.raises(ValueError, match="cannot be compared"):
        nearest_images(np.zeros((1, 2, 2, 3), np.uint8), np.zeros((1, 3, 3, 3), np.uint8), np.array([0]))
