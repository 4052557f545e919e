"""A data set as ids: the ids are the tokenizer's, the files do not depend on how the run went, and what is wrong with a
folder is one sentence."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.data.conftest import png, torn_png, write_folder, write_parquet
from tests.tokenizer.conftest import tiny_vqrae
from unimm.class_conditional.extraction import ClassIdsConfig, prepare_ids
from unimm.class_conditional.ids import read_class_ids_folder
from unimm.data.images import load_image
from unimm.data.resizing import crop
from unimm.data.sources.ids import MANIFEST, IdsFolder, holds_ids, read_ids
from unimm.data.sources.rows import ReadOptions
from unimm.data.text_to_image import IdDrawings
from unimm.encoding import EncodeConfig, Encoder
from unimm.errors import UserError
from unimm.tokenizer import ImageTokenizerProcessor


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_vqrae()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """22 of them: number 5 is a web page, 13 is cut off."""
    folder = write_folder(tmp_path_factory.mktemp("pictures"), range(22))
    (folder / "005.png").write_text("<html>")
    (folder / "013.png").write_bytes(torn_png())
    return folder


def encoder(tokenizer, source, folder, rank=0, world_size=1, **fields):
    config = EncodeConfig(str(source), **{"rows_per_shard": 6, "batch_size": 4, "max_bad_share": 0.1} | fields)
    processor = ImageTokenizerProcessor.for_tokenizer(tokenizer.config)
    return Encoder(tokenizer, processor, config, folder, rank=rank, world_size=world_size)


@pytest.fixture(scope="module")
def encoded(tokenizer, images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoded")
    assert encoder(tokenizer, images, folder, features=True).run() == 20
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_ids_are_those_of_encode_and_columns_ride_along(tokenizer, images, encoded):
    processor = ImageTokenizerProcessor.for_tokenizer(tokenizer.config)
    good = [n for n in range(22) if n not in (5, 13)]
    crops = [crop(load_image(images / f"{n:03d}.png"), tokenizer.config.image_size) for n in good]
    output = tokenizer.encode(processor(images=crops, return_tensors="pt").pixel_values)
    rows = IdsFolder(str(encoded))
    assert np.array_equal(np.stack([rows[n]["ids"] for n in range(len(rows))]), output.ids.numpy())
    assert [rows[n]["text"] for n in range(len(rows))] == [f"caption {n}" for n in good]
    assert [rows[n]["key"] for n in range(len(rows))] == [f"{n:03d}.png" for n in good]
    features = torch.cat([load_file(encoded / f"features-{k:05d}.safetensors")["features"] for k in range(4)])
    assert features.dtype == torch.float16
    assert torch.allclose(features.float(), output.features, atol=2e-3)


def test_names_that_are_no_utf8_are_kept_written_out(tokenizer, tmp_path):
    folder = write_folder(tmp_path / os.fsdecode(b"d\xe9"), range(2))
    (folder / os.fsdecode(b"e\xe9.png")).write_bytes(png(3))
    (folder / os.fsdecode(b"e\xe9.txt")).write_text("three")
    (folder / os.fsdecode(b"f\xe9.png")).write_bytes(torn_png())
    assert encoder(tokenizer, folder, tmp_path / "out", max_bad_share=0.5).run() == 3
    rows = IdsFolder(str(tmp_path / "out"))
    assert [rows[n]["key"] for n in range(3)] == ["000.png", "001.png", "e\\udce9.png"]
    line = json.loads((tmp_path / "out/ids-00000.skipped.jsonl").read_text(encoding="utf-8"))
    assert line["reason"] == "damaged image" and os.fsdecode(b"f\xe9.png") in line["detail"]


def test_the_manifest_counts_and_names(tokenizer, encoded):
    manifest = json.loads((encoded / MANIFEST).read_text())
    assert [shard["rows"] for shard in manifest["shards"]] == [5, 6, 5, 4]
    assert [shard["skipped"] for shard in manifest["shards"]] == [
        {"damaged image": 1},
        {},
        {"damaged image": 1},
        {},
    ]
    assert manifest["info"]["tokenizer_fingerprint"] == tokenizer.fingerprint
    ids = np.concatenate([read_ids(path)[0] for path in sorted(encoded.glob("ids-*.parquet"))])
    shares = np.bincount(ids.ravel()) / ids.size
    entropy = -sum(share * np.log(share) for share in shares[shares > 0])
    assert manifest["unigram_entropy"] == pytest.approx(entropy)
    (line,) = (encoded / "ids-00002.skipped.jsonl").read_text().splitlines()
    assert json.loads(line)["row"] == 13 and "013.png" in line


def test_two_processes_and_an_interrupted_run_write_the_same_bytes(tokenizer, images, encoded, tmp_path, monkeypatch):
    one, other = (encoder(tokenizer, images, tmp_path, rank, 2, features=True) for rank in range(2))
    assert (one.missing, other.missing) == ([0, 2], [1, 3])
    writes = []
    write = Encoder._write

    def killed(self, parts):
        if len(writes) == 1:
            raise KeyboardInterrupt
        writes.append(parts[0].shard)
        write(self, parts)

    monkeypatch.setattr(Encoder, "_write", killed)
    with pytest.raises(KeyboardInterrupt):
        one.run()
    monkeypatch.undo()
    assert other.run() == 10
    assert not (tmp_path / MANIFEST).exists()
    with pytest.raises(UserError, match=f"{tmp_path} holds 3 shards of ids and no {MANIFEST}.*start it again"):
        IdsFolder(str(tmp_path))
    again = encoder(tokenizer, images, tmp_path, 0, 2, features=True)
    assert again.missing == [2]
    again.run()
    assert files_of(tmp_path) == files_of(encoded)
    assert encoder(tokenizer, images, tmp_path, features=True).run() == 0


def test_worker_processes_change_nothing(tokenizer, images, encoded, tmp_path):
    encoder(tokenizer, images, tmp_path, features=True, num_workers=2).run()
    assert files_of(tmp_path) == files_of(encoded)


def test_labels_and_filters(tokenizer, tmp_path):
    (tmp_path / "in").mkdir()
    source = write_parquet(tmp_path / "in/a.parquet", range(7), {3: png(3, (99, 8))})
    read = ReadOptions(max_aspect_ratio=2)
    config = {"columns": ["class_label"], "read": read, "max_bad_share": 0.0}
    encoder(tokenizer, source, tmp_path / "out", **config).run()
    rows = IdsFolder(str(tmp_path / "out"))
    assert [rows[n]["class_label"] for n in range(len(rows))] == [0, 1, 2, 4, 5, 6]
    assert rows.manifest.shards[0]["skipped"] == {"too long": 1}
    with pytest.raises(UserError, match=r"no captions \(columns ids, key, class_label\)"):
        IdDrawings(rows, seed=0)
    with pytest.raises(UserError, match="100.0%.* 1 no label.*text of 0"):
        encoder(tokenizer, source, tmp_path / "other", label_column="text", **config | {"read": ReadOptions()}).run()


def test_a_folder_of_something_else_is_refused(tokenizer, images, encoded):
    with pytest.raises(UserError, match="tokenizer .* and the run names the tokenizer"):
        encoder(tiny_vqrae(codebook_dim=32), images, encoded)
    with pytest.raises(UserError, match="6 a shard.*asks for .*8 a shard.*choose another output_dir"):
        encoder(tokenizer, images, encoded, rows_per_shard=8)
    with pytest.raises(UserError, match="holds 'name'; known: text, class_label"):
        EncodeConfig("a", columns=["name"])
    with pytest.raises(UserError, match="holds 22 rows and data.count asks for 23"):
        encoder(tokenizer, images, encoded, count=23)


def test_too_much_damage_ends_without_a_manifest(tokenizer, images, tmp_path):
    with pytest.raises(UserError, match="cannot be used, more than max_bad_share 5.0%: 2 damaged image"):
        encoder(tokenizer, images, tmp_path, max_bad_share=0.05).run()
    fields = {"max_bad_share": 0.05, "rows_per_shard": 5}
    two = [encoder(tokenizer, images, tmp_path / "two", rank, 2, **fields) for rank in (1, 0)]
    assert two[0].run() == 9  # one bad row is no more than the share
    with pytest.raises(UserError, match=r"2 of 22 rows \(9.1%\)"):
        two[1].run()
    assert not (tmp_path / "two" / MANIFEST).exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "ids-00001.parquet").unlink(), "no file .*ids-00001.parquet"),
        (lambda f: shutil.copy(f / "ids-00000.parquet", f / "ids-00001.parquet"), "00001.* 5 rows .* says 6"),
        (lambda f: (f / "ids-00001.parquet").write_bytes(b"half"), "ids-00001.parquet cannot be read"),
        (lambda f: (f / MANIFEST).write_text("{"), "manifest.json cannot be read"),
    ],
)
def test_a_broken_folder_names_what_is_broken(encoded, tmp_path, spoil, message):
    folder = tmp_path / "copy"
    shutil.copytree(encoded, folder)
    assert holds_ids(str(folder))
    spoil(folder)
    with pytest.raises(UserError, match=message):
        IdsFolder(str(folder))


def test_a_shard_of_another_tokenizer_is_found(tokenizer, images, encoded, tmp_path):
    shutil.copytree(encoded, tmp_path / "copy")
    encoder(tiny_vqrae(codebook_dim=32), images, tmp_path / "other").run()
    shutil.copy(tmp_path / "other/ids-00001.parquet", tmp_path / "copy")
    with pytest.raises(UserError, match="ids-00001.parquet was made by another run"):
        IdsFolder(str(tmp_path / "copy"))


def test_the_fingerprint_is_the_meaning_of_the_ids():
    one, other = tiny_vqrae(), tiny_vqrae()
    assert one.fingerprint == other.fingerprint
    with torch.no_grad():
        for parameter in (*other.decoder.parameters(), *other.pixel_head.parameters()):
            parameter.add_(0.1)
    assert other.fingerprint == one.fingerprint
    with torch.no_grad():
        other.quantizer.codebook[0, 0] += 1e-3
    assert other.fingerprint != one.fingerprint


def ten_crops(image: Image.Image, size: int, scale: float) -> list[np.ndarray]:
    """LlamaGen's extraction by hand: ADM's center crop at `scale` times the size, five places, each and its mirror."""
    wide = int(size * scale)
    while min(image.size) >= 2 * wide:
        image = image.resize((image.size[0] // 2, image.size[1] // 2), Image.Resampling.BOX)
    factor = wide / min(image.size)
    image = image.resize((round(image.size[0] * factor), round(image.size[1] * factor)), Image.Resampling.BICUBIC)
    array = np.asarray(image)
    y, x = (array.shape[0] - wide) // 2, (array.shape[1] - wide) // 2
    array, rest = array[y : y + wide, x : x + wide], wide - size
    middle = int(round(rest / 2))
    corners = [(0, 0), (0, rest), (rest, 0), (rest, rest), (middle, middle)]
    crops = [array[top : top + size, left : left + size] for top, left in corners]
    return [each for crop in crops for each in (crop, crop[:, ::-1])]


@pytest.fixture(scope="module")
def class_folder(tmp_path_factory):
    """ImageNet's layout: a subfolder for each class, sizes that ADM's crop halves or not, one file torn."""
    folder, rng = tmp_path_factory.mktemp("classes"), np.random.default_rng(0)
    for name, sizes in {"n02": [(150, 90), (40, 64)], "n01": [(33, 200)], "n10": [(70, 71), (300, 301)]}.items():
        (folder / name).mkdir()
        for k, (width, height) in enumerate(sizes):
            image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
            image.save(folder / name / f"{k}.png")
    (folder / "n10" / "1.png").rename(folder / "n10" / "1.JPEG")  # ImageNet's ending; the content decides
    (folder / "n02" / "2.png").write_bytes(torn_png())
    return folder


TEN_CROP = {"columns": ["class_label"], "crop_scales": [1.1], "flip": True, "rows_per_shard": 2, "max_bad_share": 0.5}


def test_ten_crop_of_a_folder_of_classes(tokenizer, class_folder, tmp_path):
    assert encoder(tokenizer, class_folder, tmp_path / "ids", **TEN_CROP).run() == 5
    found = read_class_ids_folder(str(tmp_path / "ids"))
    names = ["n01/0.png", "n02/0.png", "n02/1.png", "n10/0.png", "n10/1.JPEG"]
    assert found.class_labels.tolist() == [label for label in (0, 1, 1, 2, 2) for _ in range(10)]
    processor = ImageTokenizerProcessor.for_tokenizer(tokenizer.config)
    crops = [c for name in names for c in ten_crops(Image.open(class_folder / name).convert("RGB"), 32, 1.1)]
    pixel_values = processor(images=[Image.fromarray(np.ascontiguousarray(c)) for c in crops], return_tensors="pt")
    assert np.array_equal(found.ids, tokenizer.encode(pixel_values.pixel_values).ids.numpy())
    assert "five ADM crops at 1.1, mirror images too" in found.info.made_from
    shards = json.loads((tmp_path / "ids" / MANIFEST).read_text())["shards"]
    assert [shard["rows"] for shard in shards] == [20, 10, 20] and shards[1]["skipped"] == {"damaged image": 1}


def test_ten_crop_goes_on_where_it_stopped(tokenizer, class_folder, tmp_path):
    two = [
        encoder(tokenizer, class_folder, tmp_path / "two", rank, 2, **TEN_CROP | {"batch_size": 1}) for rank in (0, 1)
    ]
    assert [each.run() for each in two] == [4, 1]
    whole = files_of(tmp_path / "two")
    (tmp_path / "two/ids-00001.parquet").unlink()
    (tmp_path / "two" / MANIFEST).unlink()
    assert encoder(tokenizer, class_folder, tmp_path / "two", **TEN_CROP).run() == 1
    assert files_of(tmp_path / "two") == whole
    with pytest.raises(UserError, match="five ADM crops at 1.1, mirror images too, and the run asks for"):
        encoder(tokenizer, class_folder, tmp_path / "two", **TEN_CROP | {"crop_scales": [1.05]})


def test_ten_crop_of_a_table_has_the_same_ids(tokenizer, class_folder, tmp_path):
    """Hugging Face's ImageNet: parquet with columns image (bytes) and label."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = ["n01/0.png", "n02/0.png", "n02/1.png", "n10/0.png", "n10/1.JPEG"]
    images = [{"bytes": (class_folder / name).read_bytes(), "path": name} for name in names]
    pq.write_table(pa.table({"image": images, "label": [0, 1, 1, 2, 2]}), tmp_path / "train.parquet")
    assert encoder(tokenizer, tmp_path / "train.parquet", tmp_path / "table", **TEN_CROP).run() == 5
    encoder(tokenizer, class_folder, tmp_path / "folder", **TEN_CROP).run()
    table, folder = (read_class_ids_folder(str(tmp_path / name)) for name in ("table", "folder"))
    assert np.array_equal(table.ids, folder.ids) and np.array_equal(table.class_labels, folder.class_labels)


def test_a_class_conditional_run_takes_folders_of_ids(tokenizer, class_folder, images, tmp_path):
    encoder(tokenizer, class_folder, tmp_path / "train", **TEN_CROP).run()
    encoder(tokenizer, class_folder, tmp_path / "eval", columns=["class_label"], max_bad_share=0.5).run()
    config = ClassIdsConfig(str(tmp_path / "train"), str(tmp_path / "eval"), str(tmp_path / "unused"))
    config.require_sources()
    processor = ImageTokenizerProcessor.for_tokenizer(tokenizer.config)
    assert [len(prepare_ids(config, split, tokenizer, processor)) for split in ("train", "eval")] == [50, 5]
    assert not (tmp_path / "unused").exists()
    with pytest.raises(UserError, match="run names the tokenizer"):
        prepare_ids(config, "train", tiny_vqrae(codebook_dim=32), processor)
    with pytest.raises(UserError, match="holds ids, not images to hold out"):
        ClassIdsConfig(str(tmp_path / "train"), folder="x")
    encoder(tokenizer, images, tmp_path / "text").run()
    with pytest.raises(UserError, match="holds ids without classes: encode them with data.columns"):
        read_class_ids_folder(str(tmp_path / "text"))
    with pytest.raises(UserError, match="is no folder of classes"):
        encoder(tokenizer, images, tmp_path / "flat", columns=["class_label"])
