"""Image streams: what item n is, and what is refused."""

from collections import Counter

import numpy as np
import pytest
from PIL import Image

from unimm.data.image_streams import ImageDataConfig, image_stream
from unimm.data.resizing import crop
from unimm.errors import UserError


@pytest.fixture
def folder(tmp_path):
    for i in range(5):
        Image.new("RGB", (40, 30), (i * 50, 0, 0)).save(tmp_path / f"{i}.png")
    return tmp_path


def test_every_epoch_shows_every_image_once_in_a_new_order(folder):
    stream = image_stream(ImageDataConfig(str(folder), image_size=16, eval_share=0), 15, seed=1)
    reds = [np.asarray(stream[i]["image"])[0, 0, 0] for i in range(15)]
    epochs = [reds[:5], reds[5:10], reds[10:]]
    assert all(Counter(epoch) == Counter([0, 50, 100, 150, 200]) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_item_n_does_not_depend_on_what_was_read_before(folder):
    config = ImageDataConfig(str(folder), image_size=16, random_crop=True, flip=True)
    one, other = image_stream(config, 50, seed=1), image_stream(config, 50, seed=1)
    expected = [np.asarray(one[i]["image"]) for i in range(50)]
    for i in (49, 3, 20):
        assert np.array_equal(np.asarray(other[i]["image"]), expected[i])


def test_crop_keeps_the_aspect_ratio_and_the_place():
    image = Image.fromarray(np.arange(20 * 10 * 3, dtype=np.uint8).reshape(10, 20, 3))
    assert np.array_equal(np.asarray(crop(image, 10)), np.asarray(image)[:, 5:15])
    assert np.array_equal(np.asarray(crop(image, 10, (1.0, 0.0))), np.asarray(image)[:, 10:])
    assert crop(image, 5).size == (5, 5)


def test_parquet_rows(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {"image": [Image.new("RGBA", (8, 8), (255, 0, 0, 0)), Image.new("L", (8, 8), 7)], "text": ["a", "b"]}
    datasets.Dataset.from_dict(
        rows, features=datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    ).to_parquet(str(tmp_path / "x.parquet"))
    stream = image_stream(
        ImageDataConfig(str(tmp_path / "x.parquet"), image_size=8, caption_template="a photo of {}", eval_share=0),
        2,
        seed=0,
    )
    found = {stream[i]["text"]: np.asarray(stream[i]["image"])[0, 0].tolist() for i in range(2)}
    assert found == {"a photo of a": [255, 255, 255], "a photo of b": [7, 7, 7]}


def test_bad_sources(tmp_path):
    with pytest.raises(UserError, match=r"no parquet file.*UNIMM_DATA"):
        image_stream(ImageDataConfig(str(tmp_path / "absent.parquet")), 1, seed=0)
    with pytest.raises(UserError, match="holds no image"):
        image_stream(ImageDataConfig(str(tmp_path)), 1, seed=0)
    (tmp_path / "bad.parquet").write_bytes(b"not parquet")
    with pytest.raises(UserError, match="not a readable parquet"):
        image_stream(ImageDataConfig(str(tmp_path / "bad.parquet")), 1, seed=0)
