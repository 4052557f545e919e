"""Files of ids: what comes back, what is refused, and that a file is whole or not there."""

import math

import numpy as np
import pytest
from PIL import Image

from tests.class_conditional.tiny import random_ids
from tests.tokenizer.conftest import tiny_vqrae
from unimm.class_conditional.extraction import ClassIdsConfig, extract_ids, prepare_ids
from unimm.class_conditional.ids import IdStream, read_class_ids, write_class_ids
from unimm.data.resizing import crop, views_of
from unimm.data.sources.ids import IdsInfo
from unimm.data.sources.labelled import labelled_images
from unimm.errors import UserError
from unimm.tokenizer import ImageTokenizerProcessor


def test_round_trip(tmp_path):
    ids = random_ids(50)
    path = tmp_path / "new" / "ids.parquet"
    write_class_ids(
        path, ids.info, iter([(ids.ids[:30], ids.class_labels[:30]), (ids.ids[30:], ids.class_labels[30:])])
    )
    again = read_class_ids(path)
    assert again.ids.dtype == np.uint16
    assert np.array_equal(again.ids, ids.ids)
    assert np.array_equal(again.class_labels, ids.class_labels)
    assert again.info == ids.info
    again.info.require(tokenizer_fingerprint="a" * 64)
    with pytest.raises(UserError, match="tokenizer aaaaaaaaaaaa and the run names the tokenizer bbbbbbbbbbbb"):
        again.info.require(tokenizer_fingerprint="b" * 64)
    again.require_classes(5)
    with pytest.raises(UserError, match="from 0 to 4 and the model's table from 0 to 3"):
        again.require_classes(4)


def test_a_file_is_whole_or_not_there(tmp_path):
    ids = random_ids()

    def interrupted():
        yield ids.ids, ids.class_labels
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_class_ids(tmp_path / "ids.parquet", ids.info, interrupted())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.full((2, 16), 64), "ids from 64 to 64, and the codebook runs from 0 to 63"),
        (np.full((2, 16), -1), "ids from -1 to -1"),
        (np.zeros((2, 15), np.int64), "sequences of 15 ids, and a grid of 4 x 4 takes 16"),
    ],
)
def test_ids_that_do_not_fit_are_not_written(ids, message, tmp_path):
    with pytest.raises(UserError, match=message):
        write_class_ids(tmp_path / "ids.parquet", random_ids().info, iter([(ids, np.zeros(2))]))
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_not_read(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pytest.raises(UserError, match="no file of ids"):
        read_class_ids(tmp_path / "absent.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"not parquet")
    with pytest.raises(UserError, match="cannot be read"):
        read_class_ids(tmp_path / "bad.parquet")
    pq.write_table(pa.table({"ids": [[1, 2]]}), tmp_path / "foreign.parquet")
    with pytest.raises(UserError, match="which tokenizer"):
        read_class_ids(tmp_path / "foreign.parquet")
    write_class_ids(tmp_path / "empty.parquet", random_ids().info, iter([]))
    with pytest.raises(UserError, match="no ids"):
        read_class_ids(tmp_path / "empty.parquet")
    with pytest.raises(UserError, match="65537 codes are more than 65536"):
        write_class_ids(tmp_path / "large.parquet", IdsInfo("a", 65537, (1, 1), ""), iter([]))


def test_extracted_ids_are_those_of_encode(tmp_path):
    tokenizer, raw_images = tiny_vqrae(), labelled_images("shapes", 5)
    processor = ImageTokenizerProcessor.for_tokenizer(tokenizer.config)
    extract_ids(tokenizer, processor, raw_images, tmp_path / "x", made_from="shapes", flip=True, batch_size=2)
    found = read_class_ids(tmp_path / "x")
    images = [crop(row["image"], 32) for row in raw_images]
    images += [image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for image in images]
    expected = tokenizer.encode(processor(images=images, return_tensors="pt").pixel_values).ids.numpy()
    assert np.array_equal(found.ids[0::2], expected[:5])
    assert np.array_equal(found.ids[1::2], expected[5:])
    assert found.class_labels.tolist() == [row["label"] for row in raw_images for _ in range(2)]
    assert found.info.tokenizer_fingerprint == tokenizer.fingerprint


def test_ten_crop_is_five_places_at_two_scales_and_their_mirror_images(tmp_path):
    """LlamaGen's extraction: torchvision's TenCrop of the centre crop at 1.1 and 1.05 times the size, by hand."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    views = views_of(image, size=20, scales=[1.1, 1.05], flip=True)
    assert len(views) == 20 and {view.size for view in views} == {(20, 20)}
    for scale, side, middle in ((0, 22, 1), (1, 21, 0)):
        whole = np.asarray(crop(image, side))
        rest = side - 20
        places = [(0, 0), (rest, 0), (0, rest), (rest, rest), (middle, middle)]
        for number, (left, top) in enumerate(places):
            expected = whole[top : top + 20, left : left + 20]
            assert np.array_equal(np.asarray(views[10 * scale + 2 * number]), expected)
            assert np.array_equal(np.asarray(views[10 * scale + 2 * number + 1]), expected[:, ::-1])
    tokenizer = tiny_vqrae()
    processor = ImageTokenizerProcessor.for_tokenizer(tokenizer.config)
    config = ClassIdsConfig("shapes", "shapes", str(tmp_path), 3, 2, crop_scales=[1.1, 1.05], batch_size=2)
    train, held_out = (prepare_ids(config, split, tokenizer, processor) for split in ("train", "eval"))
    assert (len(train), len(held_out)) == (60, 2) and "five ADM crops at 1.1, 1.05" in train.info.made_from
    labels = [row["label"] for row in labelled_images("shapes", 3, seed=0)]
    assert train.class_labels.tolist() == [label for label in labels for _ in range(20)]
    with pytest.raises(UserError, match=r"at least 1[;:] 0\.9"):
        ClassIdsConfig("shapes", "shapes", str(tmp_path), crop_scales=[0.9])


def test_ids_on_disk_are_taken_up_or_refused(tmp_path):
    tokenizer = tiny_vqrae()
    processor = ImageTokenizerProcessor.for_tokenizer(tokenizer.config)
    config = ClassIdsConfig("shapes", "shapes", str(tmp_path), num_images=4, num_eval_images=3)
    assert [len(prepare_ids(config, split, tokenizer, processor)) for split in ("train", "eval")] == [8, 3]
    written = (tmp_path / "train.parquet").stat().st_mtime_ns
    prepare_ids(config, "train", tokenizer, processor)
    assert (tmp_path / "train.parquet").stat().st_mtime_ns == written
    config.num_images = 5
    with pytest.raises(UserError, match="holds 4 images.*asks for 5 images"):
        prepare_ids(config, "train", tokenizer, processor)
    other = tiny_vqrae(codebook_dim=32)
    with pytest.raises(UserError, match=f"{tokenizer.fingerprint[:12]}.*{other.fingerprint[:12]}"):
        prepare_ids(config, "eval", other, processor)


def test_the_stream_shows_every_row_once_an_epoch_and_item_n_is_always_the_same():
    ids = random_ids(20)
    stream = IdStream(ids, 60, seed=3)
    rows = [stream[n]["ids"].tolist() for n in range(60)]
    everything = sorted(ids.ids.tolist())
    assert all(sorted(rows[start : start + 20]) == everything for start in (0, 20, 40))
    assert rows[:20] != rows[20:40]
    assert IdStream(ids, 60, seed=3)[47]["ids"].tolist() == rows[47]


def test_unigram_entropy_in_closed_form():
    ids = random_ids(4)
    ids.ids[:] = np.array([0, 0, 1, 2] * 4, np.uint16)  # one half, a quarter, a quarter
    assert ids.entropy == pytest.approx(1.5 * math.log(2))


def test_labelled_sources(tmp_path):
    datasets = pytest.importorskip("datasets")
    image = Image.new("RGB", (8, 8), "red")
    features = {"image": datasets.Image(), "label": datasets.Value("int64"), "name": datasets.Value("string")}
    rows = {"image": [image] * 3, "label": [2, 0, 1], "name": ["a", "b", "c"]}
    table = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    table.to_parquet(str(tmp_path / "x.parquet"))
    assert [row["label"] for row in labelled_images(str(tmp_path / "x.parquet"))] == [2, 0, 1]
    assert len(labelled_images(str(tmp_path / "x.parquet"), 2)) == 2
    with pytest.raises(UserError, match="holds 3 images and 4 are asked for"):
        labelled_images(str(tmp_path / "x.parquet"), 4)
    table.remove_columns("label").to_parquet(str(tmp_path / "y.parquet"))
    with pytest.raises(UserError, match="no column 'label'; its columns are image, name"):
        labelled_images(str(tmp_path / "y.parquet"))
    table.remove_columns("label").rename_column("name", "label").to_parquet(str(tmp_path / "z.parquet"))
    with pytest.raises(UserError, match="not whole numbers"):
        labelled_images(str(tmp_path / "z.parquet"))
    with pytest.raises(UserError, match="no end"):
        labelled_images("shapes")
