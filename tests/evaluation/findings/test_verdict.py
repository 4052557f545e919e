"""The rule that decides whether a claim's direction holds."""

import numpy as np
import pytest

from unimm.evaluation.findings.verdict import Figure, Spread, over_seeds, verdict


def spread(*values: float) -> Spread:
    return over_seeds([Figure(value) for value in values])


@pytest.mark.parametrize(
    ("higher", "lower", "expected"),
    [
        (spread(5.0, 5.1), spread(4.0, 4.1), "agreed"),
        (spread(4.0, 4.1), spread(5.0, 5.1), "disagreed"),
        (spread(5.0, 5.4), spread(4.5, 4.7), "undecided"),  # 5.0 - 0.4 lies below 4.7 + 0.2
        (spread(5.0), spread(4.0, 4.1), "undecided"),  # one seed has no interval
        (spread(5.0, 5.1), 4.0, "agreed"),
        (spread(5.0, 5.1), 5.05, "undecided"),
        (None, spread(4.0, 4.1), "not run yet"),
        (spread(4.0, 4.1), None, "not run yet"),
        (spread(1.0, 1.0), 1.0, "undecided"),
    ],
)
def test_intervals_apart_decide(higher: Spread | None, lower: Spread | float | None, expected: str) -> None:
    assert verdict(higher, lower) == expected


def test_an_interval_covers_the_seeds_and_their_intervals_over_images() -> None:
    assert over_seeds([Figure(2.0), Figure(3.0)]) == ((2.0, 3.0), 1.0, 4.0)
    assert over_seeds([Figure(2.0, 0.5, 2.5), Figure(3.0, 2.5, 3.5)]) == ((2.0, 3.0), 0.5, 4.0)
    assert over_seeds([Figure(2.0, 1.9, 2.1)]) == ((2.0,), None, None)
    assert over_seeds([Figure(2.0), Figure(3.0)]).mean == 2.5


def test_equal_cells_are_told_apart_by_chance_in_three_of_a_hundred_cases() -> None:
    drawn = np.random.default_rng(0).normal(size=(20_000, 2, 2))
    found = [verdict(*(spread(*cell) for cell in pair)) for pair in drawn.tolist()]
    assert found.count("agreed") / len(found) == pytest.approx(0.032, abs=0.005)
    assert found.count("disagreed") / len(found) == pytest.approx(0.032, abs=0.005)
