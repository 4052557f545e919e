"""Streams: every sample is a function of (seed, n), shares hold in every batch, and tables are passed through whole."""

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from unimm.data.mixture import FlowConfig, Mixture, MixtureConfig
from unimm.data.shuffling import interleave
from unimm.data.text_to_image import ShapesDrawings, drawing
from unimm.errors import UserError


def mixture(split: str = "train", seed: int = 0, **flows: FlowConfig) -> Mixture:
    flows = flows or {
        "talk": FlowConfig("conversation", 0.25),
        "draw": FlowConfig("drawing", 0.75, null_prompt_prob=0.2),
    }
    return Mixture(MixtureConfig(flows=flows, seed=seed, num_eval_samples=8, eval_share=0), split=split)


def plain(sample: dict[str, Any]) -> str:
    """A sample as text, images as their bytes."""
    return json.dumps(sample, default=lambda image: image.tobytes().hex(), sort_keys=True)


def text_of(messages: list[dict[str, Any]]) -> str:
    return "".join(part.get("text", "") for turn in messages for part in turn["content"])


def test_a_sample_is_a_function_of_seed_and_position() -> None:
    stream, again = mixture(), mixture()
    backwards = [plain(again[index]) for index in reversed(range(20))][::-1]
    assert [plain(stream[index]) for index in range(20)] == backwards
    assert plain(mixture(seed=1)[0]) != plain(stream[0])
    assert len({plain(stream[index]) for index in range(40)}) == 40


def test_a_sample_holds_images_and_messages() -> None:
    for index in range(12):
        sample = mixture()[index]
        assert sample["index"] == index
        shown_by = [turn["role"] for turn in sample["messages"] for part in turn["content"] if part["type"] == "image"]
        assert shown_by == (["assistant"] if sample["kind"] == "drawing" else ["user"])
        roles = [turn["role"] for turn in sample["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        images = [part["image"] for turn in sample["messages"] for part in turn["content"] if part["type"] == "image"]
        assert images[0].size == (64, 64)


def test_the_shares_hold_in_every_batch() -> None:
    order = interleave([0.75, 0.25])
    assert np.bincount(order).tolist() == [750, 250]
    windows = [np.bincount(np.roll(order, -start)[:64], minlength=2).tolist() for start in range(1000)]
    assert all(abs(drawings - 48) <= 1 for drawings, _ in windows)


def test_a_share_that_never_comes_up_is_refused() -> None:
    with pytest.raises(UserError, match="1/1000"):
        interleave([1.0, 1e-5])
    with pytest.raises(UserError, match="ratio"):
        MixtureConfig(flows={"talk": FlowConfig("conversation", 0.0)})


def test_the_null_prompt_comes_as_often_as_asked() -> None:
    flow = ShapesDrawings(0, null_prompt_prob=0.1)
    dropped = sum(text_of(flow.messages(index)) == "" for index in range(2000))
    assert 160 < dropped < 240  # 200 +- 3 standard deviations
    held_out = mixture("test", draw=FlowConfig("drawing", null_prompt_prob=0.5))
    assert all(text_of(held_out[index]["messages"]) for index in range(8))
    with pytest.raises(UserError, match=r"\[0, 1\)"):
        ShapesDrawings(0, null_prompt_prob=1.0)


def test_the_recorded_null_prompt_rate_is_that_of_the_drawings() -> None:
    assert mixture().config.null_prompt_prob == pytest.approx(0.2)
    assert mixture(talk=FlowConfig("conversation")).config.null_prompt_prob == 0.0


def test_held_out_captions_are_never_trained_on() -> None:
    trained = {text_of(ShapesDrawings(3, split="train").messages(index)) for index in range(300)}
    held_out = {text_of(ShapesDrawings(3, split="test").messages(index)) for index in range(300)}
    assert not trained & held_out


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    import datasets

    image = io.BytesIO()
    Image.new("RGB", (96, 64), "red").save(image, "png")
    table = [{"image": {"bytes": image.getvalue(), "path": None}, **row} for row in rows]
    datasets.Dataset.from_list(table).cast_column("image", datasets.Image()).to_parquet(str(path))
    return path


def test_captioned_images_of_ones_own(tmp_path: Path) -> None:
    path = write_table(tmp_path / "drawings.parquet", [{"text": f"caption {n}"} for n in range(5)])
    stream = mixture(draw=FlowConfig("drawing", source=str(path)))
    captions = [text_of(stream[index]["messages"]) for index in range(15)]
    for start in (0, 5, 10):
        assert Counter(captions[start : start + 5]) == Counter(f"caption {n}" for n in range(5))
    assert captions[:5] != captions[5:10]
    assert stream[0]["messages"][1]["content"][0]["image"].size == (64, 64)


def test_conversations_of_ones_own(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "red"}]
    path = write_table(tmp_path / "talk.parquet", [{"messages": turns}])
    messages = mixture(talk=FlowConfig("conversation", source=str(path)))[3]["messages"]
    assert [part["type"] for part in messages[0]["content"]] == ["image", "text"]
    assert text_of(messages) == "What is it?red"


def test_a_table_without_the_columns_is_refused(tmp_path: Path) -> None:
    path = write_table(tmp_path / "bare.parquet", [{"label": 1}])
    for flow in (FlowConfig("drawing", source=str(path)), FlowConfig("conversation", source=str(path))):
        with pytest.raises(UserError, match="its columns are image, label"):
            mixture(only=flow)


def test_a_drawing_is_an_answer() -> None:
    image = Image.new("RGB", (8, 8))
    asked, drawn = drawing("a circle", image)
    assert asked == {"role": "user", "content": [{"type": "text", "text": "a circle"}]}
    assert drawn == {"role": "assistant", "content": [{"type": "image", "image": image}]}
