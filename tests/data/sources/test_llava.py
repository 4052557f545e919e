"""LLaVA's files: every shape of row that they hold, what is skipped and how that is told, and the order by modality."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from unimm.data.grouping import POOL, grouped_order
from unimm.data.mixture import FlowConfig, Mixture, MixtureConfig
from unimm.data.sources.llava import IMAGE_LENGTH, LlavaConversations, LlavaOptions
from unimm.errors import UserError, one_line

ANSWER = {"from": "gpt", "value": "A cat."}


def human(value: str) -> dict[str, str]:
    return {"from": "human", "value": value}


def gpt(value: str) -> dict[str, str]:
    return {"from": "gpt", "value": value}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, color in (("red.png", "red"), ("blue.jpg", "blue")):
        Image.effect_noise((60, 40), 60).convert("RGB").save(folder / f"noise-{name}")
        Image.new("RGB", (60, 40), color).save(folder / name)
    return folder


def llava(path: Path, records: list[Any], images: Path, **options: Any) -> LlavaConversations:
    path.write_text(json.dumps(records), encoding="utf-8")
    return LlavaConversations(path, LlavaOptions(images, **{"max_bad_share": 1.0, **options}))


def shown(messages: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """Roles with their texts; images by their size."""
    return [
        (
            turn["role"],
            [part["text"] if part["type"] == "text" else str(part["image"].size) for part in turn["content"]],
        )
        for turn in messages
    ]


def test_half_characters_and_names_that_are_no_utf8(tmp_path: Path, images: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    Image.new("RGB", (9, 9), "red").save(images / name)
    torn = os.fsdecode(b"torn\xe9.png")
    (images / torn).write_bytes((images / "noise-red.png").read_bytes()[:1000])
    records = [
        {"image": name, "conversations": [human("<image>"), ANSWER]},
        {"conversations": [human("what\ud83d?"), ANSWER]},
        {"conversations": [human("what?"), gpt("half \ude00")]},
        {"image": "\ud800.png", "conversations": [human("<image>"), ANSWER]},
        {"image": "x" * 5000, "conversations": [human("<image>"), ANSWER]},
        {"image": torn, "conversations": [human("<image>"), ANSWER]},
    ]
    rows = llava(tmp_path / "a.json", records, images, log=tmp_path / "bad.jsonl")
    assert len(rows) == 2 and shown(rows.messages(0))[0] == ("user", ["(9, 9)"])
    assert shown(rows.messages(1)) == shown(rows.messages(0))  # the torn one is found when it is read
    lines = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(line["row"], line["reason"]) for line in lines] == [
        (1, "half a character"),
        (2, "half a character"),
        (3, "missing image"),
        (4, "missing image"),
        (5, "damaged image"),
    ]
    assert torn in lines[-1]["detail"]


def test_the_shapes_of_rows_that_the_files_hold(tmp_path: Path, images: Path) -> None:
    """558K and 595K: an image before or behind an instruction; mix665k: several turns, and none with an image."""
    size = "(60, 40)"
    cases: list[tuple[dict[str, Any], list[tuple[str, list[str]]]]] = [
        (
            {"id": "558k", "image": "red.png", "conversations": [human("What is it?\n<image>"), gpt("red")]},
            [("user", [size, "\nWhat is it?"]), ("assistant", ["red"])],
        ),
        (
            {"id": "595k", "image": "red.png", "conversations": [human("<image>\nSay it."), gpt("red")]},
            [("user", [size, "\nSay it."]), ("assistant", ["red"])],
        ),
        (
            {"id": "bare", "image": "red.png", "conversations": [human("<image>"), gpt("red")]},
            [("user", [size]), ("assistant", ["red"])],
        ),
        (
            {"id": "text", "conversations": [human(" Hi "), gpt("hello"), human(""), gpt("")]},
            [("user", [" Hi "]), ("assistant", ["hello"]), ("user", [""]), ("assistant", [""])],
        ),
        (
            {
                "id": "several",
                "image": ["red.png", "blue.jpg"],
                "conversations": [human("A <image> and <image>."), gpt("no")],
            },
            [("user", ["A ", size, " and ", size, "."]), ("assistant", ["no"])],
        ),
        (
            {
                "id": "later",
                "image": "red.png",
                "conversations": [human("Hi"), gpt("hi"), human("Here: <image>"), gpt("red")],
            },
            [("user", ["Hi"]), ("assistant", ["hi"]), ("user", [size, "\nHere:"]), ("assistant", ["red"])],
        ),
        (
            {"id": "no placeholder", "image": "red.png", "conversations": [human("What?"), gpt("red")]},
            [("user", [size, "\nWhat?"]), ("assistant", ["red"])],
        ),
        (
            {"id": "answer first", "conversations": [gpt("dropped"), human("Hi"), gpt("hi"), human("unanswered")]},
            [("user", ["Hi"]), ("assistant", ["hi"]), ("user", ["unanswered"])],
        ),
        (
            {"id": "system", "conversations": [{"from": "system", "value": "Be kind."}, human("Hi"), gpt("hi")]},
            [("system", ["Be kind."]), ("user", ["Hi"]), ("assistant", ["hi"])],
        ),
    ]
    rows = llava(tmp_path / "a.json", [record for record, _ in cases], images)
    assert not rows.skipped
    for index, (_, expected) in enumerate(cases):
        assert shown(rows.messages(index)) == expected
    words = [5 + IMAGE_LENGTH, 4 + IMAGE_LENGTH, 2 + IMAGE_LENGTH, -2, 5 + IMAGE_LENGTH]
    assert rows.modality_lengths[:5].tolist() == words  # LLaVA's count: str.split of the raw values, 128 an image


def test_pretraining_keeps_the_image_of_a_question(tmp_path: Path, images: Path) -> None:
    records = [{"image": "red.png", "conversations": [human("Describe it.\n<image>"), gpt("red")]}]
    rows = llava(tmp_path / "a.json", records, images, drop_questions=True)
    assert shown(rows.messages(0)) == [("user", ["(60, 40)"]), ("assistant", ["red"])]


BAD: list[tuple[str, Any]] = [
    ("no conversation", {"id": 1}),
    ("no conversation", "text"),
    ("wrong turn", {"conversations": [{"from": "robot", "value": "?"}, ANSWER]}),
    ("wrong turn", {"conversations": [{"from": "human", "value": None}, ANSWER]}),
    ("turns out of order", {"conversations": [human("a"), human("b"), ANSWER]}),
    ("turns out of order", {"conversations": [human("a"), ANSWER, ANSWER]}),
    ("no answer", {"conversations": [human("a")]}),
    ("no answer", {"conversations": [ANSWER]}),
    ("images do not match", {"conversations": [human("<image>"), ANSWER]}),
    ("images do not match", {"image": ["red.png", "red.png"], "conversations": [human("<image>"), ANSWER]}),
    ("image outside a question", {"image": "red.png", "conversations": [human("a"), gpt("<image>")]}),
    ("wrong image field", {"image": 3, "conversations": [human("<image>"), ANSWER]}),
    ("missing image", {"image": "absent.png", "conversations": [human("<image>"), ANSWER]}),
    ("unreadable image", {"image": "page.jpg", "conversations": [human("<image>"), ANSWER]}),
    ("unreadable image", {"image": "empty.jpg", "conversations": [human("<image>"), ANSWER]}),
]


def test_bad_rows_are_skipped_counted_and_named(tmp_path: Path, images: Path) -> None:
    (images / "page.jpg").write_text("\n<!DOCTYPE html><title>404</title>")
    (images / "empty.jpg").write_bytes(b"")
    good = {"image": "red.png", "conversations": [human("<image>"), ANSWER]}
    lines = [json.dumps(record) for _, record in BAD]
    path, log = tmp_path / "a.jsonl", tmp_path / "run" / "talk.skipped.jsonl"
    path.write_text("\n".join([json.dumps(good), '{"conversations": [', *lines, json.dumps(good), ""]))
    rows = LlavaConversations(path, LlavaOptions(images, max_bad_share=0.9, log=log))
    assert len(rows) == 2
    assert [shown(rows.messages(n))[0][0] for n in (0, 1)] == ["user", "user"]
    named = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(line["row"], line["reason"]) for line in named] == [
        (1, "not JSON"),
        *((2 + n, reason) for n, (reason, _) in enumerate(BAD)),
    ]
    assert "web page" in next(line["detail"] for line in named if "page.jpg" in line["detail"])
    report = json.loads(log.with_suffix(".report.json").read_text())
    assert (report["rows"], report["usable"], report["with images"]) == (18, 2, 2)
    assert sum(report["skipped"].values()) == 16 and report["skipped"]["turns out of order"] == 2


def test_too_many_bad_rows_stop_the_run_in_one_sentence(tmp_path: Path, images: Path) -> None:
    good, bad = {"conversations": [human("a"), ANSWER]}, {"conversations": [human("a")]}
    assert len(llava(tmp_path / "a.json", [good] * 99 + [bad], images, max_bad_share=0.01)) == 99
    with pytest.raises(UserError, match=r"2 of 100 rows \(2.0%\).*more than max_bad_share 1.0%: 2 no answer.*row 98"):
        llava(tmp_path / "a.json", [good] * 98 + [bad] * 2, images, max_bad_share=0.01)
    with pytest.raises(UserError, match="no row that can be used: 1 no answer"):
        llava(tmp_path / "a.json", [bad], images)


def damaged_rows(tmp_path: Path, images: Path, share: float) -> LlavaConversations:
    whole = (images / "noise-blue.jpg").read_bytes()
    for n in (2, 3):
        (images / f"cut{n}.jpg").write_bytes(whole[: len(whole) // 2])
    names = ["red.png", "red.png", "cut2.jpg", "cut3.jpg", "noise-blue.jpg"]
    records = [{"image": name, "conversations": [human("<image>"), gpt(name)]} for name in names]
    return llava(tmp_path / "a.json", records, images, max_bad_share=share, log=tmp_path / "talk.skipped.jsonl")


def test_the_next_row_stands_in_for_a_damaged_image(tmp_path: Path, images: Path) -> None:
    rows = damaged_rows(tmp_path, images, share=0.4)
    said = [shown(rows.messages(n))[1][1][0] for n in (2, 0, 3, 4, 2)]
    assert said == ["noise-blue.jpg", "red.png", "noise-blue.jpg", "noise-blue.jpg", "noise-blue.jpg"]
    named = [json.loads(line) for line in (tmp_path / "talk.skipped.jsonl").read_text().splitlines()]
    assert [(line["row"], line["reason"]) for line in named] == [(2, "damaged image"), (3, "damaged image")]
    assert "cut off" in named[0]["detail"]


def test_damaged_images_count_against_the_limit(tmp_path: Path, images: Path) -> None:
    rows = damaged_rows(tmp_path, images, share=0.2)
    rows.messages(3)
    with pytest.raises(UserError, match=r"2 of 5 rows \(40.0%\).*2 damaged image"):
        rows.messages(2)


def test_a_worker_process_stops_the_run_in_the_same_sentence(tmp_path: Path, images: Path) -> None:
    damaged_rows(tmp_path, images, share=0.2)
    flow = FlowConfig("conversation", source=str(tmp_path / "a.json"), image_folder=str(images), max_bad_share=0.2)
    stream = Mixture(MixtureConfig({"talk": flow}, eval_share=0), log_folder=tmp_path / "run")
    torch.set_num_threads(1)
    with pytest.raises(UserError) as stopped:
        list(zip(range(9), DataLoader(stream, num_workers=1, collate_fn=lambda rows: 0), strict=False))
    assert one_line(stopped.value).startswith(f"{tmp_path / 'a.json'}: 2 of 5 rows")


def test_files_that_cannot_be_read(tmp_path: Path, images: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"conversations": [')
    with pytest.raises(UserError, match=r"not whole JSON: .* line 1, column 21"):
        LlavaConversations(path, LlavaOptions(images))
    path.write_text("{}")
    with pytest.raises(UserError, match="a dict, not a list"):
        LlavaConversations(path, LlavaOptions(images))
    path.write_bytes(b'["\xff"]')
    with pytest.raises(UserError, match="not UTF-8"):
        LlavaConversations(path, LlavaOptions(images))
    absent = FlowConfig("conversation", source=str(tmp_path / "absent.json"), image_folder=str(images))
    with pytest.raises(UserError, match="no file .*absent.json"):
        Mixture(MixtureConfig({"talk": absent}))
    folder = FlowConfig("conversation", source=str(path), image_folder=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"nowhere: no such folder"):
        Mixture(MixtureConfig({"talk": folder}))


def test_settings_of_the_format_are_refused_elsewhere() -> None:
    with pytest.raises(UserError, match="image_folder"):
        FlowConfig("conversation", source="a.json")
    with pytest.raises(UserError, match="LLaVA's format"):
        FlowConfig("conversation", group_by_modality=True)
    grouped = FlowConfig("conversation", source="a.json", image_folder=".", group_by_modality=True)
    with pytest.raises(UserError, match="single flow, and there are 2"):
        MixtureConfig({"a": grouped, "b": FlowConfig("drawing")})


def test_a_flow_of_the_mixture(tmp_path: Path, images: Path) -> None:
    records = [{"conversations": [human(f"{n} " * (n % 7)), gpt(str(n))]} for n in range(20)]
    records += [
        {"image": "red.png", "conversations": [human("<image>" + "a " * n), gpt(str(n))]} for n in range(20, 40)
    ]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(records))
    flow = FlowConfig("conversation", source=str(path), image_folder=str(images), group_by_modality=True)
    config = MixtureConfig({"talk": flow}, eval_share=0)
    stream = Mixture(config, samples_per_step=6)
    said = [int(stream[n]["messages"][1]["content"][0]["text"]) for n in range(72)]
    for start in (0, 36):  # 40 rows are 6 whole steps of 6; a pass shows no row twice
        assert len(set(said[start : start + 36])) == 36
        steps = [said[k : k + 6] for k in range(start, start + 36, 6)]
        assert sum(len({n < 20 for n in step}) > 1 for step in steps) <= 1
    assert said[:36] != said[36:]
    again = Mixture(config, samples_per_step=6)
    assert [int(again[n]["messages"][1]["content"][0]["text"]) for n in (71, 3, 40)] == [said[n] for n in (71, 3, 40)]
    assert again.sources[0] is stream.sources[0]  # looked through once
    with pytest.raises(UserError, match="one step takes 41 samples and there are 40 rows"):
        Mixture(config, samples_per_step=41)[0]


def test_steps_hold_one_modality_and_similar_lengths() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 2000, 5000) * np.where(rng.random(5000) < 0.1, -1, 1)
    order = grouped_order(lengths, 32, np.random.default_rng(1))
    assert len(order) == len(set(order.tolist())) == 5000 // 32 * 32
    steps = lengths[order].reshape(-1, 32)
    mixed = [step for step in steps if len(set(np.sign(step))) > 1]
    assert len(mixed) <= 1
    spread = np.median([np.ptp(np.abs(step)) for step in steps])
    assert spread < 2 * 2000 / POOL  # a random step spreads over nearly all of 2000
    with pytest.raises(UserError, match="32 samples and there are 10 rows"):
        grouped_order(lengths[:10], 32, rng)
