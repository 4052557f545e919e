"""A chat template from a stranger is rendered within bounds, or refused in one sentence; sound ones are untouched."""

import time

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from tests.mllm import tiny
from unimm.errors import UserError
from unimm.mllm.chat_formats import CHAT_FORMATS
from unimm.mllm.loading import default_model_path
from unimm.mllm.template_guard import render_guarded
from unimm.mllm.templates import chat_template
from unimm.mllm.vocabulary import KNOWN_MARKERS

CHAT = [tiny.user(tiny.image(), "is there a ring?"), tiny.assistant("yes"), tiny.user("where?")]

HOSTILE = {
    "nested ranges": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "nested literals": "".join(f"{{% for a{n} in 'xxxxxxxxxx' %}}" for n in range(9)) + "{% endfor %}" * 9,
    "output without end": "{% for a in range(99999) %}{% for b in range(99999) %}"
    + "x" * 99
    + "{% endfor %}{% endfor %}",
    "a text multiplied": "{{ 'x' * 10000000000 }}",
    "a list multiplied": "{{ ([0] * 10000000000)|length }}",
    "a power": "{{ 10 ** (10 ** 10) }}",
    "a power of a power": "{{ (9 ** 60) ** 60 }}",
    "a number squared": "{% set n = namespace(x=9) %}{% for a in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "doubled by ~": "{% set n = namespace(x='xx') %}{% for a in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "doubled by +": "{% set n = namespace(x='xx') %}{% for a in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "doubled lists": "{% set n = namespace(x=[1]) %}{% for a in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "doubled by output": (
        "{% set n = namespace(x='xx') %}{% for a in range(60) %}{% set y %}{{ n.x }}{{ n.x }}{% endset %}"
        "{% set n.x = y %}{% endfor %}"
    ),
    "doubled by replace": (
        "{% set n = namespace(x='xx') %}{% for a in range(60) %}{% set n.x = n.x.replace('x', n.x) %}{% endfor %}"
    ),
    "doubled by a filter": (
        "{% set n = namespace(x='xx') %}{% for a in range(60) %}{% set n.x = n.x|replace('x', n.x) %}{% endfor %}"
    ),
    "joined": "{% set n = namespace(x='xx') %}{% for a in range(60) %}{% set n.x = [n.x, n.x]|join(n.x) %}{% endfor %}",
    "a width": "{{ '%9999999999d' % 1 }}",
    "a format": "{{ '{:9999999999}'.format(1) }}",
    "centered": "{{ 'x'|center(9999999999) }}",
    "justified": "{{ 'x'.ljust(9999999999) }}",
    "indented": "{{ ('x\\n' * 90000)|indent(90000) }}",
    "a macro that calls itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "a macro that calls itself twice": (
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}"
    ),
    "filler": "{{ lipsum(n=90000) }}",
    "out of the sandbox": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "a file": "{% include '/etc/passwd' %}",
    "cut off": "{% for message in messages %}",
    "no such filter": "{{ messages|nothing }}",
    "refuses": "{{ raise_exception('only one turn') }}",
    "divides": "{{ 1 // 0 }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_and_broken_templates_are_one_sentence_soon(name: str) -> None:
    start = time.monotonic()
    with pytest.raises(UserError, match="^The chat template [^\n]*$"):
        render_guarded(HOSTILE[name], CHAT)
    assert time.monotonic() - start < 20


@pytest.mark.parametrize(
    "call", ["'{:9999999999}'.format(1)", "'{a:9999999999}'.format_map({'a': 1})", "'%9999999999d'|format(1)"]
)
def test_a_wide_format_is_refused_before_it_is_written(call: str) -> None:
    """Ten gigabytes would be there before their length is counted."""
    with pytest.raises(UserError, match="formats a value to a width of its own"):
        render_guarded("{{ " + call + " }}", CHAT)


@pytest.mark.parametrize("template", [None, 5, ["x"], {"default": "x"}])
def test_a_template_that_is_no_text_is_said(template: object) -> None:
    with pytest.raises(UserError, match="^The chat template is a .*, not a text.$"):
        render_guarded(template, CHAT)


@pytest.mark.parametrize("name", [None, *CHAT_FORMATS])
def test_sound_templates_render_as_in_transformers(name: str | None) -> None:
    if name is None:
        template = (default_model_path() / "chat_template.jinja").read_text()
    else:
        special = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "</s>", "<|im_start|>")
        template = chat_template(tiny.text_tokenizer(special), KNOWN_MARKERS[0], name)
    tokens = {"eos_token": "</s>", "bos_token": "<s>"}
    expected = render_jinja_template([CHAT], chat_template=template, add_generation_prompt=True, **tokens)[0][0]
    assert render_guarded(template, CHAT, add_generation_prompt=True, **tokens) == expected
    assert "where?" in expected


def test_work_of_a_long_sound_chat_is_allowed() -> None:
    long = [tiny.user("x" * 1000) if n % 2 == 0 else tiny.assistant("y" * 1000) for n in range(2000)]
    template = (default_model_path() / "chat_template.jinja").read_text()
    assert len(render_guarded(template, long, add_generation_prompt=True)) > 2_000_000
