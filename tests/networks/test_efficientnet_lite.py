"""EfficientNet-Lite0 against numbers of the package efficientnet-lite-pytorch 0.1.0, whose forward it repeats."""

from pathlib import Path

import numpy as np
import pytest
import torch

from unimm.errors import UserError
from unimm.evaluation.generation.feature_spaces import load_space
from unimm.networks.efficientnet_lite import EfficientNetLite0, load_efficientnet_lite0


def closed_form_weights() -> dict[str, torch.Tensor]:
    """Return weights by formula, of about unit gain, without a file."""
    state = EfficientNetLite0().state_dict()
    for k, (name, tensor) in enumerate(state.items()):
        if name.endswith("num_batches_tracked"):
            continue
        value = torch.sin(torch.arange(tensor.numel(), dtype=torch.float64) * 0.7 + k).reshape(tensor.shape)
        if name.endswith("running_var") or (name.endswith("weight") and tensor.ndim == 1):
            value = 1 + 0.5 * value
        else:
            value = value * (2 / tensor[0].numel()) ** 0.5 if tensor.ndim > 1 else 0.1 * value
        state[name] = value.float()
    return state


def test_logits_are_those_of_the_package() -> None:
    network = EfficientNetLite0()
    network.load_state_dict(closed_form_weights())
    pixel_values = torch.sin(torch.arange(3 * 224 * 224, dtype=torch.float64) * 0.37).reshape(1, 3, 224, 224).float()
    expected = [3.59379, -8.83363, 10.63144, -7.86629, 2.23527, 4.48637, -9.4147, 10.33498]
    logits = network(pixel_values)
    assert logits[0, :8].tolist() == pytest.approx(expected, abs=2e-3)
    assert float(logits.std()) == pytest.approx(7.48088, abs=2e-3)


def test_a_file_makes_a_feature_space(tmp_path: Path) -> None:
    torch.save(closed_form_weights(), tmp_path / "lite0.pth")
    space = load_space(None, None, "cpu", efficientnet=tmp_path / "lite0.pth")
    assert space is not None and space.name == "efficientnet_lite0"
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    found = space.features(images)["pool"]
    assert found.shape == (2, 1280) and not torch.equal(found[0], found[1])
    assert torch.allclose(space.features(images[1:])["pool"], found[1:], atol=1e-4)  # an image's own
    assert len(space.describe()["sha256"]) == 64


def test_another_file_is_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(2)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="295 of 296|296 of 296"):
        load_efficientnet_lite0(tmp_path / "other.pth")
    with pytest.raises(UserError, match="efficientnet-lite0-57934424.pth"):
        load_efficientnet_lite0(tmp_path / "none.pth")
