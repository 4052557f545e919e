"""Image sets and protocols: nothing repeated, resized or skipped in silence; the crops of ADM and torchvision."""

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from unimm.data.resizing import adm_crop
from unimm.errors import UserError
from unimm.evaluation.generation.class_samples import write_npz
from unimm.evaluation.runs.image_sets import image_set, source_sha256
from unimm.evaluation.runs.protocols import PROTOCOLS, torchvision_crop


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path):
    for index in range(5):
        path = tmp_path / "pictures" / f"{index % 2}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise(20, 16, index).save(path)
    return tmp_path / "pictures"


def test_the_first_images_by_name_or_a_sample_without_repetition(folder):
    assert image_set(str(folder)).names == ["0/0.png", "0/2.png", "0/4.png", "1/1.png", "1/3.png"]
    assert image_set(str(folder), 2).names == ["0/0.png", "0/2.png"]
    drawn = image_set(str(folder), 4, seed=3)
    assert len(set(drawn.names)) == 4 and drawn.names == image_set(str(folder), 4, seed=3).names
    for batch in drawn.batches(3):
        for name, image in batch:
            assert image.tobytes() == Image.open(folder / name).tobytes()
    assert [len(batch) for batch in drawn.batches(3)] == [3, 1]


def test_an_npz_holds_the_images_that_were_written(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    write_npz(tmp_path / "x.npz", images.shape, [images])
    found = image_set(str(tmp_path / "x.npz"))
    assert np.array_equal(np.stack([np.asarray(found.load(i)) for i in range(3)]), images)


def one_file(tmp_path, changed):
    """The images in a parquet file, the second of them changed or not."""
    images = [noise(9, 8, 77 if changed and index == 1 else index) for index in range(3)]
    path = tmp_path / f"{changed}" / "test.parquet"
    path.parent.mkdir(exist_ok=True)
    Dataset.from_dict({"image": images}).to_parquet(path)
    return path


def test_what_is_measured_is_known_by_its_bytes(folder, tmp_path):
    known = source_sha256(str(folder))
    assert known == source_sha256(str(folder)) != source_sha256(str(folder), 4) != source_sha256(str(folder), 4, 3)
    whole = (folder / "0/2.png").read_bytes()
    noise(20, 16, 9).save(folder / "0/2.png")
    assert source_sha256(str(folder)) != known
    (folder / "0/2.png").write_bytes(whole)
    assert source_sha256(str(folder)) == known
    (folder / "0/2.png").rename(folder / "0/3.png")
    assert source_sha256(str(folder)) != known
    whole, changed = (one_file(tmp_path, each) for each in (False, True))
    assert source_sha256(str(whole)) == source_sha256(str(whole)) != source_sha256(str(changed))
    assert source_sha256(str(whole.parent)) == source_sha256(str(whole.parent)) != source_sha256(str(changed.parent))
    assert source_sha256("shapes", 3, 0) != source_sha256("shapes", 3, 1)
    for value in (0, 1):
        np.savez(tmp_path / f"{value}.npz", mu=np.full(4, value), sigma=np.eye(4))
    assert source_sha256(str(tmp_path / "0.npz")) != source_sha256(str(tmp_path / "1.npz"))
    with pytest.raises(UserError, match="There is no"):
        source_sha256(str(tmp_path / "absent"))


def test_what_cannot_be_measured_is_said(folder, tmp_path):
    with pytest.raises(UserError, match="holds 5 images and 6 are asked for"):
        image_set(str(folder), 6)
    (folder / "broken.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="broken.png"):
        list(image_set(str(folder)).batches(2))
    np.savez(tmp_path / "floats.npz", arr_0=np.zeros((2, 4, 4, 3)))
    with pytest.raises(UserError, match=r"arr_0 of float64 \[2, 4, 4, 3\]"):
        image_set(str(tmp_path / "floats.npz"))
    (tmp_path / "text.npz").write_text("no")
    with pytest.raises(UserError, match="cannot be read as an npz"):
        image_set(str(tmp_path / "text.npz"))
    np.savez(tmp_path / "objects.npz", arr_0=np.array([{"a": 1}]))
    with pytest.raises(UserError, match="cannot be read as an npz"):
        image_set(str(tmp_path / "objects.npz"))


@pytest.mark.parametrize(("width", "height"), [(40, 31), (31, 40), (16, 16), (100, 67), (17, 90)])
def test_adm_crop_is_the_published_one(width, height):
    """The text of ADM's `center_crop_arr`, in its own order of operations."""
    image = noise(width, height)
    halved = image
    while min(*halved.size) >= 2 * 16:
        halved = halved.resize(tuple(x // 2 for x in halved.size), resample=Image.BOX)
    scale = 16 / min(*halved.size)
    array = np.array(halved.resize(tuple(round(x * scale) for x in halved.size), resample=Image.BICUBIC))
    y, x = (array.shape[0] - 16) // 2, (array.shape[1] - 16) // 2
    assert np.array_equal(np.asarray(adm_crop(image, 16)), array[y : y + 16, x : x + 16])


def test_torchvision_crop_truncates_the_long_side():
    image = noise(33, 20)  # 16 / 20 * 33 = 26.4; a rounded 26.6 would become 27
    assert torchvision_crop(noise(33, 20), 16).size == (16, 16)
    resized = image.resize((26, 16), Image.BILINEAR)
    assert torchvision_crop(image, 16).tobytes() == resized.crop((5, 0, 21, 16)).tobytes()
    image = noise(31, 24)  # 20.67 -> 20
    assert torchvision_crop(image, 16).tobytes() == image.resize((20, 16), 2).crop((2, 0, 18, 16)).tobytes()


def test_every_protocol_cuts_squares_and_leaves_images_of_the_right_size():
    for protocol in PROTOCOLS.values():
        assert protocol.cut(noise(50, 37), 16).size == (16, 16)
        same = noise(16, 16)
        assert protocol.cut(same, 16).tobytes() == same.tobytes()
        assert protocol.resized(np.asarray(same), 8).shape == (8, 8, 3)
