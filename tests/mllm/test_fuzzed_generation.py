"""Forty of the fuzzer's thousand generations: random settings, all of which parse and decode."""

import random
from pathlib import Path

from tests.fuzz_generation import Generations


def test_generations_of_random_settings_parse_and_decode(tmp_path: Path) -> None:
    surface = Generations(tmp_path)
    for number in range(40):
        what = surface.damage(random.Random(f"generations {number}"), tmp_path)
        try:
            surface.use(tmp_path)
        except Exception as error:
            raise AssertionError(f"number {number}: {what}") from error
    assert len(surface.hosts) == 5
