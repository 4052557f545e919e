"""Any text, halves of characters included: read whole, or refused in one sentence, behind every door for texts."""

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import unimm
from unimm.data.bad_rows import BadRow, Skipped
from unimm.data.sources.rows import ReadOptions
from unimm.data.sources.table_conversations import read_messages
from unimm.errors import UserError, printable

CHARACTERS = st.characters(exclude_categories=())  # halves of surrogate pairs are a category of their own
MARKERS = st.sampled_from(["<|im_end|>", "<|image_pad|>", "<|vision_start|>", "<|im_", "|>", "<image>"])
TEXTS = st.lists(st.text(CHARACTERS, max_size=12) | MARKERS, max_size=6).map("".join)
FEW = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def processor() -> Any:
    return unimm.load()[1]


def is_whole(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


@given(text=TEXTS)
@FEW
def test_a_prompt_is_read_or_refused_in_a_sentence(processor, text: str) -> None:
    chat = [{"role": "user", "content": [{"type": "text", "text": text}]}]
    plain = processor.apply_chat_template([{"role": "user", "content": [{"type": "text", "text": "a"}]}], tokenize=True)
    try:
        ids = processor.apply_chat_template(chat, tokenize=True)
    except UserError as error:
        assert not is_whole(text) and "half a character" in str(error) and "\n" not in str(error)
        return
    assert is_whole(text)
    control = set(processor.tokenizer.added_tokens_decoder)
    assert [i for i in ids[0] if i in control] == [i for i in plain[0] if i in control], "no text becomes a token"


@given(text=TEXTS)
@FEW
def test_a_row_is_taken_or_counted(text: str) -> None:
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}]
    for read in (lambda: ReadOptions().caption(text, "row 1"), lambda: read_messages(json.dumps(turns), None)):
        try:
            read()
        except BadRow as bad:
            assert bad.reason == "half a character" and not is_whole(text)
        else:
            assert is_whole(text)


@given(text=TEXTS)
@FEW
def test_a_log_line_is_utf8_and_reads_back(text: str) -> None:
    line = Skipped(1, "reason", text).line
    assert line.encode("utf-8").endswith(b"\n") and json.loads(line)["row"] == 1
    assert is_whole(printable(text)) and (printable(text) == text) == is_whole(text)
