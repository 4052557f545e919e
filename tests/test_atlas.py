"""The code atlas: statistics against loops over every id, sheets against their tiles, and the page in a browser."""

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.browser import browse, in_a_browser
from tests.tokenizer.conftest import tiny
from unimm.atlas import NEAREST, NEIGHBORS, collect, sheet, spread, write_page
from unimm.cli import main
from unimm.data.resizing import crop
from unimm.evaluation.runs.image_sets import image_set
from unimm.tokenizer import ImageTokenizerProcessor

COUNT = 7


@pytest.fixture(scope="module", params=["vqrae", "vfmtok"])
def made(request):
    """A tokenizer, the pixel_values of the images, and their atlas."""
    tokenizer = tiny(request.param)
    processor = ImageTokenizerProcessor.for_tokenizer(tokenizer.config)
    images = image_set("shapes", COUNT)
    values = processor(images=[crop(images.load(n), 32) for n in range(COUNT)], return_tensors="pt").pixel_values
    return tokenizer, values, collect(tokenizer, processor, images, batch_size=3)


def test_counts_and_places(made):
    tokenizer, values, atlas = made
    with torch.no_grad():
        ids = tokenizer.encode(values).ids
    assert atlas.count == COUNT
    for code in range(64):
        assert int(atlas.usage.counts[code]) == int((ids == code).sum())
        assert atlas.places[code].tolist() == [int((ids[:, place] == code).sum()) for place in range(ids.shape[1])]


def test_mean_decoded_patches(made):
    tokenizer, values, atlas = made
    if not tokenizer.ids_are_patches:
        assert atlas.drawn is None
        return
    with torch.no_grad():
        ids = tokenizer.encode(values).ids
        pixels = tokenizer.decode(ids)
    mean = atlas.mean()
    for code in range(64):
        patches = [
            pixels[image, :, 8 * (place // 4) : 8 * (place // 4) + 8, 8 * (place % 4) : 8 * (place % 4) + 8]
            for image, place in (ids == code).nonzero().tolist()
        ]
        expected = torch.stack(patches).mean(0).permute(1, 2, 0) * 255 if patches else torch.full((8, 8, 3), 255.0)
        assert np.abs(mean[code] - expected.numpy()).max() <= 0.51  # rounded to 8 bits


def test_nearest_patches_are_the_nearest_one_of_each_image(made):
    tokenizer, values, atlas = made
    with torch.no_grad():
        output = tokenizer.encode(values)
        table = tokenizer.quantizer.effective_codebook.double()
        latents = tokenizer.quantizer.comparable(output.latents).double()
    images = (tokenizer.denormalize(values) * 255).round().permute(0, 2, 3, 1).numpy()
    for code in range(64):
        best: dict[int, tuple[float, int]] = {}
        for image, place in (output.ids == code).nonzero().tolist():
            distance = float((latents[image, place] - table[code]).square().sum())
            best[image] = min(best.get(image, (np.inf, 0)), (distance, place))
        nearest = sorted((distance, image, place) for image, (distance, place) in best.items())[:NEAREST]
        found = [n for n in atlas.images[code] if n >= 0]
        assert len(found) == len(nearest)
        np.testing.assert_allclose(atlas.distances[code][: len(nearest)], [d for d, *_ in nearest], rtol=1e-4)
        if tokenizer.ids_are_patches and nearest:
            _, image, place = nearest[0]
            top, left = 8 * (place // 4), 8 * (place % 4)
            assert np.abs(atlas.patches[code, 0] - images[image, top : top + 8, left : left + 8]).max() <= 1
        elif nearest:
            assert np.abs(atlas.thumbnails[nearest[0][1]] - images[nearest[0][1]]).max() <= 1


def test_neighbors_by_cosine(made):
    tokenizer, _, atlas = made
    rows = tokenizer.quantizer.effective_codebook.detach().double().numpy()
    for code in range(0, 64, 7):
        cosines = [
            -2 if k == code else rows[k] @ rows[code] / np.linalg.norm(rows[k]) / np.linalg.norm(rows[code])
            for k in range(64)
        ]
        assert atlas.neighbors[code].tolist() == np.argsort(cosines)[::-1][:NEIGHBORS].tolist()
        np.testing.assert_allclose(atlas.cosines[code], sorted(cosines)[::-1][:NEIGHBORS], atol=1e-5)


def test_a_sheet_holds_every_tile():
    tiles = np.random.default_rng(0).integers(0, 256, (11, 4, 6, 3), dtype=np.uint8)
    uri, columns, rows = sheet(tiles)
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))
    assert columns * rows >= 11 and image.shape == (4 * rows, 6 * columns, 3)
    for n, tile in enumerate(tiles):
        top, left = 4 * (n // columns), 6 * (n % columns)
        assert np.array_equal(image[top : top + 4, left : left + 6], tile)
    many = np.random.default_rng(0).integers(0, 256, (16384, 8, 8, 3), dtype=np.uint8)  # noise: 3.1 MB as PNG
    assert sheet(many)[0].startswith("data:image/jpeg;")


def test_spread_in_closed_form():
    places = np.array([[1, 1, 1, 1], [9, 0, 0, 0], [0, 2, 2, 0], [0, 0, 0, 0]])
    np.testing.assert_allclose(spread(places), [1, 0, 0.5, 0], atol=1e-12)


def page_of(made, folder: Path) -> Path:
    write_page(folder / "atlas.html", made[2], title="a <model>", source="shapes")
    return folder / "atlas.html"


def test_the_page_asks_for_nothing_from_outside(made, tmp_path):
    text = page_of(made, tmp_path).read_text(encoding="utf-8")
    assert re.findall(r"https?://", text) == [] and "Codes of a &lt;model&gt;" in text
    assert set(re.findall(r"url\((.{10})", text)) == {"data:image"} and len(re.findall(r"<script src|<link", text)) == 0
    found = re.search(r"const data = (\{.*\});", text)
    assert found is not None
    data = json.loads(found[1])
    assert data["counts"] == made[2].usage.counts.tolist() and data["patches"] == made[0].ids_are_patches
    assert ("are no patches" in text) != data["patches"]


@in_a_browser
def test_the_page_in_a_browser(made, tmp_path):
    """The wall shows every used id, most used first; the chosen id's count, neighbors and nearest are beside it."""
    page, atlas = page_of(made, tmp_path), made[2]
    text = browse(page, "--virtual-time-budget=2000", "--dump-dom")
    counts = atlas.usage.counts.tolist()
    wall = re.search(r'id="wall">(.*?)</div>', text, re.S)
    assert wall is not None
    shown = [int(number) for number in re.findall(r'data-id="(\d+)"', wall[1])]
    assert shown == sorted((k for k in range(64) if counts[k]), key=lambda k: (-counts[k], k))
    assert f'<h2 id="name">Id {shown[0]}</h2>' in text and f"{counts[shown[0]]} times" in text
    side = text[text.index('id="neighbors"') :]
    assert [int(n) for n in re.findall(r'data-id="(\d+)"', side)] == atlas.neighbors[shown[0]].tolist()
    near = re.search(r'id="near">(.*?)<h3', text, re.S)
    assert near is not None and near[1].count('class="tile near"') == int((atlas.images[shown[0]] >= 0).sum())


def test_the_command(tmp_path, capsys):
    model = tiny("vqrae")
    model.save_pretrained(tmp_path / "model")
    ImageTokenizerProcessor.for_tokenizer(model.config).save_pretrained(tmp_path / "model")
    for n in range(3):
        Image.fromarray(np.random.default_rng(n).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(
            tmp_path / f"{n}.png"
        )
    (tmp_path / "3.png").write_text("no image")
    arguments = ["atlas", str(tmp_path / "model"), "--data", str(tmp_path), "--output", str(tmp_path / "out")]
    assert main([*arguments, "--json", str(tmp_path / "report.json")]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["images"], report["unreadable"], report["codes"]) == (3, ["3.png"], 64)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["atlas.html"]
    assert "codes used in 3 images, 1 unreadable images left out" in capsys.readouterr().out
    assert main([*arguments, "--num-images", "0"]) == 2
    assert "at least one image" in capsys.readouterr().err
