"""Fréchet distances against figures recorded from ADM's evaluator and torch-fidelity, closed forms, numpy and scipy."""

import json

import numpy as np
import pytest
from scipy.linalg import sqrtm

from tests.conftest import ROOT
from unimm.errors import UserError
from unimm.evaluation.metrics.frechet import (
    FeatureStatistics,
    Moments,
    frechet_distance,
    moments_of,
    require_same_count,
)

EXPECTED = json.loads((ROOT / "tests/fixtures/metric_expected.json").read_text())


def adm_frechet_distance(x: Moments, y: Moments, epsilon: float = 1e-6) -> float:
    """The distance as ADM's evaluator writes it, with scipy's square root of a matrix that is not symmetric."""
    root = sqrtm(x.covariance @ y.covariance)
    if not np.isfinite(root).all():
        jitter = epsilon * np.eye(len(x.mean))
        root = sqrtm((x.covariance + jitter) @ (y.covariance + jitter))
    if np.iscomplexobj(root):
        if not np.allclose(np.diagonal(root).imag, 0, atol=1e-3):
            raise ValueError(f"Imaginary component {np.abs(root.imag).max()}")
        root = root.real
    apart = np.square(x.mean - y.mean).sum()
    return float(apart + np.trace(x.covariance) + np.trace(y.covariance) - 2 * np.trace(root))


@pytest.fixture(scope="module")
def recorded():
    with np.load(ROOT / "tests/fixtures/metric_features.npz") as file:
        return {name: file[name] for name in file.files}


@pytest.mark.parametrize("distance", [frechet_distance, adm_frechet_distance])
def test_recorded_figures(recorded, distance):
    found = distance(moments_of(recorded["real"]), moments_of(recorded["fake"]))
    assert found == pytest.approx(EXPECTED["fid_adm"], abs=1e-6)
    assert found == pytest.approx(EXPECTED["fid_torch_fidelity"], abs=1e-6)


def test_a_covariance_of_rank_one(recorded):
    flat, full = moments_of(recorded["rank1"]), moments_of(recorded["real"])
    expected = EXPECTED["fid_rank_deficient_symmetric_eig"]
    assert frechet_distance(full, flat) == pytest.approx(expected, abs=1e-6)
    assert frechet_distance(flat, full) == pytest.approx(expected, abs=1e-6)
    assert EXPECTED["fid_rank_deficient_official"].startswith("ValueError: Imaginary component")
    # Whether ADM's square root is real depends on the last bits of the product.
    as_adm = [Moments(x.mean(axis=0), np.cov(x, rowvar=False)) for x in (recorded["rank1"], recorded["real"])]
    try:
        found = adm_frechet_distance(*as_adm)
    except ValueError as error:
        assert "Imaginary component" in str(error)
    else:
        assert found == pytest.approx(expected, abs=1e-3)


def test_no_distance_to_itself(recorded):
    x = moments_of(recorded["real"])
    assert 0 <= frechet_distance(x, x) < 1e-9
    assert 0 <= frechet_distance(moments_of(recorded["rank1"]), moments_of(recorded["rank1"])) < 1e-6


def test_gaussians_that_commute_have_a_closed_form():
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    first, second, shift = rng.uniform(0.1, 3, 6), rng.uniform(0.1, 3, 6), rng.normal(size=6)
    x, y = (Moments(np.zeros(6), (basis * values) @ basis.T) for values in (first, second))
    shifted = Moments(shift, y.covariance)
    expected = (shift**2).sum() + ((np.sqrt(first) - np.sqrt(second)) ** 2).sum()
    assert frechet_distance(x, shifted) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(x, Moments(shift, x.covariance)) == pytest.approx((shift**2).sum(), rel=1e-10)


def test_streams_are_numpys_covariance_however_they_are_split(recorded):
    features = recorded["real"] + 1000  # far from 0, where sums of squares lose their digits
    parts = [FeatureStatistics(24) for _ in range(3)]
    for index, batch in enumerate(np.array_split(features, 7)):
        parts[index % 3].update(batch)
    whole = FeatureStatistics(24)
    for part in parts:
        whole.merge(part)
    whole.merge(FeatureStatistics(24))  # a process without images
    moments = whole.moments
    np.testing.assert_allclose(moments.mean, features.astype(np.float64).mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(moments.covariance, np.cov(features.astype(np.float64), rowvar=False), atol=1e-11)
    assert moments.count == 240
    assert frechet_distance(moments, moments_of(recorded["fake"] + 1000)) == pytest.approx(1.2525840, abs=1e-3)


def test_what_is_no_number_is_an_error(recorded):
    statistics = FeatureStatistics(24)
    with pytest.raises(ValueError, match="at least 2 features, not 0"):
        _ = statistics.moments
    with pytest.raises(ValueError, match=r"\[B, 24\], not \[3, 5\]"):
        statistics.update(np.zeros((3, 5)))
    with pytest.raises(ValueError, match="2 of 3 features are not finite"):
        statistics.update(np.array([[0.0] * 24, [np.nan] * 24, [np.inf] * 24]))
    with pytest.raises(ValueError, match="width 5 cannot join features of width 24"):
        statistics.merge(FeatureStatistics(5))
    real, fake = moments_of(recorded["real"]), moments_of(recorded["fake"])
    with pytest.raises(UserError, match="240 and 200 images"):
        require_same_count(real, fake)
    with pytest.raises(ValueError, match="widths 24 and 1 "):
        frechet_distance(real, Moments(np.zeros(1), np.eye(1)))
