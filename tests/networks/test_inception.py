"""FID's Inception: the published names and shapes, arithmetic against plain loops; tests/integrations holds it against
torch-fidelity's own."""

import numpy as np
import pytest
import torch
from torch import nn

from tests.evaluation.random_inception import random_inception
from unimm.errors import UserError
from unimm.evaluation.generation.feature_spaces import InceptionSpace
from unimm.networks import inception
from unimm.networks.inception import FidInception, Mixed, load_inception, tensorflow1_resize

# name, shape and place of tensors of pt_inception-2015-12-05-6726825d.pth
PUBLISHED = {
    "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3),
    "Conv2d_4a_3x3.bn.running_mean": (192,),
    "Mixed_5b.branch_pool.conv.weight": (32, 192, 1, 1),
    "Mixed_5d.branch5x5_2.conv.weight": (64, 48, 5, 5),
    "Mixed_6a.branch3x3.conv.weight": (384, 288, 3, 3),
    "Mixed_6b.branch7x7_2.conv.weight": (128, 128, 1, 7),
    "Mixed_6c.branch7x7dbl_5.conv.weight": (192, 160, 1, 7),
    "Mixed_6e.branch7x7dbl_2.conv.weight": (192, 192, 7, 1),
    "Mixed_7a.branch7x7x3_4.conv.weight": (192, 192, 3, 3),
    "Mixed_7b.branch3x3_2b.conv.weight": (384, 384, 3, 1),
    "Mixed_7c.branch3x3dbl_3a.conv.weight": (384, 384, 1, 3),
    "Mixed_7c.branch1x1.conv.weight": (320, 2048, 1, 1),
    "fc.weight": (1008, 2048),
    "fc.bias": (1008,),
}


@pytest.fixture(scope="module")
def network() -> FidInception:
    return random_inception()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, 40, 52), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.fixture(scope="module")
def features(network, images):
    return network(images)


def test_names_and_shapes_are_the_published_ones(network):
    state = network.state_dict()
    assert {name: tuple(state[name].shape) for name in PUBLISHED} == PUBLISHED
    weights = [name for name in state if not name.endswith("num_batches_tracked")]
    assert len(weights) == 94 * 5 + 2  # 94 convolutions with batch norm, and the classifier
    # torchvision's inception_v3 without its auxiliary head has 23,834,568 for 1000 classes.
    assert sum(parameter.numel() for parameter in network.parameters()) == 23_834_568 + 8 * (2048 + 1)


def test_features(features):
    assert [tuple(each.shape) for each in features] == [(2, 2048), (2, 2023), (2, 1008)]
    torch.testing.assert_close(features.probabilities.sum(dim=1), torch.ones(2))
    assert all(each.isfinite().all() and each.std() > 0 for each in features)


def test_spatial_features_are_seven_channels_in_the_order_of_tensorflow(network, images):
    taken = []
    handle = network.Mixed_6d.branch1x1.register_forward_hook(lambda *call: taken.append(call[2]))
    found = network(images[:1]).spatial
    handle.remove()
    expected = torch.stack([taken[0][0, :7, y, x] for y in range(17) for x in range(17)]).flatten()
    assert torch.equal(found[0], expected)


def test_the_score_leaves_the_bias_out(network, images, features):
    expected = features.pool.double() @ network.fc.weight.double().T
    torch.testing.assert_close(features.probabilities.double(), expected.softmax(dim=1), atol=1e-6, rtol=1e-4)
    assert network.fc.bias.abs().max() > 0


def test_an_average_pool_does_not_count_its_padding():
    block = Mixed(2, [[("branch1x1", 1, 1)]], "average", 2)
    nn.init.dirac_(block.branch_pool.conv.weight)
    block.eval()
    ones = torch.ones(1, 2, 4, 4)
    torch.testing.assert_close(block(ones)[:, 1:], ones / (1 + 0.001) ** 0.5)


@pytest.mark.parametrize(("height", "width", "side"), [(5, 7, 12), (40, 9, 11), (6, 6, 6)])
def test_resizing_is_tensorflow_ones(height, width, side):
    x = torch.rand(1, 2, height, width, dtype=torch.float64)
    found = tensorflow1_resize(x, side)
    for i in range(side):
        for j in range(side):
            y, z = i * height / side, j * width / side
            top, left = int(y), int(z)
            rows, columns = (top, min(top + 1, height - 1)), (left, min(left + 1, width - 1))
            dy, dx = y - top, z - left
            corners = x[0][:, rows][:, :, columns]
            upper, lower = ((1 - dx) * corners[:, k, 0] + dx * corners[:, k, 1] for k in (0, 1))
            torch.testing.assert_close(found[0, :, i, j], (1 - dy) * upper + dy * lower)


def test_a_file_is_loaded_exactly_or_refused(network, images, features, tmp_path):
    state = network.state_dict()
    torch.save({name: v for name, v in state.items() if not name.endswith("num_batches_tracked")}, tmp_path / "pt.pth")
    assert torch.equal(load_inception(tmp_path / "pt.pth")(images).pool, features.pool)
    torch.save({name: v for name, v in state.items() if name != "fc.weight"}, tmp_path / "half.pth")
    with pytest.raises(UserError, match=r"1 of .* missing \(fc.weight\).*get pt_inception-2015-12-05-6726825d.pth"):
        load_inception(tmp_path / "half.pth")
    with pytest.raises(UserError, match="absent.pth holds none: get pt_inception.* set --inception"):
        load_inception(tmp_path / "absent.pth")


def test_the_space_takes_eight_bit_images(network, images, features):
    space = InceptionSpace(network, "0" * 64)
    found = space.features(np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy()))
    assert torch.equal(found["pool"], features.pool) and set(found) == {"pool", "spatial", "probabilities"}
    assert inception.GET_INCEPTION and space.describe()["layer"] == "pool3"
