"""Tables of findings, read from YAML: the cells to train and measure, and the papers' claims about them.

A table is one file of `configs/findings/tables`. Its cells differ in a few settings of the same legs; a leg is one run
of a recipe. In a leg's settings `{name}` stands for the folder of an earlier leg, `{cell}` for the cell's own.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from unimm.config.loading import load_config
from unimm.config.schema import Count, Natural, NonNegative
from unimm.errors import UserError

MEASURED = "tokenizer"
"""The leg whose output is measured."""


@dataclass
class Leg:
    """One run of a recipe.

    Args:
        recipe: its name, or "default_encoder", which saves the vision encoder of the model shipped with the library.
        config: its YAML file, relative to the table's.
        set: dotted settings that override the file's.
    """

    recipe: Literal["vfm", "tokenizer", "c2i", "t2i", "default_encoder"]
    config: str = ""
    set: dict[str, Any] = field(default_factory=dict)


@dataclass
class Cell:
    """One row of a table.

    Args:
        label: what the row is, for people.
        paper: the corresponding row of the paper, as printed there.
        set: {leg: {dotted setting: value}}, over those of the table's legs.
        legs: legs of its own in place of the table's.
    """

    label: str
    paper: str = ""
    set: dict[str, dict[str, Any]] = field(default_factory=dict)
    legs: dict[str, Leg] = field(default_factory=dict)


@dataclass
class Claim:
    """A direction that a paper reports: one cell's figure is higher than another's, or than a number.

    Args:
        text: the claim in words.
        paper: the paper's numbers and their place.
        figure: name of the figure.
        higher, lower: cells; `lower` may be a number.
    """

    text: str
    paper: str
    figure: str
    higher: str
    lower: str | float


@dataclass
class Probe:
    """The linear probe of a table: labeled sources ("shapes" or parquet files) and their sizes."""

    source: str
    test_source: str
    num_train: Count = 4000
    num_test: Count = 2000
    epochs: Count = 30


@dataclass
class Measures:
    """What is measured of every cell.

    Args:
        source: images that are reconstructed.
        num_images: their number.
        distance: whether the Fréchet distance in EfficientNet-Lite0's features is measured, also that of as many images
            drawn by the output of a leg `c2i`.
        probe: linear probes of the features and of the codes.
        questions: of each kind, to the default model with the cell's vision tower, and to the output of a leg `chat`.
        shown: images for the panel, if others than those of `source` may be published.
        maps: whether K-means maps of features and codes are saved.
    """

    source: str
    num_images: Count = 1000
    distance: bool = False
    probe: Probe | None = None
    questions: Natural = 0
    shown: str | None = None
    maps: bool = False


@dataclass
class Table:
    """A table of findings.

    Args:
        title, paper: its heading, and the paper's table that it repeats.
        figures: the columns, in order.
        measures: what is measured.
        shared: legs that every cell and seed uses, and other tables with a leg of the same name.
        legs: the legs of a cell, in order; one is named "tokenizer".
        minutes: what a cell and seed takes on one quiet core.
        note: what a reader must know of the setting.
    """

    title: str
    paper: str
    figures: list[str]
    measures: Measures
    legs: dict[str, Leg]
    cells: dict[str, Cell]
    minutes: NonNegative
    shared: dict[str, Leg] = field(default_factory=dict)
    claims: list[Claim] = field(default_factory=list)
    note: str = ""

    def __post_init__(self) -> None:
        for name in self.cells:
            if MEASURED not in self.legs_of(name):
                raise UserError(f"The cell {name} has no leg {MEASURED!r}, which is what is measured.")
        for claim in self.claims:
            if claim.figure not in self.figures:
                raise UserError(f"The claim {claim.text!r} is about {claim.figure}, which is none of the figures.")
            for cell in (claim.higher, claim.lower):
                if isinstance(cell, str) and cell not in self.cells:
                    raise UserError(f"The claim {claim.text!r} names the cell {cell}, which is not in the table.")

    def legs_of(self, name: str) -> dict[str, Leg]:
        """Return the legs of a cell with all its settings. Raises UserError for settings of a leg that it lacks."""
        cell = self.cells[name]
        legs = cell.legs or self.legs
        if unknown := sorted(cell.set.keys() - legs.keys()):
            raise UserError(f"The cell {name} sets {unknown[0]!r}, which is none of its legs {', '.join(legs)}.")
        return {leg: Leg(each.recipe, each.config, each.set | cell.set.get(leg, {})) for leg, each in legs.items()}


def load_tables(folder: Path) -> dict[str, Table]:
    """Read the tables of a folder by name. Raises UserError if there is none, or one is not valid."""
    paths = sorted(folder.glob("*.yaml"))
    if not paths:
        raise UserError(f"There is no table in {folder}.")
    return {path.stem: load_config(Table, path) for path in paths}
