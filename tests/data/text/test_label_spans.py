"""Whose token it is: white space without a place, placeholders that grow, and turns that the marks miss."""

import numpy as np
import pytest

from tests.mllm.chat_tokenizers import byte_level
from unimm.data.text.label_spans import check_every_turn_has_tokens, rendered, turn_tokens
from unimm.errors import UserError


def sample(*turns: str) -> dict:
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": text} for n, text in enumerate(turns)]
    return {"flow": "talk", "index": 7, "messages": messages}


def test_white_space_without_a_place_in_the_offsets_is_learned() -> None:
    """Llama 3's tokenizer gives an empty line of an answer no characters: it would never be learned."""
    text = "USER: one\n\nASSISTANT: It is red.\n\n\n\nIt is blue.\n\nUSER: two"
    start, end = text.index(" It is red"), text.index("\n\nUSER: two")
    trimmed = byte_level(trim_offsets=True)(text, return_offsets_mapping=True)
    whole = byte_level()(text, return_offsets_mapping=True)
    assert trimmed.input_ids == whole.input_ids
    offsets, exact = np.array(trimmed.offset_mapping), np.array(whole.offset_mapping)
    assert (offsets[:, 0] == offsets[:, 1]).any() and not (exact[:, 0] == exact[:, 1]).any()
    expected = (exact[:, 0] < end) & (exact[:, 1] > start)
    assert turn_tokens([(start, end)], offsets, []).tolist() == [expected.tolist()]
    assert turn_tokens([(start, end)], exact, []).tolist() == [expected.tolist()]


def test_spans_move_behind_placeholders_that_grew() -> None:
    """'<i>ab' with the placeholder <i> (characters 0 to 3) as ten characters; padding stands for no text."""
    offsets = np.array([[0, 5], [5, 10], [10, 11], [11, 12], [0, 0]])
    grown = [{"span": (0, 3), "new_span": (0, 10)}]
    assert turn_tokens([(3, 4), (4, 5)], offsets, grown).tolist() == [
        [False, False, True, False, False],
        [False, False, False, True, False],
    ]


MARKED = "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}BODY{% endgeneration %}"
MARKED += "{% else %}{{ m.content }}{% endif %}{% endfor %}"


def test_a_turn_that_the_marks_miss_is_printed() -> None:
    talk = sample("one", "red ring", "two", "blue")
    assert rendered(talk, MARKED.replace("BODY", "{{ m.content }}"), {}) == ("onered ringtwoblue", [(3, 11), (14, 18)])
    with pytest.raises(UserError, match=r"Sample 7 .*'talk': .* marks 'x' as assistant turn 1, which says 'red ring'"):
        rendered(talk, MARKED.replace("BODY", "x"), {})
    with pytest.raises(UserError, match=r"Sample 7 .* 2 assistant turns and 0 label spans"):
        rendered(talk, "{{ messages[0].content }}", {})
    with pytest.raises(UserError, match=r"Sample 7 .*refuses it: not this one"):
        rendered(talk, "{{ raise_exception('not this one') }}", {})


def test_a_turn_without_a_learned_token_is_printed() -> None:
    with pytest.raises(UserError, match=r"no token of assistant turn 2, '', is learned"):
        check_every_turn_has_tokens(sample("one", "red", "two", ""), np.array([[True, False], [False, False]]))


UNMARKED = "{% for m in messages %}{{ '<' ~ m.role ~ '>' ~ (m.content | trim) ~ '</s> ' }}{% endfor %}"
UNMARKED += "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"


def test_answers_are_found_in_a_template_without_marks() -> None:
    talk = sample("one <assistant>", " red\n", "two", "", "three", "red")
    text, spans = rendered(talk, UNMARKED, {})
    assert [text[start:end] for start, end in spans] == ["red</s>", "</s>", "red</s>"]
    assert all(text[:start].endswith("<assistant>") for start, _ in spans)
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": " b"}]
    listed = "{% for m in messages %}[{{ m.role }}]{% for p in m.content %}{{ p.text }}{% endfor %}</s>{% endfor %}"
    talk["messages"] = [{"role": role, "content": parts} for role in ("user", "assistant", "user", "assistant")]
    text, spans = rendered(talk, {"default": listed, "rag": "x"}, {})
    assert text == "[user]a b</s>[assistant]a b</s>" * 2
    assert [text[start:end] for start, end in spans] == ["[assistant]a b</s>"] * 2  # nothing opens it in a prompt


def test_a_template_that_writes_other_words_than_the_answers_is_refused() -> None:
    with pytest.raises(UserError, match=r"Sample 7 .* 1 assistant turns and 0 label spans"):
        rendered(sample("one", "red"), "{% for m in messages %}{{ m.content | length }}{% endfor %}", {})
    with pytest.raises(UserError, match=r"Sample 7 .* marks 'd' as assistant turn 1, which says 'red'"):
        rendered(sample("one", "red"), "{% for m in messages %}{{ m.content.split('e')[-1] }}{% endfor %}", {})
