"""Bad rows: what stands in for them is a function of the data, they are counted and named, and too many stop a run."""

import json
import os

import pytest
from torch.utils.data import DataLoader

from tests.data.conftest import png, torn_png, value_of, write_folder, write_parquet
from unimm.data.bad_rows import Skipped, UsableRows
from unimm.data.image_streams import ImageDataConfig, image_stream
from unimm.data.sources.registry import open_images
from unimm.data.sources.rows import ReadOptions
from unimm.errors import UserError, one_line

PAGE = b"<!DOCTYPE html><html><body>403</body></html>"
BROKEN = {2: PAGE, 3: torn_png(), 9: b""}


def test_names_and_captions_that_are_no_utf8_are_named_in_the_log(tmp_path):
    """A folder whose files have bytes in their names, a torn one among them, and half a character in a caption."""
    folder, name = tmp_path / "pictures", os.fsdecode(b"caf\xe9")
    write_folder(folder, range(4))
    (folder / f"{name}-torn.png").write_bytes(torn_png())
    (folder / f"{name}.png").write_bytes(png(9))
    lines = [{"file_name": f"{name}.png", "text": "nine"}, {"file_name": "000.png", "text": "zero \ud83d"}]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    log = tmp_path / "bad.jsonl"
    rows = UsableRows(open_images(folder), str(folder), max_bad_share=0.5, log=log)
    found = [rows.usable(n) for n in range(len(rows))]
    assert sum(not isinstance(row, Skipped) for row in found) == 4
    skipped = [Skipped(**line) for line in map(json.loads, log.read_text(encoding="utf-8").splitlines())]
    assert {line.reason for line in skipped} == {"damaged image", "half a character"}
    assert skipped == [row for row in found if isinstance(row, Skipped)]
    assert name in next(line.detail for line in skipped if line.reason == "damaged image")
    keys = [row["key"] for row in found if not isinstance(row, Skipped)]
    assert "caf\\udce9.png" in keys and "\n".join(keys).encode("utf-8")


@pytest.fixture
def table(tmp_path):
    return write_parquet(tmp_path / "a.parquet", range(10), BROKEN)


def test_the_next_usable_row_stands_in(table):
    rows = UsableRows(open_images(table), "a", max_bad_share=0.3)
    assert [value_of(rows[n]) for n in range(10)] == [0, 1, 4, 4, 4, 5, 6, 7, 8, 0]
    assert [isinstance(rows.usable(n), Skipped) for n in range(10)] == [n in BROKEN for n in range(10)]


def test_streams_are_the_same_for_any_number_of_workers(table, tmp_path):
    def values(name, workers):
        config = ImageDataConfig(str(table), image_size=8, max_bad_share=0.3, eval_share=0)
        stream = image_stream(config, 40, seed=1, log_folder=tmp_path / name)
        return [
            n for batch in DataLoader(stream, 4, num_workers=workers, collate_fn=list) for n in map(value_of, batch)
        ]

    expected = values("none", 0)
    assert values("two", 2) == expected
    assert not {2, 3, 9} & set(expected)
    for name in ("none", "two"):
        lines = [json.loads(line) for line in (tmp_path / name / "images-0.jsonl").read_text().splitlines()]
        assert {line["row"] for line in lines} == {2, 3, 9}
        assert {line["reason"] for line in lines} == {"damaged image"}
        assert "row 2 of " in next(line["detail"] for line in lines if line["row"] == 2)


def test_too_many_bad_rows_stop_the_run(table, tmp_path):
    config = ImageDataConfig(str(table), image_size=8, max_bad_share=0.2, eval_share=0)
    stream = image_stream(config, 40, seed=1, log_folder=tmp_path)
    message = r"a\.parquet: 3 of \d+ rows \(\d+\.\d%\) cannot be used, more than max_bad_share 20.0%: 3 damaged image"
    with pytest.raises(UserError, match=message):
        list(DataLoader(stream, 4, collate_fn=list))
    stream = image_stream(config, 40, seed=1)
    with pytest.raises(UserError) as caught:
        list(DataLoader(stream, 4, collate_fn=list, num_workers=1))
    assert one_line(caught.value).startswith(str(table))


@pytest.mark.slow
def test_a_bad_row_from_a_worker_process_is_one_sentence_too(table):
    with pytest.raises(UserError) as caught:
        list(DataLoader(open_images(table), 4, collate_fn=list, num_workers=1))
    assert one_line(caught.value) == f"Cannot read the image row 2 of {table}: it is a web page."


def test_what_the_run_filters_out_is_no_fault_of_the_data(tmp_path):
    folder = write_folder(tmp_path, range(6))
    (folder / "004.png").write_bytes(png(4, (100, 8)))
    (folder / "001.png").write_bytes(png(1, (7, 7)))
    options = ReadOptions(max_aspect_ratio=2, min_side=8)
    rows = UsableRows(open_images(folder, options), "a", max_bad_share=0.0, log=tmp_path / "log.jsonl")
    assert [value_of(rows[n]) for n in range(6)] == [0, 2, 2, 3, 5, 5]
    assert rows.count.bad == [] and not (tmp_path / "log.jsonl").exists()
    assert rows.usable(4) == Skipped(4, "too long", "100 x 8 pixels, max_aspect_ratio 2", filtered=True)


def test_an_empty_caption_is_a_bad_row_where_captions_are_learned(tmp_path):
    folder = write_folder(tmp_path, range(4))
    (folder / "002.txt").write_text("  \n")
    (folder / "003.txt").write_bytes(b"\xff\xfe")
    rows = UsableRows(open_images(folder), "a", captions=True, max_bad_share=0.5)
    assert [rows[n]["text"] for n in range(4)] == ["caption 0", "caption 1", "caption 0", "caption 0"]
    assert [bad.reason for bad in rows.count.bad] == ["no caption", "wrong caption"]


def test_a_source_with_nothing_left_says_why(tmp_path):
    rows = UsableRows(open_images(write_folder(tmp_path, range(3)), ReadOptions(min_side=99)), "here")
    with pytest.raises(UserError, match="here: none of 3 rows from row 1 on is left: 3 too small"):
        rows[1]
