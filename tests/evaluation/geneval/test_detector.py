"""The detector's steps, on planted logits whose boxes and scores are known, and on a tiny random Mask2Former."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.evaluation.tiny_scorers import tiny_mask2former
from unimm.errors import UserError
from unimm.evaluation.geneval import detector as detector_module
from unimm.evaluation.geneval.detector import (
    Geometry,
    InstanceDetector,
    box_of,
    check_classes,
    load_detector,
    prepare,
    segments_of,
)
from unimm.evaluation.geneval.rules import COCO_CLASSES

CPU = {"device": torch.device("cpu"), "dtype": torch.float32}
HIGH = 8.0  # a logit whose probability is 0.99966


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network at 64 pixels instead of 800: what is tested does not depend on it."""
    monkeypatch.setattr(detector_module, "SHORT_SIDE", 64)
    monkeypatch.setattr(detector_module, "LONG_SIDE", 107)


def planted(
    rectangles: dict[int, tuple[int, int, int, int]], classes: dict[int, list[tuple[int, float]]], geometry: Geometry
) -> tuple[torch.Tensor, torch.Tensor]:
    """Class logits [10, 81] and mask logits over the padded input at a quarter of its size: query q shows a rectangle
    (x1, y1, x2, y2 in quarter pixels) and gives each of its labels a probability."""
    class_logits = torch.full((10, 81), -1e9)
    class_logits[:, 80] = 0.0
    for query, labels in classes.items():
        rest = 1 - sum(probability for _, probability in labels)
        class_logits[query, 80] = float(np.log(rest)) if rest > 0 else -1e9
        for label, probability in labels:
            class_logits[query, label] = float(np.log(probability))
    height, width = (side // 4 for side in geometry.padded)
    masks = torch.full((10, height, width), -HIGH)
    for query, (x1, y1, x2, y2) in rectangles.items():
        masks[query, y1:y2, x1:x2] = HIGH
    return class_logits, masks


# ---- geometry ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "resized", "padded"),
    [
        ((512, 512), (800, 800), (800, 800)),
        ((1024, 1024), (800, 800), (800, 800)),
        ((256, 512), (667, 1333), (672, 1344)),  # the long side binds: 1333 / 512 = 2.6035
        ((300, 400), (800, 1067), (800, 1088)),
    ],
)
def test_sizes_are_those_of_the_official_detector(
    size: tuple[int, int], resized: tuple[int, int], padded: tuple[int, int]
) -> None:
    assert Geometry.of(*size) == (size, resized, padded)


def test_padding_is_zero_and_on_the_right_and_below() -> None:
    geometry = Geometry((40, 50), (40, 50), (64, 64))
    image = Image.new("RGB", (50, 40), (255, 0, 0))
    prepared = prepare([image], geometry)[0]
    assert prepared.shape == (3, 64, 64)
    red = (255 - 123.675) / 58.395
    assert torch.allclose(prepared[0, :40, :50], torch.tensor(red))
    assert torch.allclose(prepared[1, :40, :50], torch.tensor(-116.28 / 57.12))
    assert (prepared[:, 40:] == 0).all() and (prepared[:, :, 50:] == 0).all()


def test_resizing_is_bilinear_without_antialiasing() -> None:
    """Halving an image of stripes one pixel wide: each output pixel is the mean of the two in its middle."""
    stripes = np.zeros((4, 8, 3), np.uint8)
    stripes[:, 1::2] = 201
    prepared = prepare([Image.fromarray(stripes)], Geometry((4, 8), (2, 4), (2, 4)))[0, 0]
    assert torch.allclose(prepared * 58.395 + 123.675, torch.tensor(100.0), atol=1e-3)  # 100.5 rounds to even


# ---- planted answers -----------------------------------------------------------------------------------------------


def test_a_planted_rectangle_comes_out_with_its_box_and_score() -> None:
    """200 x 300 pixels, shown to the network at 200 x 300 of 224 x 320: one logit stands for four pixels a side."""
    geometry = Geometry((200, 300), (200, 300), (224, 320))
    logits = planted({3: (10, 5, 40, 30)}, {3: [(16, 0.9)]}, geometry)
    (found,) = segments_of(*logits, geometry, min_score=0.05)
    assert (found.label, COCO_CLASSES[found.label]) == (16, "dog")
    assert found.box == (40.0, 20.0, 160.0, 120.0)  # 4 * (10, 5, 40, 30): the last pixel is 159, the box ends at 160
    assert found.mask.shape == (200, 300)
    inside = np.zeros((200, 300), bool)
    inside[20:120, 40:160] = True
    assert (found.mask != inside).sum() == 4  # a bilinear rectangle has lost its corners
    # class probability times mask quality, the mean of sigmoid(logit) over the mask, by an independent float64 sum
    logits_64 = logits[1][3][None, None].double()
    big = torch.nn.functional.interpolate(logits_64, (224, 320), mode="bilinear")[0, 0, :200, :300]
    quality = torch.sigmoid(big)[big > 0].mean()
    assert found.score == pytest.approx(0.9 * float(quality), abs=1e-6)


def test_what_reaches_into_the_padding_is_cut_off() -> None:
    geometry = Geometry((100, 150), (200, 300), (224, 320))  # twice the size, then padding
    (found,) = segments_of(*planted({0: (60, 40, 80, 56)}, {0: [(2, 0.8)]}, geometry), geometry, min_score=0.05)
    assert found.box == (120.0, 80.0, 150.0, 100.0)


def test_one_query_may_stand_under_two_labels() -> None:
    geometry = Geometry((64, 64), (64, 64), (64, 64))
    logits = planted({1: (2, 2, 8, 8)}, {1: [(16, 0.6), (15, 0.35)]}, geometry)
    found = segments_of(*logits, geometry, min_score=0.05)
    assert [each.label for each in found] == [16, 15]
    assert found[0].box == found[1].box
    assert found[0].score / found[1].score == pytest.approx(0.6 / 0.35)


def test_only_the_hundred_best_pairs_are_looked_at() -> None:
    geometry = Geometry((32, 32), (32, 32), (32, 32))
    labels = {query: [(label, 0.0124 - label * 1e-5) for label in range(80)] for query in range(2)}
    boxes = {0: (0, 0, 4, 4), 1: (4, 4, 8, 8)}
    found = segments_of(*planted(boxes, labels, geometry), geometry, min_score=0.0)
    assert len(found) == 100
    assert {each.label for each in found} == set(range(50))  # 50 labels of each of the two queries


@pytest.mark.parametrize(("min_score", "count"), [(0.29, 1), (0.31, 0)])
def test_the_lowest_score_is_that_of_class_and_mask_together(min_score: float, count: int) -> None:
    """0.6 for the class, and a mask whose every logit is 0: sigmoid 0.5 just above nothing."""
    geometry = Geometry((32, 32), (32, 32), (32, 32))
    classes, masks = planted({0: (0, 0, 8, 8)}, {0: [(0, 0.6)]}, geometry)
    masks[0] = 1e-4
    assert len(segments_of(classes, masks, geometry, min_score)) == count


def test_an_empty_mask_is_no_object() -> None:
    geometry = Geometry((32, 32), (32, 32), (32, 32))
    assert segments_of(*planted({}, {0: [(0, 0.9)]}, geometry), geometry, min_score=0.0) == []
    assert box_of(torch.zeros(4, 5, dtype=torch.bool)) == (0.0, 0.0, 0.0, 0.0)
    one = torch.zeros(4, 5, dtype=torch.bool)
    one[2, 3] = True
    assert box_of(one) == (3.0, 2.0, 4.0, 3.0)


# ---- a tiny random network -----------------------------------------------------------------------------------------


def noise(width: int, height: int, seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.usefixtures("small")
def test_a_batch_gives_what_single_images_give() -> None:
    finder = InstanceDetector(tiny_mask2former(), "tiny", min_score=0.0, batch_size=2)
    images = [noise(48, 32, 0), noise(32, 32, 1), noise(48, 32, 2), noise(48, 32, 3)]
    together = finder.detect(images)
    for image, found in zip(images, together, strict=True):
        (alone,) = finder.detect([image])
        assert [each.label for each in alone[:5]] == [each.label for each in found[:5]]
        assert np.allclose([each.score for each in alone], [each.score for each in found], rtol=1e-4)
        assert found[0].mask.shape == (image.height, image.width)


class Planted:
    """In place of the network: the real one's output class with planted logits."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, model: Any, classes: torch.Tensor, masks: torch.Tensor) -> None:
        self.model, self.classes, self.masks = model, classes, masks
        self.config, self.state_dict = model.config, model.state_dict

    def __call__(self, pixel_values: torch.Tensor) -> Any:
        output = self.model(pixel_values=pixel_values)
        assert output.masks_queries_logits.shape[1:] == self.masks.shape
        assert output.class_queries_logits.shape[1:] == self.classes.shape
        output.class_queries_logits = self.classes.expand(len(pixel_values), -1, -1)
        output.masks_queries_logits = self.masks.expand(len(pixel_values), -1, -1, -1)
        return output


@pytest.mark.usefixtures("small")
def test_planted_logits_have_the_shapes_of_the_real_networks_output() -> None:
    geometry = Geometry.of(40, 60)
    assert geometry == ((40, 60), (64, 96), (64, 96))
    classes, masks = planted({2: (6, 4, 18, 12)}, {2: [(17, 0.95)]}, geometry)
    finder = InstanceDetector(Planted(tiny_mask2former(), classes, masks), "planted")
    (found,) = finder.detect([noise(60, 40, 0)])
    ((label, box, score, _),) = found
    assert label == 17
    assert box == pytest.approx((15, 10, 45, 30), abs=1)  # 24, 16, 72, 48 at 96 x 64, times 40 / 64
    assert 0.9 < score < 0.95


@pytest.mark.usefixtures("small")
def test_scores_that_are_not_finite_are_refused() -> None:
    geometry = Geometry.of(32, 32)
    classes, masks = planted({0: (0, 0, 8, 8)}, {0: [(0, 0.9)]}, geometry)
    masks[3, 2, 2] = float("nan")
    finder = InstanceDetector(Planted(tiny_mask2former(), classes, masks), "broken")
    with pytest.raises(UserError, match="broken gave scores that are not finite on cpu in torch.float32"):
        finder.detect([noise(32, 32, 0)])


# ---- loading -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("detector") / "mask2former"
    tiny_mask2former().save_pretrained(path)
    return path


@pytest.mark.usefixtures("small")
def test_a_folder_is_loaded_and_says_what_it_is(folder: Path) -> None:
    finder = load_detector(folder, min_score=0.0, **CPU)
    described = finder.describe()
    assert described == {"name": "mask2former", "sha256": finder.fingerprint, "dtype": "float32", "device": "cpu"}
    assert finder.fingerprint != InstanceDetector(tiny_mask2former(seed=1), "other").fingerprint
    assert len(finder.detect([noise(32, 32, 0)])[0]) == 100
    half = load_detector(folder, device=torch.device("cpu"), dtype=torch.bfloat16)
    assert half.describe()["dtype"] == "bfloat16"


def test_weights_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--detector is not given, and nothing is fetched unasked. Get facebook/mask2f"):
        load_detector(None, **CPU)
    with pytest.raises(UserError, match="holds no checkpoint: it has no config.json. Get facebook/mask2former-swin-sm"):
        load_detector(tmp_path, **CPU)


def test_a_checkpoint_with_holes_is_refused(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights.pop("class_predictor.weight")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="missing 1 .class_predictor.weight"):
        load_detector(tmp_path, **CPU)


def test_other_classes_are_refused(tmp_path: Path) -> None:
    tiny_mask2former(num_labels=133).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="knows 133 classes, COCO's instances are 80"):
        load_detector(tmp_path, **CPU)
    names = dict(enumerate(COCO_CLASSES))
    check_classes(names, tmp_path)
    check_classes(names | {64: "mouse", 65: "remote", 66: "keyboard", 0: "LABEL_0"}, tmp_path)
    with pytest.raises(UserError, match="calls class 16 'cat', in COCO's order it is 'dog'"):
        check_classes(names | {16: "cat"}, tmp_path)
