"""CONTRIBUTING.md: the files that a change touches exist, are as many as the table says, and hold what it names."""

import re

import pytest

from tests.conftest import ROOT
from tests.docs.pages import read_page

PATH = r"`((?:unimm|recipes|configs|tests|docs|eval)/[\w./-]*)`"
CHANGES = {"chat template", "loss of the tokenizer", "recipe", "encoder, known family", "encoder, new family", "host"}
CHANGES |= {"tokenizer", "benchmark", "data source", "command", "sampler option", "endpoint of the server"}


def prices() -> dict[str, list[str]]:
    """Return {change: the other cells of its row}."""
    rows = re.findall(
        r"^\| ([^|]+) \| (\d) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", read_page("CONTRIBUTING.md"), flags=re.M
    )
    return {change: cells for change, *cells in rows}


def test_every_change_has_a_price() -> None:
    assert set(prices()) == CHANGES


@pytest.mark.parametrize("change", sorted(CHANGES))
def test_the_files_of_a_change_exist(change: str) -> None:
    count, touch, example, tests = prices()[change]
    touched = re.findall(PATH, touch)
    assert len(touched) == int(count)
    for path in [*touched, *re.findall(PATH, example), *re.findall(PATH, tests)]:
        assert (ROOT / path).exists(), path
    assert re.findall(PATH, tests)


@pytest.mark.parametrize("change", sorted(CHANGES))
def test_the_names_of_a_change_are_in_its_files(change: str) -> None:
    """Rows and examples that are named without a path stand in a file that the change touches."""
    _, touch, example, _ = prices()[change]
    files = [ROOT / path for path in re.findall(PATH, touch)]
    code = "".join(path.read_text(encoding="utf-8") for path in files if path.is_file())
    named = [name for cell in (touch, example) for name in re.findall(r"`([\w-]+)`", cell) if name != "NAME_weight"]
    assert [name for name in named if name not in code] == []


def test_a_loss_needs_no_second_file() -> None:
    """The sum goes over whatever `terms` returns, each term by its `..._weight`."""
    from torch import tensor

    from unimm.training.tokenizer.objective import ObjectiveConfig, PerceptualConfig, TokenizerObjective

    objective = TokenizerObjective(ObjectiveConfig(l1_weight=3.0, perceptual=PerceptualConfig(kind="none")))
    assert objective.total({"pixel": tensor(2.0), "l1": tensor(5.0)}) == 17.0
