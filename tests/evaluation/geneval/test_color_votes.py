"""Color voting: what CLIP is shown of an object, against pixels counted by hand, and a vote with a planted outcome."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from tests.evaluation.tiny_scorers import save_scorer, tiny_clip
from unimm.errors import UserError
from unimm.evaluation.geneval.color_votes import TEMPLATES, ColorVoter, load_color_voter, object_view, prepare_view
from unimm.evaluation.geneval.detector import Segment
from unimm.evaluation.geneval.rules import COLORS

VALUES = {"red": (200, 30, 30), "green": (30, 160, 30), "blue": (30, 30, 200)}


def segment(box: tuple[float, float, float, float], size: tuple[int, int]) -> Segment:
    mask = np.zeros(size[::-1], bool)
    x1, y1, x2, y2 = (int(side) for side in box)
    mask[y1:y2, x1:x2] = True
    return Segment(0, box, 1.0, mask)


# ---- the view ------------------------------------------------------------------------------------------------------


def test_the_rest_of_the_image_is_grey_and_the_box_is_cut_out() -> None:
    image = Image.new("RGB", (40, 30), VALUES["red"])
    cut = segment((10, 5, 30, 25), (40, 30))
    cut.mask[10:12, 10:30] = False  # a hole shows the background
    view = np.asarray(object_view(image, cut))
    assert view.shape == (20, 20, 3)
    assert (view[5:7] == 153).all()
    assert (np.delete(view, [5, 6], axis=0) == VALUES["red"]).all()
    whole = np.asarray(object_view(image, cut, crop=False))
    assert whole.shape == (30, 40, 3)
    assert (whole[:5] == 153).all() and (whole[7, 20] == VALUES["red"]).all()
    assert (np.asarray(object_view(image, cut, "original")) == VALUES["red"]).all()
    assert (np.asarray(object_view(image, cut, "#000"))[5] == 0).all()


def test_elongated_objects_lose_their_ends() -> None:
    """CLIP's centre crop: of a bar three times as wide as high only the middle third is seen."""
    view = Image.new("RGB", (96, 32), VALUES["red"])
    view.paste(VALUES["blue"], (32, 0, 64, 32))
    seen = prepare_view(view, 32)
    assert seen.shape == (3, 32, 32)
    blue = (torch.tensor(VALUES["blue"]) / 255 - torch.tensor((0.48145466, 0.4578275, 0.40821073))) / torch.tensor(
        (0.26862954, 0.26130258, 0.27577711)
    )
    assert torch.allclose(seen, blue[:, None, None].expand(3, 32, 32), atol=1e-5)


def test_views_are_prepared_as_the_library_prepares_them() -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    size = {"height": 32, "width": 32}
    theirs = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=size)
    for width, height in ((50, 70), (66, 50), (32, 32), (9, 9)):  # crops by whole pixels
        pixels = np.random.default_rng(width).integers(256, size=(height, width, 3), dtype=np.uint8)
        image = Image.fromarray(pixels)
        expected = torch.tensor(np.asarray(theirs(image, return_tensors="np")["pixel_values"][0]))
        assert torch.allclose(prepare_view(image, 32), expected, atol=1e-5), (width, height)


def test_half_a_pixel_of_the_crop_is_rounded_to_even() -> None:
    view = Image.new("RGB", (43, 32))
    view.putpixel((6, 0), (255, 255, 255))  # the crop begins at (43 - 32) / 2 = 5.5
    seen = prepare_view(view, 32)[0, 0]
    assert int(seen.argmax()) == 0


# ---- the vote ------------------------------------------------------------------------------------------------------


class MeanColor:
    """In place of CLIP: an image's embedding is its mean color, a text's the color that it names, if any."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self) -> None:
        model, _ = tiny_clip()
        self.config, self.state_dict = model.config, model.state_dict
        self.texts: list[str] = []

    def get_image_features(self, pixel_values: torch.Tensor) -> Any:
        mean = torch.tensor((0.48145466, 0.4578275, 0.40821073)).view(3, 1, 1)
        std = torch.tensor((0.26862954, 0.26130258, 0.27577711)).view(3, 1, 1)
        return type("Output", (), {"pooler_output": (pixel_values * std + mean).mean((2, 3))})

    def get_text_features(self, texts: list[str]) -> Any:
        self.texts += texts
        named = [next(color for color in COLORS if f" {color}" in text) for text in texts]
        rows = [VALUES.get(color, (1, 1, 1)) for color in named]
        return type("Output", (), {"pooler_output": torch.tensor(rows, dtype=torch.float32)})


class Texts(dict):
    def to(self, device: Any) -> "Texts":
        return self


def voter() -> tuple[ColorVoter, MeanColor]:
    model = MeanColor()
    return ColorVoter(model, lambda texts, **_: Texts(texts=texts), "mean colour", batch_size=2), model


def test_each_object_gets_the_colour_it_has() -> None:
    asks, model = voter()
    image = Image.new("RGB", (60, 20))
    boxes = {"green": (0, 0, 20, 20), "red": (20, 0, 40, 20), "blue": (40, 0, 60, 20)}
    for color, box in boxes.items():
        image.paste(VALUES[color], box)
    votes = asks.vote(image, [segment(box, image.size) for box in boxes.values()], "wine glass")
    assert [vote.color for vote in votes] == list(boxes)
    assert all(0.5 < vote.shares[vote.color] <= 1 and list(vote.shares) == list(COLORS) for vote in votes)
    assert len(model.texts) == 30
    assert {"a photo of a red wine glass", "a photo of a red-colored wine glass", "a photo of a red object"} <= set(
        model.texts
    )
    asks.vote(image, [], "wine glass")
    asks.vote(image, [segment(boxes["red"], image.size)], "wine glass")
    assert len(model.texts) == 30  # a class has one classifier
    asks.vote(image, [segment(boxes["red"], image.size)], "dog")
    assert len(model.texts) == 60


def test_the_vote_is_the_official_formula() -> None:
    """Unit vectors per wording, averaged, unit vectors again; 100 times the cosine. In float64, by hand."""
    model, tokenizer = tiny_clip()
    asks = ColorVoter(model, tokenizer, "tiny")
    image = Image.fromarray(np.random.default_rng(0).integers(256, size=(40, 50, 3), dtype=np.uint8))
    cut = segment((5, 5, 45, 35), image.size)
    ((color, shares),) = asks.vote(image, [cut], "dog")
    rows = []
    with torch.no_grad():
        for name in COLORS:
            each = []
            for template in TEMPLATES:
                tokens = tokenizer(template.format(color=name, name="dog"), return_tensors="pt")
                each.append(F.normalize(model.get_text_features(**tokens).pooler_output[0].double(), dim=-1))
            rows.append(F.normalize(torch.stack(each).mean(0), dim=-1))
        seen = model.get_image_features(pixel_values=prepare_view(object_view(image, cut), 32)[None]).pooler_output
    logits = 100 * torch.stack(rows) @ F.normalize(seen[0].double(), dim=-1)
    assert color == COLORS[int(logits.argmax())]
    assert list(shares.values()) == pytest.approx(logits.softmax(0).tolist(), rel=1e-3, abs=1e-6)


def test_scores_that_are_not_finite_are_refused() -> None:
    model, tokenizer = tiny_clip()
    with torch.no_grad():
        model.visual_projection.weight.fill_(float("nan"))
    image = Image.new("RGB", (40, 40))
    with pytest.raises(UserError, match="gave scores that are not finite on cpu in torch.float32: no color is named"):
        ColorVoter(model, tokenizer, "tiny").vote(image, [segment((0, 0, 40, 40), image.size)], "dog")


def test_loading(tmp_path: Path) -> None:
    place = {"device": torch.device("cpu"), "dtype": torch.float32}
    _, clip = save_scorer(tmp_path)
    loaded = load_color_voter(clip, **place)
    assert loaded.describe()["name"] == "clip"
    image = Image.new("RGB", (40, 40))
    assert loaded.vote(image, [segment((0, 0, 40, 40), image.size)], "dog")[0].color in COLORS
    with pytest.raises(UserError, match="--clip is not given.*sha256 a2bf730a0c7d.*--local-dir FOLDER"):
        load_color_voter(None, **place)
    (clip / "model.safetensors").unlink()
    with pytest.raises(UserError, match="The colour classifier .* cannot be read"):
        load_color_voter(clip, **place)
