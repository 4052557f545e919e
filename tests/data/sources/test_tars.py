"""Names in tar files are cut as webdataset cuts them, and no sample is lost without a word."""

import io
import re
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data.conftest import png, tar_bytes, value_of
from unimm.data.bad_rows import BadRow, Skipped, UsableRows
from unimm.data.sources.registry import open_images
from unimm.data.sources.tars import index_of
from unimm.errors import UserError

WEBDATASET = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
"""`base_plus_ext` of webdataset 1.0 (webdataset/tariterators.py)."""


def archive(path: Path, members: list[tuple[str, bytes]], *, links: tuple[str, ...] = ()) -> Path:
    """A tar file whose names may come twice."""
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for name in links:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.LNKTYPE, members[0][0]
            tar.addfile(info)
    return path


def read(path: Path) -> list[tuple[str, Any]]:
    """Each row's key and gray value, or why it is bad."""
    rows, found = open_images(path), []
    for n in range(len(rows)):
        try:
            row = rows[n]
            found.append((row["key"], value_of(row)))
        except BadRow as bad:
            found.append((bad.detail, bad.reason))
    return found


def test_dots_in_names_and_folders(tmp_path: Path) -> None:
    members = [
        ("v1.0/a.png", png(1)),
        ("v1.0/a.txt", b"one"),
        ("./b.png", png(2)),
        ("c.photo.PNG", png(3)),
        ("c.photo.txt", b"three"),
        ("img.001.png", png(4)),
        ("img.002.png", png(5)),
        ("img.003.png", png(6)),
        ("d.mask.png", png(7)),
        ("d.png", png(8)),
        (".hidden.png", png(9)),
        ("README", b"no kind"),
    ]
    found = read(archive(tmp_path / "0.tar", members))
    assert found[:3] == [("v1.0/a", 1), ("./b", 2), ("c", 3)]
    assert (
        found[3][1] == "dots in a name" and found[3][0].startswith("img in ") and ".001.png and .002.png" in found[3][0]
    )
    assert found[4:] == [("d", 8)]
    assert open_images(tmp_path / "0.tar")[2]["text"] == "three"


def test_duplicates_and_links_are_counted_and_named(tmp_path: Path) -> None:
    members = [
        ("a.png", png(1)),
        ("a.txt", b"x"),
        ("a.png", png(2)),
        ("b.png", png(3)),
        ("B.png", png(4)),
        ("b.png", png(5)),
    ]
    path = archive(tmp_path / "0.tar", members, links=("c.png",))
    log = tmp_path / "log.jsonl"
    rows = UsableRows(open_images(path), "here", max_bad_share=0.4, log=log)
    found = [rows.usable(n) for n in range(len(rows))]
    bad = {n: row.reason for n, row in enumerate(found) if isinstance(row, Skipped)}
    assert bad == {0: "duplicate name", 4: "link in a tar"}
    assert [value_of(row) for row in found if not isinstance(row, Skipped)] == [3, 4, 5]  # a key that returns is a row
    assert "a.png is the second .png of its key" in log.read_text() and "c.png is a link" in log.read_text()


def test_a_shard_in_the_order_of_kinds_loses_no_sample_without_a_word(tmp_path: Path) -> None:
    """Members of a key that do not follow each other are rows of their own, as for webdataset."""
    members = [("a.png", png(1)), ("b.png", png(2)), ("a.txt", b"x"), ("b.txt", b"y")]
    reasons = [value for _, value in read(archive(tmp_path / "0.tar", members))]
    assert reasons == [1, 2, "no image", "no image"]


NAMES = st.lists(
    st.tuples(
        st.sampled_from(["", "d/", "v1.0/", "./", "a.b/c/"]),
        st.sampled_from(["a", "b", ".a", "a.1", "a.2", "", "ü"]),
        st.sampled_from([".png", ".JPG", ".txt", ".json", ".cls", ".npy", ".seg.png", "", "."]),
    ).map("".join),
    max_size=12,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(NAMES)
def test_every_name_belongs_to_the_row_that_webdataset_puts_it_into(tmp_path: Path, names: list[str]) -> None:
    """Against webdataset's own expression: the same keys in the same order, and every image is read or named."""
    path = tmp_path / "0.tar"
    names = [name for name in names if name.strip("/") and not name.endswith("/")]
    archive(path, [(name, png(n + 1)) for n, name in enumerate(names)])
    expected: list[tuple[str, list[str]]] = []
    for name in names:
        match = WEBDATASET.match(name)
        if match is None or name.rpartition("/")[2].startswith(".") or not match[2]:
            continue
        if not expected or expected[-1][0] != match[1]:
            expected.append((match[1], []))
        expected[-1][1].append(match[2].lower())
    kept = ("png", "jpg", "txt", "json", "cls")
    expected = [(key, [k for k in kinds if k.rpartition(".")[2] in kept]) for key, kinds in expected]
    expected = [(key, kinds) for key, kinds in expected if kinds]
    if not expected:
        with pytest.raises(UserError, match="holds no image"):
            open_images(path)
        return
    index = index_of(str(path))
    assert [(row["key"], sorted(row["members"])) for row in index] == [(k, sorted(set(kinds))) for k, kinds in expected]
    found = read(path)
    for (key, kinds), (_, value), row in zip(expected, found, index, strict=True):
        images = [kind for kind in kinds if kind.endswith(("png", "jpg"))]
        if len(set(kinds)) < len(kinds):
            assert value == "duplicate name", key
        elif not images:
            assert value in ("no image", "dots in a name"), key
        elif isinstance(value, int):  # it is one of the row's own, and the only one that could be meant
            assert len([kind for kind in images if "." not in kind]) >= 1 or len(images) == 1
        else:
            assert value in ("dots in a name", "not JSON", "wrong caption", "wrong label"), row


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_archives_are_refused_in_one_sentence(tmp_path: Path, data: st.DataObject) -> None:
    whole = bytearray(tar_bytes({f"{n}.png": png(n) for n in range(3)} | {"2.txt": b"two"}))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(whole) - 1))
        piece = data.draw(st.binary(min_size=1, max_size=12))
        whole[at : at + len(piece)] = piece
    whole = whole[: data.draw(st.integers(0, len(whole)))] if data.draw(st.booleans()) else whole
    path = tmp_path / "0.tar"
    path.write_bytes(bytes(whole))
    try:
        rows = open_images(path)
    except UserError as error:
        assert str(path) in str(error)
        return
    usable = UsableRows(rows, "here", max_bad_share=1.0, log=tmp_path / "log.jsonl")
    for n in range(len(rows)):
        usable.usable(n)
