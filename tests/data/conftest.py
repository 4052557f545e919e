"""Images on disk in every form that a source may have."""

import io
import json
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNIMM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def png(value: int, size: tuple[int, int] = (12, 8)) -> bytes:
    """A gray image as the bytes of its file."""
    file = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).save(file, "png")
    return file.getvalue()


def torn_png() -> bytes:
    """The first half of an image that does not compress."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(file, "png")
    return file.getvalue()[:400]


def value_of(row: Mapping[str, Any]) -> int:
    """The gray of a row's image."""
    return row["image"].getpixel((0, 0))[0]


def tar_bytes(members: Mapping[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def rows_as_members(values: range | list[int]) -> dict[str, bytes]:
    """A webdataset shard: even rows with a .txt, odd ones with a .json."""
    members: dict[str, bytes] = {}
    for n in values:
        members[f"{n:04d}.png"] = png(n)
        if n % 2:
            members[f"{n:04d}.json"] = json.dumps({"text": f"caption {n}", "label": n}).encode()
        else:
            members[f"{n:04d}.txt"] = f"caption {n}\n".encode()
    return members


def write_shards(folder: Path, count: int, rows: int) -> Path:
    """`count` tar files of `rows` rows each, 000.tar to ..., the images' gray counted through them."""
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(count):
        (folder / f"{k:03d}.tar").write_bytes(tar_bytes(rows_as_members(range(k * rows, (k + 1) * rows))))
    return folder


def write_parquet(path: Path, values: range | list[int], broken: Mapping[int, bytes] | None = None) -> Path:
    """Columns image and text; the images of `broken` rows are other bytes."""
    import datasets

    path.parent.mkdir(parents=True, exist_ok=True)
    table = [
        {"image": {"bytes": (broken or {}).get(n, png(n)), "path": None}, "text": f"caption {n}", "label": n}
        for n in values
    ]
    features = {"image": datasets.Image(), "text": datasets.Value("string"), "label": datasets.Value("int64")}
    datasets.Dataset.from_list(table, features=datasets.Features(features)).to_parquet(str(path), batch_size=3)
    return path


def write_folder(folder: Path, values: range) -> Path:
    """Images with a caption in a text file beside each."""
    folder.mkdir(parents=True, exist_ok=True)
    for n in values:
        (folder / f"{n:03d}.png").write_bytes(png(n))
        (folder / f"{n:03d}.txt").write_text(f"caption {n}\n")
    return folder


@pytest.fixture
def memory() -> Iterator[Any]:
    """fsspec's file system in memory, emptied afterwards: a place that is not on this disk."""
    import fsspec

    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]
