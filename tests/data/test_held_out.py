"""Held-out rows are never trained on: of every kind of source, in mixtures, and whatever reads them how often."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from tests.data.conftest import png, tar_bytes, value_of, write_folder, write_parquet, write_shards
from unimm.class_conditional.extraction import ClassIdsConfig
from unimm.data.held_out import HeldOut
from unimm.data.image_streams import ImageDataConfig, ImageSource, held_out_images, image_stream
from unimm.data.image_streams import held_out_lines as image_lines
from unimm.data.mixture import FlowConfig, Mixture, MixtureConfig, held_out_lines, training_streams
from unimm.data.shuffling import OwnBatches
from unimm.data.sources.ids import MANIFEST, IdsInfo, IdsManifest, write_ids
from unimm.errors import UserError

ROWS = 12


def write_llava(folder: Path, count: int = ROWS) -> FlowConfig:
    folder.mkdir(exist_ok=True)
    (folder / "red.png").write_bytes(png(9))
    turns = [[{"from": "human", "value": "<image>"}, {"from": "gpt", "value": f"caption {n}"}] for n in range(count)]
    path = folder / "talk.json"
    path.write_text(json.dumps([{"image": "red.png", "conversations": each} for each in turns]))
    return FlowConfig("conversation", source=str(path), image_folder=str(folder))


def write_conversations(folder: Path) -> FlowConfig:
    import datasets

    folder.mkdir(exist_ok=True)
    rows = [
        {
            "image": {"bytes": png(n), "path": None},
            "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": f"caption {n}"}],
        }
        for n in range(ROWS)
    ]
    path = folder / "talk.parquet"
    datasets.Dataset.from_list(rows).cast_column("image", datasets.Image()).to_parquet(str(path))
    return FlowConfig("conversation", source=str(path))


def write_folder_of_ids(folder: Path) -> FlowConfig:
    info = IdsInfo("abc", 2**10, (1, 1), "test")
    shards = []
    for k in range(2):
        values = np.arange(6 * k, 6 * k + 6)
        batch = {"ids": values[:, None], "text": [f"caption {n}" for n in values]}
        write_ids(folder / f"ids-{k:05d}.parquet", info, [batch], ["text"])
        shards.append({"name": f"ids-{k:05d}.parquet", "rows": 6, "skipped": {}})
    (folder / MANIFEST).write_text(IdsManifest(info, 1.0, ["ids", "text"], shards).to_json())
    return FlowConfig("drawing", source=str(folder))


def streamed(folder: Path) -> FlowConfig:
    from unimm.data.sources.rows import ReadOptions

    read = ReadOptions(streaming=True)
    return FlowConfig("drawing", source=str(write_parquet(folder / "a.parquet", range(ROWS)).parent), read=read)


SOURCES: dict[str, Callable[[Path], FlowConfig]] = {
    "folder": lambda at: FlowConfig("drawing", source=str(write_folder(at, range(ROWS)))),
    "captions": lambda at: FlowConfig("captioning", source=str(write_folder(at, range(ROWS)))),
    "table": lambda at: FlowConfig("drawing", source=str(write_parquet(at / "a.parquet", range(ROWS)))),
    "streamed table": streamed,
    "tars": lambda at: FlowConfig("drawing", source=str(write_shards(at, 3, 4))),
    "llava": write_llava,
    "conversations": write_conversations,
    "ids": write_folder_of_ids,
}


def captions(stream: Any, count: int) -> list[str]:
    """What identifies the rows of the first samples, the flow's name in front."""
    found = []
    for n in range(count):
        sample = stream[n]
        texts = [part["text"] for turn in sample["messages"] for part in turn["content"] if part["type"] == "text"]
        found.append(f"{sample['flow']} {next(text for text in texts if text.startswith('caption'))}")
    return found


@pytest.mark.parametrize("kind", SOURCES)
def test_no_row_of_any_source_is_both_trained_on_and_evaluated_on(tmp_path: Path, kind: str) -> None:
    flow = SOURCES[kind](tmp_path / "data")
    train, test = training_streams(MixtureConfig({"flow": flow}, eval_share=0.25))
    assert test is not None
    assert train.sizes == {"flow": 9} and test.sizes == {"flow": 3}
    trained, evaluated = captions(train, 27), captions(test, 9)
    assert not set(trained) & set(evaluated)
    assert len(set(trained)) == 9 and len(set(evaluated)) == 3  # and nothing is lost: every row is in one part
    for start in (0, 9, 18):
        assert len(set(trained[start : start + 9])) == 9
    line = f"flow: 9 rows of {flow.source} to train on, 3 held out"
    assert held_out_lines(train, test) == [line]


@pytest.mark.parametrize("kind", SOURCES)
def test_the_parts_do_not_depend_on_seed_flow_or_reader(tmp_path: Path, kind: str) -> None:
    """Two flows of one source in one mixture, another seed, workers, processes, and a run taken up in the middle."""
    flow = SOURCES[kind](tmp_path / "data")
    one = MixtureConfig({"a": flow, "b": flow}, eval_share=0.25, seed=7)
    train, test = training_streams(one)
    other = training_streams(MixtureConfig({"z": flow}, eval_share=0.25, seed=1))[1]
    assert test is not None and other is not None
    evaluated = {text.partition(" ")[2] for text in captions(test, 12)}
    assert {text.partition(" ")[2] for text in captions(other, 6)} == evaluated
    expected = captions(train, 60)
    assert not {text.partition(" ")[2] for text in expected} & evaluated
    loaded: list[str] = []
    for batch in DataLoader(Few(train, 36), batch_size=3, num_workers=2, collate_fn=list):
        loaded += batch
    assert loaded == expected[:36]
    shares = [[expected[n] for n in OwnBatches(24, 60, size=2, index=k, count=2)] for k in range(2)]
    again = training_streams(one)[0]
    for k, share in enumerate(shares):
        assert [captions(Shifted(again, n), 1)[0] for n in OwnBatches(24, 60, size=2, index=k, count=2)] == share


class Few:
    """The first samples of a stream by what identifies them."""

    def __init__(self, stream: Any, length: int) -> None:
        self.stream, self.length = stream, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> str:
        return captions(Shifted(self.stream, index), 1)[0]


class Shifted:
    def __init__(self, stream: Any, start: int) -> None:
        self.stream, self.start = stream, start

    def __getitem__(self, index: int) -> Any:
        return self.stream[self.start + index]


@given(st.integers(2, 3000), st.sampled_from([0.5, 0.3, 0.1, 0.01, 0.001]), st.data())
@settings(max_examples=60, deadline=None)
def test_the_rule_parts_the_rows(rows: int, share: float, data: st.DataObject) -> None:
    rule = HeldOut(rows, share)
    parts = {split: [rule.row(n, split) for n in range(rule.count(split))] for split in ("train", "test")}
    assert sorted(parts["train"] + parts["test"]) == list(range(rows))
    assert min(map(len, parts.values())) >= 1
    assert abs(len(parts["test"]) - rows * share) <= max(1, rows * abs(1 / round(1 / share) - share) + 1)
    for split, numbers in parts.items():
        assert numbers == sorted(numbers) == rule.numbers(split).tolist()
    end = data.draw(st.integers(0, rows))
    assert rule.before(end) == sum(n < end for n in parts["test"])


def test_held_out_rows_lie_everywhere() -> None:
    """Not always at the same place of a stretch, which a sorted source could be made of."""
    places = HeldOut(100_000, 0.01).numbers("test") % 100
    counts = np.bincount(places // 10, minlength=10)
    assert counts.sum() == 1000 and (abs(counts - 100) < 50).all()  # 5 standard deviations


def test_small_sources(tmp_path: Path) -> None:
    two = FlowConfig("drawing", source=str(write_folder(tmp_path / "two", range(2))))
    train, test = training_streams(MixtureConfig({"flow": two}))
    assert train.sizes == {"flow": 1} and test is not None and test.sizes == {"flow": 1}
    assert set(captions(train, 4)) != set(captions(test, 4))
    one = FlowConfig("drawing", source=str(write_folder(tmp_path / "one", range(1))))
    with pytest.raises(UserError, match=r"one holds 1 row, so none of its rows is held out.*eval_source"):
        training_streams(MixtureConfig({"flow": one}))
    with pytest.raises(UserError, match="two has eval_share 0"):
        training_streams(MixtureConfig({"flow": two}, eval_share=0))
    train, test = training_streams(MixtureConfig({"flow": one}, num_eval_samples=0))
    assert test is None and train.sizes == {"flow": 1}
    with pytest.raises(UserError, match=r"between 0 .* and 0\.5, and is 0\.7"):
        MixtureConfig({"flow": one}, eval_share=0.7)


def test_an_eval_source_leaves_all_rows_to_training(tmp_path: Path) -> None:
    paths = [
        write_parquet(tmp_path / name, range(*span)) for name, span in (("a.parquet", (0, 6)), ("b.parquet", (6, 8)))
    ]
    flow = FlowConfig("drawing", source=str(paths[0]), eval_source=str(paths[1]))
    train, test = training_streams(MixtureConfig({"flow": flow}))
    assert test is not None
    assert set(captions(train, 6)) == {f"flow caption {n}" for n in range(6)}
    assert set(captions(test, 2)) == {"flow caption 6", "flow caption 7"}
    said = f"flow: 6 rows of {paths[0]} to train on, 2 held out in {paths[1]}"
    assert held_out_lines(train, test) == [said]
    talk = write_llava(tmp_path / "llava")
    other = tmp_path / "llava" / "other.json"
    other.write_text(json.dumps(json.loads(Path(talk.source).read_text())[:2]))
    talk = FlowConfig("conversation", source=talk.source, eval_source=str(other), image_folder=talk.image_folder)
    train, test = training_streams(MixtureConfig({"flow": talk}))
    assert test is not None and (train.sizes, test.sizes) == ({"flow": ROWS}, {"flow": 2})


def test_a_mixture_that_trains_on_held_out_rows_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    a, b = (str(write_parquet(folder / name, range(4))) for name in ("a.parquet", "b.parquet"))

    def refused(message: str, **flows: FlowConfig) -> None:
        with pytest.raises(UserError, match=message):
            Mixture(MixtureConfig(flows))

    refused("eval_source .*a.parquet is trained on too", x=FlowConfig("drawing", source=a, eval_source=a))
    refused("is trained on too", x=FlowConfig("drawing", source=a, eval_source=b), y=FlowConfig("captioning", source=b))
    refused(
        "hold the same rows", x=FlowConfig("drawing", source=a, eval_source=b), y=FlowConfig("captioning", source=a)
    )
    refused("hold the same rows", x=FlowConfig("drawing", source=str(folder)), y=FlowConfig("captioning", source=a))
    pattern = str(folder / "*.parquet")
    refused("hold the same rows", x=FlowConfig("drawing", source=pattern), y=FlowConfig("captioning", source=a))
    with pytest.raises(UserError, match="is trained on too"):
        ClassIdsConfig(a, str(folder / ".." / "data" / "a.parquet"), str(tmp_path))
    with pytest.raises(UserError, match="is trained on too"):
        image_stream(ImageDataConfig(a, eval_source=a), 1, seed=0)


def test_a_bad_held_out_row_is_replaced_by_a_held_out_one(tmp_path: Path) -> None:
    rule = HeldOut(ROWS, 0.25)
    bad, *good = (rule.row(n, "test") for n in range(3))
    path = write_parquet(tmp_path / "a.parquet", range(ROWS), {bad: b"<html>"})
    flow = FlowConfig("drawing", source=str(path), max_bad_share=0.2)
    config = MixtureConfig({"flow": flow}, eval_share=0.25)
    _, test = training_streams(config, log_folder=tmp_path / "log")
    assert set(captions(test, 6)) == {f"flow caption {n}" for n in good}
    named = [json.loads(line)["row"] for line in (tmp_path / "log" / "flow.skipped.jsonl").read_text().splitlines()]
    assert set(named) == {bad}  # by the source's number
    write_parquet(tmp_path / "b.parquet", range(ROWS), dict.fromkeys([bad, *good], b"<html>"))
    flow = FlowConfig("drawing", source=str(tmp_path / "b.parquet"), max_bad_share=0.5)
    with pytest.raises(UserError, match=r"held-out rows\): none of 3 rows .* 3 damaged image"):
        training_streams(MixtureConfig({"flow": flow}, eval_share=0.25))


def test_images_for_a_tokenizer(tmp_path: Path) -> None:
    """The panel's images are not those that are trained on, and show neither crops nor mirror images."""
    write_shards(tmp_path / "tars", 2, 6)
    write_folder(tmp_path / "folder", range(100, 108))
    write_folder(tmp_path / "single", range(200, 201))
    places = [str(tmp_path / name) for name in ("tars", "folder", "single")]
    config = ImageDataConfig(mix=[ImageSource(place) for place in places], image_size=8, flip=True, eval_share=0.25)
    train, test = image_stream(config, 300, seed=3), held_out_images(config, 10, seed=3)
    assert test is not None
    shown = [{value_of(stream[n]) for n in range(len(stream))} for stream in (train, test)]
    assert not shown[0] & shown[1]
    assert len(shown[0]) == 9 + 6 + 1 and len(shown[1]) == 3 + 2
    assert (test.config.flip, test.config.random_crop) == (False, False)
    assert image_lines(train, test)[0] == f"{places[0]}: 9 rows to train on, 3 held out"
    assert image_lines(train, test)[2] == f"{places[2]}: 1 rows to train on, 0 held out"
    assert held_out_images(ImageDataConfig(), 8, seed=0) is None
    own = ImageDataConfig(places[0], eval_source=places[1], image_size=8)
    test = held_out_images(own, 8, seed=0)
    assert test is not None and {value_of(test[n]) for n in range(8)} == set(range(100, 108))
    assert len({value_of(image_stream(own, 12, seed=0)[n]) for n in range(12)}) == 12


def test_classes_are_held_out_before_they_are_mirrored(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", range(ROWS))
    config = ClassIdsConfig(str(path), folder=str(tmp_path), eval_share=0.25, num_eval_images=2)
    trained, evaluated = (config.images_of(split) for split in ("train", "test"))
    labels = [{images[n]["label"] for n in range(len(images))} for images in (trained, evaluated)]
    assert (len(labels[0]), len(labels[1])) == (9, 2) and not labels[0] & labels[1]
    for images in (trained, evaluated):
        assert all(value_of(images[n]) == images[n]["label"] for n in range(len(images)))
    assert config.made_from("train") == f"all images of {path}, without the held-out share 0.25 and their mirror images"
    with pytest.raises(UserError, match="eval_share 0 holds nothing out"):
        ClassIdsConfig(str(path), folder=str(tmp_path), eval_share=0)


def test_shapes_keep_their_own_held_out_part() -> None:
    config = MixtureConfig({"draw": FlowConfig("drawing")}, num_eval_samples=4)
    train, test = training_streams(config)
    assert train.sizes == {} and test is not None and len(test) == 4 and held_out_lines(train, test) == []
    with pytest.raises(UserError, match="shapes has a held-out part of its own"):
        FlowConfig("drawing", eval_source="other")


def test_tar_rows_keep_their_blocks(tmp_path: Path) -> None:
    """A shard whose only row is held out has none to train on."""
    for k in range(3):
        (tmp_path / f"{k}.tar").write_bytes(tar_bytes({"x.png": png(k), "x.txt": f"caption {k}".encode()}))
    flow = FlowConfig("drawing", source=str(tmp_path))
    train, test = training_streams(MixtureConfig({"flow": flow}, eval_share=0.5))
    assert test is not None
    assert set(captions(train, 8)) | set(captions(test, 8)) == {f"flow caption {n}" for n in range(3)}
    assert not set(captions(train, 8)) & set(captions(test, 8))
