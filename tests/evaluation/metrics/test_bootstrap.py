"""Intervals against closed forms, scipy, brute force, and simulated clustered data whose truth is known."""

import numpy as np
import pytest
from scipy import stats

from unimm.evaluation.metrics.bootstrap import bootstrap, bootstrap_mean, paired_bootstrap


def clustered_bernoulli(
    rng: np.random.Generator, clusters: int, each: int, mean: float = 0.6, alike: float = 0.7
) -> tuple[np.ndarray, list[int]]:
    """Answers whose clusters agree: a beta-binomial with intra-cluster correlation `alike`."""
    scale = (1 - alike) / alike
    chance = rng.beta(mean * scale, (1 - mean) * scale, size=clusters)
    values = rng.random((clusters, each)) < chance[:, None]
    return values.ravel().astype(float), np.repeat(np.arange(clusters), each).tolist()


def test_coverage_on_clustered_data_where_the_naive_interval_is_too_narrow() -> None:
    rng = np.random.default_rng(0)
    trials, hits, naive_hits = 300, 0, 0
    for trial in range(trials):
        values, clusters = clustered_bernoulli(rng, clusters=80, each=4)
        ours = bootstrap_mean(values, clusters, resamples=300, seed=trial)
        naive = bootstrap_mean(values, range(len(values)), resamples=300, seed=trial)
        assert ours.low is not None and ours.high is not None and naive.low is not None and naive.high is not None
        hits += ours.low <= 0.6 <= ours.high
        naive_hits += naive.low <= 0.6 <= naive.high
    assert 0.92 <= hits / trials <= 0.98  # nominal 0.95, standard error 0.013
    assert naive_hits / trials < 0.85  # the design effect is 1 + 3 * 0.7: 1.96 / sqrt(3.1) sigmas cover 0.73


def test_difference_of_two_equal_models_is_covered_and_its_p_is_uniform() -> None:
    rng = np.random.default_rng(1)
    trials, found = 300, []
    for trial in range(trials):
        a, clusters = clustered_bernoulli(rng, clusters=60, each=4)
        b, _ = clustered_bernoulli(rng, clusters=60, each=4)
        difference = paired_bootstrap(a, b, clusters, resamples=400, seed=trial)
        assert difference.p is not None
        found.append(difference.p)
    assert 0.02 <= np.mean(np.array(found) < 0.05) <= 0.09
    assert stats.kstest(found, "uniform").pvalue > 0.001


def test_pairing_sees_what_two_separate_intervals_do_not() -> None:
    rng = np.random.default_rng(2)
    a = rng.normal(30, 5, size=200)  # PSNR of 200 images, hard and easy ones
    b = a + rng.normal(0.2, 0.3, size=200)
    difference = paired_bootstrap(a, b, range(200))
    assert difference.value == pytest.approx((b - a).mean())
    assert difference.low is not None and difference.low > 0 and difference.p is not None and difference.p < 0.01
    first, second = bootstrap_mean(a, range(200)), bootstrap_mean(b, range(200))
    assert first.high is not None and second.low is not None and second.low < first.high


def test_singletons_agree_with_scipy() -> None:
    values = np.random.default_rng(3).gamma(2, size=150)
    ours = bootstrap_mean(values, range(150), resamples=20_000)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=4).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.01)
    assert ours.value == pytest.approx(values.mean()) and ours.clusters == 150


def test_geneval_overall_is_the_mean_of_the_tags_and_resamples_within_them() -> None:
    rng = np.random.default_rng(5)
    sizes, values, clusters, tags = {"counting": 80, "colors": 20}, list[float](), list[str](), list[str]()
    for tag, size in sizes.items():
        found, index = clustered_bernoulli(rng, size, 4, mean=0.3 if tag == "counting" else 0.8)
        values += found.tolist()
        clusters += [f"{tag} {number}" for number in index]
        tags += [tag] * len(found)
    ours = bootstrap_mean(values, clusters, tags)
    means = {tag: np.array(values)[[t == tag for t in tags]].reshape(-1, 4).mean(axis=1) for tag in sizes}
    assert ours.value == pytest.approx(np.mean([m.mean() for m in means.values()]))
    assert ours.value != pytest.approx(np.mean(values), abs=0.05)
    # Closed form: half the means, each with the variance of the mean of its own prompts.
    sigma = 0.5 * np.sqrt(sum(m.var() / len(m) for m in means.values()))
    assert ours.low is not None and ours.high is not None
    assert (ours.high - ours.low) / 2 == pytest.approx(1.96 * sigma, rel=0.07)
    # Two tags of constant scores: nothing varies within them, whatever is drawn.
    steady = bootstrap_mean([1, 1, 0, 0, 0], range(5), ["a", "a", "b", "b", "b"])
    assert steady[:3] == (0.5, 0.5, 0.5)


def test_clusters_of_unequal_size_count_by_their_samples() -> None:
    values, clusters = [1, 1, 1, 1, 0, 0], ["a", "a", "a", "a", "b", "c"]
    ours = bootstrap_mean(values, clusters, resamples=4000)
    assert ours.value == pytest.approx(4 / 6)
    # Brute force: all 27 ordered draws of three clusters.
    sums, counts = {"a": 4, "b": 0, "c": 0}, {"a": 4, "b": 1, "c": 1}
    draws = [(x, y, z) for x in "abc" for y in "abc" for z in "abc"]
    exact = sorted({round(sum(sums[c] for c in d) / sum(counts[c] for c in d), 9) for d in draws})
    seen: set[float] = set()

    def remember(weights: np.ndarray) -> np.ndarray:
        drawn = (weights @ np.array(values, dtype=float)) / weights.sum(axis=1)
        seen.update(np.round(drawn, 9).tolist())
        return drawn

    bootstrap(remember, clusters, resamples=4000)
    assert sorted(seen) == exact


def test_any_function_of_the_weights() -> None:
    rng = np.random.default_rng(6)
    expected, said = rng.random(300) < 0.5, rng.random(300) < 0.5
    images = np.repeat(np.arange(50), 6).tolist()

    def f1(weights: np.ndarray) -> np.ndarray:
        return 2 * (weights @ (expected & said)) / (weights @ expected.astype(float) + weights @ said.astype(float))

    ours = bootstrap(f1, images)
    assert ours.value == pytest.approx(2 * (expected & said).sum() / (expected.sum() + said.sum()))
    assert ours.low is not None and ours.high is not None and ours.low < ours.value < ours.high
    assert ours.clusters == 50


def test_the_same_in_pieces_and_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    values, clusters = clustered_bernoulli(np.random.default_rng(7), 30, 4)
    whole = bootstrap_mean(values, clusters)
    assert bootstrap_mean(values, clusters) == whole
    assert bootstrap_mean(values, clusters, seed=1) != whole
    monkeypatch.setattr("unimm.evaluation.metrics.bootstrap.WEIGHTS_AT_ONCE", 7 * len(values))
    assert bootstrap_mean(values, clusters) == whole


def test_what_cannot_be_resampled_has_no_interval() -> None:
    assert bootstrap_mean([0, 1], ["a", "a"]) == (0.5, None, None, 1)
    assert bootstrap_mean([0, 1, 1], ["a", "b", "c"], ["s", "s", "t"]) == (0.75, None, None, 3)
    assert paired_bootstrap([0, 1], [1, 1], ["a", "a"]) == (0.5, None, None, 1, None)
    with pytest.raises(ValueError, match="no samples"):
        bootstrap_mean([], [])
    with pytest.raises(ValueError, match="'a' lies in two strata, 's' and 't'"):
        bootstrap_mean([0, 1, 1], ["a", "a", "b"], ["s", "t", "s"])
    with pytest.raises(ValueError, match="sample by sample"):
        paired_bootstrap([0, 1], [1, 1, 1], ["a", "b"])
    with pytest.raises(ValueError, match="3 values come with 2 strata"):
        bootstrap_mean([0, 1, 1], ["a", "b", "c"], ["s", "t"])
