"""The shapes data set as map-style datasets: item n is a pure function of (seed, n), so runs resume at any position."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from unimm.data.shapes.conversations import describe
from unimm.data.shapes.world import render, sample_scene
from unimm.data.shuffling import Rows


class ShapesImages(Rows):
    """A data set of `length` scenes as `{"image": PIL, "text": description, "key": n}`; `allow_withheld` includes the
    withheld pairs."""

    sizes: Mapping[str, int] = {}  # endless: item n does not depend on a number of rows

    def __init__(self, length: int, seed: int, allow_withheld: bool = False) -> None:
        self.length = length
        self.seed = seed
        self.allow_withheld = allow_withheld

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        scene = sample_scene(np.random.default_rng((self.seed, index)), allow_withheld=self.allow_withheld)
        return {"image": render(scene), "text": describe(scene), "key": str(index)}
