"""Kernel distance, inception score and manifolds against recorded figures and brute force; tests/integrations holds
them against torch-fidelity."""

import json
from itertools import product

import numpy as np
import pytest
import torch

from tests.conftest import ROOT
from unimm.evaluation.metrics.distributions import (
    adm_inception_score,
    inception_score,
    kernel_distance,
    manifolds,
    squared_mmd,
)

EXPECTED = json.loads((ROOT / "tests/fixtures/metric_expected.json").read_text())


@pytest.fixture(scope="module")
def recorded():
    with np.load(ROOT / "tests/fixtures/metric_features.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def test_recorded_figures(recorded):
    found = manifolds(recorded["real"], recorded["fake"])
    assert (found.precision, found.recall) == (EXPECTED["precision_adm_k3"], EXPECTED["recall_adm_k3"])
    kid = squared_mmd(recorded["real"][:200], recorded["fake"][:200])
    assert kid == pytest.approx(EXPECTED["kid_unbiased_poly3_first200"], abs=1e-9)
    for split in (200, 50):
        found = adm_inception_score(recorded["probs"], split)
        assert found == pytest.approx(EXPECTED[f"is_split_{split}"], abs=1e-6)


def test_manifolds_are_those_of_loops(recorded):
    real, fake = recorded["real"][:40].double().numpy(), recorded["fake"][:30].double().numpy()

    def radii(points, k):
        return [sorted(((p - q) ** 2).sum() for q in points)[k] for p in points]

    def holds(centre, radius, point):
        return ((centre - point) ** 2).sum() <= radius

    r3, r2, g3 = radii(real, 3), radii(real, 2), radii(fake, 3)
    inside = np.array([[holds(c, r, g) for c, r in zip(real, r2, strict=True)] for g in fake])
    found = manifolds(recorded["real"][:40], recorded["fake"][:30], density_neighbours=2, block=7)
    assert found.precision == np.mean([any(holds(c, r, g) for c, r in zip(real, r3, strict=True)) for g in fake])
    assert found.recall == np.mean([any(holds(c, r, x) for c, r in zip(fake, g3, strict=True)) for x in real])
    assert found.density == pytest.approx(inside.sum() / (2 * 30))
    assert found.coverage == pytest.approx(inside.any(axis=0).mean())


def test_a_set_lies_in_its_own_manifold(recorded):
    found = manifolds(recorded["real"], recorded["real"])
    assert found.precision == found.recall == found.coverage == 1
    far = manifolds(recorded["real"], recorded["fake"] + 1e4)
    assert tuple(far) == (0, 0, 0, 0)


def test_the_mmd_is_that_of_loops_and_about_zero_for_two_halves(recorded):
    x, y = recorded["real"][:6].double().numpy(), recorded["fake"][:5].double().numpy()

    def kernel(a, b):
        return (a @ b / len(a) + 1) ** 3

    within_x = np.mean([kernel(x[i], x[j]) for i, j in product(range(6), repeat=2) if i != j])
    within_y = np.mean([kernel(y[i], y[j]) for i, j in product(range(5), repeat=2) if i != j])
    across = np.mean([kernel(a, b) for a, b in product(x, y)])
    found = squared_mmd(recorded["real"][:6], recorded["fake"][:5])
    assert found == pytest.approx(within_x + within_y - 2 * across, rel=1e-10)
    halves = kernel_distance(recorded["real"][::2], recorded["real"][1::2], subsets=50, size=60)
    apart = kernel_distance(recorded["real"], recorded["fake"], subsets=50, size=60)
    assert abs(halves.mean) < 3 * halves.std and abs(halves.mean) < apart.mean / 3


def test_inception_score_of_certain_and_of_useless_classifiers():
    certain = torch.eye(8).repeat(20, 1)
    assert inception_score(certain, splits=1) == pytest.approx((8, 0))
    assert adm_inception_score(certain, 8) == pytest.approx(8)
    blocks = torch.eye(8).repeat_interleave(20, dim=0)
    assert adm_inception_score(blocks, 20) == pytest.approx(1)
    assert inception_score(blocks, splits=2).mean > 7
    assert inception_score(torch.full((40, 8), 1 / 8)).mean == pytest.approx(1)


def test_too_few_images_are_an_error(recorded):
    real, fake = recorded["real"], recorded["fake"]
    with pytest.raises(ValueError, match="subsets of 1000 need as many features; there are 240 and 200"):
        kernel_distance(real, fake)
    with pytest.raises(ValueError, match="10 splits need as many images; there are 9"):
        inception_score(recorded["probs"][:9])
    with pytest.raises(ValueError, match="5 neighbours need more features; there are 240 and 5"):
        manifolds(real, fake[:5])
    with pytest.raises(ValueError, match=r"\[240, 24\] and \[200, 3\]"):
        squared_mmd(real, fake[:, :3])
