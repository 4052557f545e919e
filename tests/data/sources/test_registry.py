"""Every form of source gives the same rows, and what is wrong with one is one sentence."""

import json
import os
import pickle
from dataclasses import fields

import pytest

from tests.data.conftest import (
    png,
    rows_as_members,
    tar_bytes,
    torn_png,
    value_of,
    write_folder,
    write_parquet,
    write_shards,
)
from unimm.data.bad_rows import BadRow, Filtered
from unimm.data.image_streams import ImageDataConfig, ImageSource, image_stream
from unimm.data.mixture import FlowConfig, Mixture, MixtureConfig
from unimm.data.sources.registry import open_images
from unimm.data.sources.rows import ReadOptions
from unimm.data.sources.storage import listed
from unimm.errors import UserError


def all_rows(source, options=None):
    rows = open_images(str(source), options)
    return [(value_of(row), row["text"]) for row in (rows[n] for n in range(len(rows)))]


EXPECTED = [(n, f"caption {n}") for n in range(8)]


def test_every_form_gives_the_same_rows(tmp_path, memory):
    write_shards(tmp_path / "tars", 2, 4)
    for k in range(2):
        memory.pipe(f"/far/{k:03d}.tar", (tmp_path / f"tars/{k:03d}.tar").read_bytes())
        write_parquet(tmp_path / f"tables/train-{k}.parquet", range(4 * k, 4 * k + 4))
        memory.pipe(f"/far/{k}.parquet", (tmp_path / f"tables/train-{k}.parquet").read_bytes())
    write_folder(tmp_path / "folder", range(8))
    local = [tmp_path / place for place in ("tars", "tars/{000..001}.tar", "tars/*.tar", "tables", "folder")]
    local += [tmp_path / "tables/*.parquet", f"hub:{tmp_path / 'tables'}"]
    far = ["memory://far/{000..001}.tar", "memory://far/*.tar", "memory://far/{0..1}.parquet"]
    for source in (*local, *far):
        assert all_rows(source) == EXPECTED, source
    streaming = ReadOptions(streaming=True)
    for source in (tmp_path / "tables", f"hub:{tmp_path / 'tables'}"):
        rows = open_images(str(source), streaming)
        assert rows.blocks.tolist() == [3, 1, 3, 1]  # read in place, by row groups
        assert all_rows(source, streaming) == EXPECTED


def test_an_option_that_a_source_does_not_have_is_refused(tmp_path):
    write_folder(tmp_path / "folder", range(2))
    write_parquet(tmp_path / "a.parquet", range(2))
    (tmp_path / "a.tar").write_bytes(tar_bytes({"a.png": png(1)}))
    has = {
        "folder": {"text_column", "target_column", "max_aspect_ratio", "min_side"},
        "a.parquet": {"streaming", "image_column", "text_column", "target_column", "max_aspect_ratio", "min_side"},
        "a.tar": {"streaming", "text_column", "max_aspect_ratio", "min_side"},
    }
    values = {"split": "test", "subset": "small", "streaming": True, "image_column": "photo", "text_column": "caption"}
    values |= {"max_aspect_ratio": 9.0, "min_side": 1, "target_column": "edited"}
    assert set(values) == {option.name for option in fields(ReadOptions)}
    for name, value in values.items():
        for source, options in has.items():
            place, read = tmp_path / source, ReadOptions(**{name: value})
            if name not in options:
                with pytest.raises(UserError, match=rf"^read.{name} is {value!r} and does not apply to {place}, a "):
                    open_images(place, read)
                assert len(open_images(place, read, strict=False)) > 0  # for eval_source beside a source that has it
            elif (name, source) != ("image_column", "a.parquet"):  # which has no column of that name
                assert len(open_images(place, read)) > 0
    with pytest.raises(UserError, match=r"read.min_side is 9 and does not apply to talk.json, .* no read options"):
        FlowConfig("conversation", source="talk.json", image_folder="here", read=ReadOptions(min_side=9))


def test_names_in_tar_files_that_are_no_utf8(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    members = {f"{name}.png": png(1), f"{name}.txt": b"one", "a.png": png(2), "a.json": b'{"text": "two \\ud83d"}'}
    (tmp_path / "a.tar").write_bytes(tar_bytes(members))
    rows = open_images(tmp_path / "a.tar")
    assert (rows[0]["key"], rows[0]["text"], value_of(rows[0])) == ("caf\\udce9", "one", 1)
    with pytest.raises(BadRow, match="half a character"):
        rows[1]


def test_metadata_of_an_imagefolder(tmp_path):
    write_folder(tmp_path / "below", range(3))
    lines = [{"file_name": f"below/{n:03d}.png", "text": f"other {n}", "prompt": f"prompt {n}"} for n in range(2)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    assert [text for _, text in all_rows(tmp_path)] == ["other 0", "other 1", "caption 2"]
    assert [text for _, text in all_rows(tmp_path, ReadOptions(text_column="prompt"))][:2] == ["prompt 0", "prompt 1"]
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png"}\n{"file_name": \n')
    with pytest.raises(UserError, match=r"metadata.jsonl, line 2 is not JSON: .* in column \d+"):
        open_images(tmp_path)
    (tmp_path / "metadata.jsonl").write_text('{"name": "a.png"}\n')
    with pytest.raises(UserError, match="line 1 has no file_name"):
        open_images(tmp_path)


def test_fields_beside_a_image_of_a_tar(tmp_path):
    members = {
        "b/1.png": png(1),
        "b/1.mask.png": b"not read: there is a plain one",
        "b/1.json": b'{"id": 7}',
        "b/1.cls": b"3",
    }
    (tmp_path / "0.tar").write_bytes(tar_bytes(members))
    (row,) = [open_images(tmp_path / "0.tar")[0]]
    assert (row["key"], row["id"], row["cls"], row["text"]) == ("b/1", 7, 3, "")


def test_bad_rows_of_a_tar(tmp_path):
    members = rows_as_members([0]) | {
        "1.txt": b"alone",
        "2.png": b"<!DOCTYPE html><html>404</html>",
        "3.png": torn_png(),
    }
    members |= {"4.png": png(4), "4.json": b"{", "5.png": png(5), "5.txt": b"\xff", "6.png": b""}
    (tmp_path / "0.tar").write_bytes(tar_bytes(members))
    rows = open_images(tmp_path / "0.tar")
    found = {}
    for n in range(1, len(rows)):
        with pytest.raises(BadRow) as bad:
            rows[n]
        found[n] = (bad.value.reason, bad.value.detail)
    reasons = ["no image", "damaged image", "damaged image", "not JSON", "wrong caption", "damaged image"]
    assert [found[n][0] for n in range(1, 7)] == reasons
    assert "2 in " in found[2][1] and "it is a web page" in found[2][1]
    assert "cut off or damaged" in found[3][1] and "the file is empty" in found[6][1]


def test_an_index_is_made_once_and_again_where_the_file_changed(tmp_path):
    place = tmp_path / "0.tar"
    place.write_bytes(tar_bytes(rows_as_members(range(3))))
    assert len(open_images(place)) == 3
    cached = {path: path.stat().st_mtime_ns for path in (tmp_path.parent / "cache/shards").iterdir()}
    assert len(open_images(place)) == 3
    assert {path: path.stat().st_mtime_ns for path in cached} == cached
    place.write_bytes(tar_bytes(rows_as_members(range(5))))
    os.utime(place, (1, 1))
    assert len(open_images(place)) == 5


def test_filters_look_at_the_size(tmp_path):
    for name, size in (("a", (40, 10)), ("b", (30, 10)), ("c", (8, 8))):
        (tmp_path / f"{name}.png").write_bytes(png(1, size))
    rows = open_images(tmp_path, ReadOptions(max_aspect_ratio=3, min_side=9))
    with pytest.raises(Filtered, match="40 x 10 pixels, max_aspect_ratio 3"):
        rows[0]
    assert rows[1]["image"].size == (30, 10)
    with pytest.raises(Filtered, match="8 x 8 pixels, min_side 9"):
        rows[2]
    with pytest.raises(UserError, match="at least 1, and is 0.5"):
        ReadOptions(max_aspect_ratio=0.5)


def test_patterns():
    assert listed("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert listed("{0..1}/{0..1}.tar") == ["0/0.tar", "0/1.tar", "1/0.tar", "1/1.tar"]
    with pytest.raises(UserError, match=r"\{3..1\} in a\{3..1\} runs backwards"):
        listed("a{3..1}")


def cut(folder, size):
    data = (folder / "001.tar").read_bytes()
    (folder / "001.tar").write_bytes(data[:size])


BAD = {
    "a missing shard": (lambda f: (f / "001.tar").unlink(), "{000..002}.tar", r"no file .*001\.tar"),
    "a missing parquet": (lambda f: None, "{0..1}.parquet", r"no parquet file .*0\.parquet"),
    "nothing matches": (lambda f: None, "*.parquet", r"No file matches .*\*\.parquet"),
    "cut in an image": (lambda f: cut(f, 700), "*.tar", r"001\.tar is cut off"),
    "cut between rows": (lambda f: cut(f, 4096), "*.tar", r"001\.tar is cut off.*behind its 2 rows"),
    "a web page": (lambda f: (f / "001.tar").write_text("<html>" * 200), "*.tar", r"001\.tar is no tar file"),
    "an empty file": (lambda f: (f / "001.tar").write_bytes(b""), "*.tar", r"001\.tar is no tar file"),
    "an empty tar": (lambda f: (f / "001.tar").write_bytes(tar_bytes({})), "*.tar", r"001\.tar holds no image"),
    "no parquet inside": (lambda f: (f / "a.parquet").write_text("x"), "a.parquet", "not a readable parquet"),
    "another kind": (lambda f: (f / "a.zip").write_text("x"), "a.zip", r"end in \.zip"),
    "nothing there": (lambda f: None, "absent", r"There is no .*absent"),
    "an empty folder": (lambda f: (f / "empty").mkdir(), "empty", "holds no image"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_sources(tmp_path, name):
    spoil, source, message = BAD[name]
    spoil(write_shards(tmp_path, 3, 2))
    with pytest.raises(UserError, match=message):
        open_images(tmp_path / source)


def test_bad_sources_of_tables(tmp_path, memory):
    import datasets

    with pytest.raises(UserError, match="memory://far/a.parquet"):
        open_images("memory://far/a.parquet")
    datasets.Dataset.from_dict({"image": []}).to_parquet(str(tmp_path / "empty.parquet"))
    for options in (ReadOptions(), ReadOptions(streaming=True)):
        with pytest.raises(UserError, match="holds no rows|corresponds to no data"):
            open_images(tmp_path / "empty.parquet", options)
    write_parquet(tmp_path / "tables/train.parquet", range(2))
    with pytest.raises(UserError, match="no column 'photo'; its columns are image, text, label"):
        open_images(tmp_path / "tables", ReadOptions(image_column="photo"))
    with pytest.raises(UserError, match="no files for the split 'test'; it has train"):
        open_images(f"hub:{tmp_path / 'tables'}", ReadOptions(split="test", streaming=True))
    with pytest.raises(UserError, match="hub data set: there is no .*absent"):
        open_images(f"hub:{tmp_path / 'absent'}")


def test_missing_captions_stop_a_run_at_its_start(tmp_path):
    write_folder(tmp_path / "folder", range(2))
    for path in (tmp_path / "folder").glob("*.txt"):
        path.unlink()
    (tmp_path / "0.tar").write_bytes(tar_bytes({"0.png": png(0)}))
    write_parquet(tmp_path / "a.parquet", range(2))
    for source, why in (("folder", ".txt beside it"), ("0.tar", ".txt, .json"), ("a.parquet", "no column 'caption'")):
        flow = FlowConfig("drawing", source=str(tmp_path / source), read=ReadOptions(text_column="caption"))
        with pytest.raises(UserError, match=f"{source} has no captions: .*{why}"):
            Mixture(MixtureConfig({"draw": flow}))


def test_sources_mix_at_their_weights(tmp_path):
    write_folder(tmp_path / "a", range(5))
    write_shards(tmp_path / "b", 2, 5)
    mix = [ImageSource(str(tmp_path / "a"), 3.0), ImageSource("shapes", 1.0), ImageSource(str(tmp_path / "b"))]
    stream = image_stream(ImageDataConfig(mix=mix, image_size=8, eval_share=0), 1000, seed=0)
    texts = [stream[n]["text"] for n in range(100)]
    assert sum("caption" not in text for text in texts) == 20
    assert stream.sizes == {str(tmp_path / "a"): 5, str(tmp_path / "b"): 10}
    again = image_stream(ImageDataConfig(mix=mix, image_size=8, eval_share=0), 1000, seed=0)
    assert [again[n]["text"] for n in (77, 3)] == [texts[77], texts[3]]
    with pytest.raises(UserError, match="either data.source"):
        ImageDataConfig(source=str(tmp_path / "a"), mix=mix)


def test_images_to_describe(tmp_path):
    write_shards(tmp_path, 1, 4)
    flow = FlowConfig("captioning", source=str(tmp_path), question="What is it?")
    stream = Mixture(MixtureConfig({"captions": flow, "draw": FlowConfig("drawing")}, eval_share=0))
    assert stream.sizes == {"captions": 4}  # a run does not go on with other numbers
    sample = Mixture(MixtureConfig({"captions": flow}))[1]
    asked, answered = sample["messages"]
    assert [part["type"] for part in asked["content"]] == ["image", "text"]
    number = value_of(asked["content"][0])
    assert (asked["content"][1]["text"], answered["content"][0]["text"]) == ("What is it?", f"caption {number}")
    with pytest.raises(UserError, match="captioning needs a source"):
        FlowConfig("captioning")


def test_sources_travel_to_worker_processes(tmp_path):
    write_shards(tmp_path / "tars", 2, 3)
    write_parquet(tmp_path / "tables/a.parquet", range(4))
    for source, options in ((tmp_path / "tars", None), (tmp_path / "tables", ReadOptions(streaming=True))):
        rows = open_images(source, options)
        assert value_of(pickle.loads(pickle.dumps(rows))[2]) == value_of(rows[2])
