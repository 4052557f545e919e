"""What is measured of a cell, on tokenizers whose figures are known."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import beta

from unimm.evaluation.findings import measure
from unimm.evaluation.findings.measure import MAP_COLORS, kmeans_maps


class Halves:
    """A tokenizer of 2 x 4 tokens whose features tell left from right, and whose codes tell the images apart."""

    config = SimpleNamespace(patch_grid=(2, 4), grid=(2, 4))

    def encode(self, pixel_values: torch.Tensor) -> Any:
        columns = torch.tensor([0.0, 0.0, 1.0, 1.0]).repeat(len(pixel_values), 2)[..., None]
        return SimpleNamespace(features=columns, ids=torch.arange(len(pixel_values))[:, None].expand(-1, 8))

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        return ids[..., None].float()


def test_maps_color_the_clusters_of_features_and_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "MAP_CLUSTERS", 2)
    processor = lambda images, return_tensors: SimpleNamespace(pixel_values=torch.zeros(len(images), 3, 8, 8))  # noqa: E731
    maps = kmeans_maps(Halves(), processor, np.zeros((2, 8, 8, 3), np.uint8))  # type: ignore[arg-type]
    tile = measure.MAP_TILE
    assert maps.shape == (3 * tile, 2 * tile, 3) and not maps[:tile].any()
    features, codes = maps[tile : 2 * tile], maps[2 * tile :]
    first, second = features[0, 0], features[0, tile - 1]
    assert sorted([first.tolist(), second.tolist()]) == sorted(MAP_COLORS[:2].tolist())
    half = np.broadcast_to(first, (tile, tile // 2, 3)), np.broadcast_to(second, (tile, tile // 2, 3))
    assert np.array_equal(features, np.concatenate(half * 2, axis=1))
    assert (codes[:, :tile] == codes[0, 0]).all() and (codes[:, tile:] == codes[0, tile]).all()
    assert codes[0, 0].tolist() != codes[0, tile].tolist()


def test_the_interval_of_a_probe_is_wilsons() -> None:
    """Wilson's closed form, and close to Clopper and Pearson's at 1500 of 2000."""
    right, count, z = 1500, 2000, 1.959963984540054
    share = right / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * (share * (1 - share) / count + z * z / (4 * count**2)) ** 0.5
    assert measure._share(right, count) == pytest.approx((share, middle - half, middle + half))
    assert middle - half == pytest.approx(beta.ppf(0.025, right, count - right + 1), abs=1e-3)
