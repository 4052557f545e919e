"""Conversations in tables: every standard form of a turn is read, everything else is a counted, named bad row."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.data.conftest import png
from unimm.data.bad_rows import BadRow
from unimm.data.mixture import FlowConfig, Mixture, MixtureConfig
from unimm.data.sources.llava import parse_row
from unimm.data.sources.rows import ReadOptions
from unimm.data.sources.table_conversations import read_messages
from unimm.errors import UserError

IMAGE = Image.new("RGB", (4, 4))
GOOD = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "yes"}]


def shown(messages: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    return [(turn["role"], [part.get("text", "<>") for part in turn["content"]]) for turn in messages]


def parts(*pieces: str | None) -> list[dict[str, Any]]:
    return [{"type": "image"} if piece is None else {"type": "text", "text": piece} for piece in pieces]


def asked(content: Any, answer: Any = "yes") -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]


READ: list[tuple[Any, list[str]]] = [
    (asked("What?"), ["<>", "What?"]),
    (json.dumps(asked("What?")), ["<>", "What?"]),
    (asked(parts("Look:", None, "what?")), ["Look:", "<>", "what?"]),
    (asked(parts("What?"), parts("yes")), ["<>", "What?"]),
    (
        asked([{"type": "image", "text": None, "index": 0}, {"type": "text", "text": "What?", "index": None}]),
        ["<>", "What?"],
    ),
    ([{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "yes"}], ["<>", "\nWhat?"]),
    ([{"from": "human", "value": "What?"}, {"from": "gpt", "value": "yes"}], ["<>", "\nWhat?"]),
    ([{"from": "user", "value": "What?", "role": None}, {"from": "assistant", "value": "yes"}], ["<>", "\nWhat?"]),
    ({"role": ["user", "assistant"], "content": ["What?", "yes"]}, ["<>", "What?"]),
]


@pytest.mark.parametrize(("given_turns", "question"), READ)
def test_the_forms_that_are_read(given_turns: Any, question: list[str]) -> None:
    assert shown(read_messages(given_turns, IMAGE)) == [("user", question), ("assistant", ["yes"])]


def test_system_and_later_turns() -> None:
    turns = [{"role": "system", "content": "Be kind."}, *asked("a"), *asked(parts("b", None))]
    assert shown(read_messages(turns, IMAGE)) == [
        ("system", ["Be kind."]),
        ("user", ["a"]),
        ("assistant", ["yes"]),
        ("user", ["b", "<>"]),
        ("assistant", ["yes"]),
    ]


BAD: list[tuple[str, Any]] = [
    ("no conversation", None),
    ("no conversation", []),
    ("no conversation", "null"),
    ("half a character", '[{"role": "user", "content": "a \\ud83d"}, {"role": "assistant", "content": "yes"}]'),
    ("half a character", asked(parts("b \ud83d", None))),
    ("no conversation", 3),
    ("not JSON", "[{"),
    ("not JSON", "[" * 100_000),
    ("not JSON", "[" + "1" * 5000 + "]"),
    ("wrong turn", ["What?"]),
    ("wrong turn", asked(None)),
    ("wrong turn", asked("a", None)),
    ("wrong turn", asked([])),
    ("wrong turn", asked(3)),
    ("wrong turn", [{"role": "robot", "content": "a"}]),
    ("wrong turn", [{"content": "a"}]),
    ("wrong turn", [{"from": "human", "value": None}, {"from": "gpt", "value": "yes"}]),
    ("wrong part", asked(["What?"])),
    ("wrong part", asked([{"type": "video"}])),
    ("wrong part", asked([{"type": "text", "text": None}])),
    ("wrong part", asked([{"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}])),
    ("wrong part", asked([{"type": "image", "url": "https://example.org/a.png"}])),
    ("wrong part", asked([{"type": "image", "index": 1}])),
    ("image outside a question", asked("a", parts(None))),
    ("image outside a question", [{"from": "human", "value": "a"}, {"from": "gpt", "value": "<image>"}]),
    ("images do not match", asked(parts(None, None))),
    ("images do not match", [{"from": "human", "value": "<image><image>"}, {"from": "gpt", "value": "a"}]),
    ("no answer", [{"role": "user", "content": "a"}]),
    ("turns out of order", [{"role": "assistant", "content": "a"}]),
    ("turns out of order", [*asked("a"), {"role": "assistant", "content": "b"}]),
]


@pytest.mark.parametrize(("reason", "turns"), BAD)
def test_everything_else_is_a_bad_row(reason: str, turns: Any) -> None:
    with pytest.raises(BadRow) as bad:
        read_messages(turns, IMAGE)
    assert bad.value.reason == reason and len(bad.value.detail) < 400


def write(path: Path, images: list[Any], turns: list[Any], column: str = "messages") -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"image": images, column: turns}), path)
    return path


def stream(path: Path, share: float = 0.9, log: Path | None = None, streaming: bool = False) -> Mixture:
    flow = FlowConfig("conversation", source=str(path), max_bad_share=share, read=ReadOptions(streaming=streaming))
    return Mixture(MixtureConfig({"talk": flow}, eval_share=0), log_folder=log)


@pytest.mark.parametrize("streaming", [False, True])
def test_bad_rows_of_a_table_are_counted_and_named(tmp_path: Path, streaming: bool) -> None:
    """As they stand in parquet: a null conversation, a null content, an image without bytes and path."""
    whole = {"bytes": png(1), "path": None}
    images = [whole, whole, whole, {"bytes": None, "path": None}, whole]
    turns = [GOOD, None, [{"role": "user", "content": None}], GOOD, [{"role": "user", "content": "alone"}]]
    flow = stream(write(tmp_path / "a.parquet", images, turns), log=tmp_path / "log", streaming=streaming)
    assert [shown(flow[n]["messages"])[1] for n in range(10)] == [("assistant", ["yes"])] * 10
    lines = [json.loads(line) for line in (tmp_path / "log" / "talk.skipped.jsonl").read_text().splitlines()]
    reasons = {line["row"]: line["reason"] for line in lines}
    assert reasons == {1: "no conversation", 2: "wrong turn", 3: "no image", 4: "no answer"}
    assert all("a.parquet" in line["detail"] and str(line["row"]) in line["detail"] for line in lines)


def test_an_image_struct_without_path(tmp_path: Path) -> None:
    flow = stream(write(tmp_path / "a.parquet", [{"bytes": png(1)}, {"bytes": None}], [GOOD, GOOD]))
    assert [flow[n]["messages"][0]["content"][0]["type"] for n in range(4)] == ["image"] * 4


def test_a_table_of_nothing_but_bad_rows_does_not_start(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", [{"bytes": png(1), "path": None}] * 3, [asked("a", None)] * 3)
    with pytest.raises(
        UserError, match=r"a\.parquet: none of 3 rows from row 0 on is left: 3 wrong turn\. The first: "
    ):
        stream(path, share=1.0)
    with pytest.raises(UserError, match=r"more than max_bad_share 1.0%: 1 wrong turn\. The first is row 0"):
        stream(path, share=0.01)


def test_llavas_column(tmp_path: Path) -> None:
    turns = [[{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red"}]] * 2
    path = write(tmp_path / "a.parquet", [{"bytes": png(1), "path": None}] * 2, turns, column="conversations")
    assert shown(stream(path)[0]["messages"]) == [("user", ["<>", "\nWhat?"]), ("assistant", ["red"])]


LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.just("<image>"))
KEYS = st.sampled_from(["role", "content", "from", "value", "type", "text", "image", "index", "url"])
WORDS = st.sampled_from(["user", "assistant", "system", "human", "gpt", "text", "image"])
VALUES = st.recursive(
    LEAVES | WORDS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=16
)


@settings(max_examples=400, deadline=None)
@given(VALUES | st.lists(st.dictionaries(KEYS, VALUES, max_size=4), max_size=4) | st.text(max_size=30))
def test_whatever_a_row_holds_is_a_conversation_or_a_bad_row(row: Any) -> None:
    try:
        messages = read_messages(row, IMAGE)
    except BadRow as bad:
        assert bad.reason and len(bad.detail) < 500
        return
    images = [part for turn in messages for part in turn["content"] if part["type"] == "image"]
    assert len(images) == 1 and {"user", "assistant"} <= {turn["role"] for turn in messages}
    assert all(isinstance(part.get("text", ""), str) for turn in messages for part in turn["content"])


@settings(max_examples=300, deadline=None)
@given(VALUES, VALUES | st.lists(st.dictionaries(KEYS, VALUES, max_size=4), max_size=4))
def test_whatever_a_record_of_llava_holds_is_a_row_or_a_bad_row(image: Any, turns: Any) -> None:
    try:
        row = parse_row({"image": image, "conversations": turns})
    except BadRow as bad:
        assert bad.reason and len(bad.detail) < 500
        return
    assert sum(text.count("<image>") for _, text in row.turns) == len(row.images)
