"""Whether measured figures agree with a paper's direction, by one rule.

The interval of a figure over seeds reaches from one spread below the smallest value to one spread above the largest
(the spread is the largest minus the smallest), and covers the bootstrap interval over images of every seed. A claim is
agreed with if the intervals of its two cells are apart in its direction, disagreed with if they are apart in the other,
and undecided if they overlap. Two equal cells with two seeds each, of normal errors, come out apart in a given
direction by chance in about 3 of 100 cases (a test computes it).
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

Verdict = Literal["agreed", "disagreed", "undecided", "not run yet"]
LEAST_SEEDS = 2


class Figure(NamedTuple):
    """A figure of one seed; `low` and `high` are its interval over images, None if it is no mean over images."""

    value: float
    low: float | None = None
    high: float | None = None


class Spread(NamedTuple):
    """A figure over seeds: the value of each, and its interval, None with a single seed."""

    values: tuple[float, ...]
    low: float | None
    high: float | None

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)


def over_seeds(figures: Sequence[Figure]) -> Spread:
    """Return the figure over its seeds, at least one."""
    values = tuple(figure.value for figure in figures)
    if len(values) < LEAST_SEEDS:
        return Spread(values, None, None)
    spread = max(values) - min(values)
    lows = [figure.low for figure in figures if figure.low is not None]
    highs = [figure.high for figure in figures if figure.high is not None]
    return Spread(values, min(min(values) - spread, *lows, min(values)), max(max(values) + spread, *highs, max(values)))


def verdict(higher: Spread | None, lower: Spread | float | None) -> Verdict:
    """Return whether `higher` is above `lower`; None is a figure that was not measured."""
    if higher is None or lower is None:
        return "not run yet"
    if not isinstance(lower, Spread):
        lower = Spread((lower,), lower, lower)
    if higher.low is None or higher.high is None or lower.low is None or lower.high is None:
        return "undecided"
    if higher.low > lower.high:
        return "agreed"
    return "disagreed" if higher.high < lower.low else "undecided"
