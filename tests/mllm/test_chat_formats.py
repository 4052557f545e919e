"""The chat formats: their strings against the published ones, and their label masks token by token.

python -m tests.mllm.test_chat_formats     # writes tests/data/label_masks again: look at the difference
"""

from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers.utils.chat_template_utils import render_jinja_template

from tests.mllm import tiny
from tests.mllm.chat_tokenizers import byte_level, tokenizer_for
from unimm.data.text.collators import IGNORED, FlowCollator
from unimm.errors import UserError
from unimm.mllm import UnimmProcessor, attach
from unimm.mllm.attach import build_processor
from unimm.mllm.chat_formats import CHAT_FORMATS
from unimm.mllm.templates import chat_template
from unimm.mllm.vocabulary import VisualVocabulary, add_markers, visual_base

GOLDEN = Path(__file__).resolve().parents[1] / "data" / "label_masks"

HELLO = "Hello, how are you?"
GREAT = "I'm doing great. How can I help you today?"
SHOW = "I'd like to show off how chat templating works!"
PIRATE = "You are a friendly chatbot who always responds in the style of a pirate"
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@cache
def image_tokenizer() -> Any:
    return tiny.image_tokenizer()


@cache
def processor(name: str) -> UnimmProcessor:
    texts = tokenizer_for(name)
    markers = add_markers(texts)
    vocabulary = VisualVocabulary(visual_base(len(texts), len(texts)), 32)
    return build_processor(image_tokenizer(), texts, markers, vocabulary, None, name)


def render(
    name: str, *turns: str, system: str | None = None, prompt: bool = False
) -> tuple[str, list[tuple[int, int]]]:
    """The text of turns by the user and the assistant in alternation, and the marked spans."""
    messages = [tiny.user(text) if n % 2 == 0 else tiny.assistant(text) for n, text in enumerate(turns)]
    messages = [{"role": "system", "content": system}, *messages] if system else messages
    (text,), spans = render_jinja_template(
        conversations=[messages],
        chat_template=processor(name).chat_template,
        add_generation_prompt=prompt,
        return_assistant_tokens_mask=True,
        bos_token="<s>",
        eos_token="</s>",
    )
    return text, spans[0]


# As published, without the first begin-of-sequence token, which the text tokenizer adds:
# plain, vicuna_v1: LLaVA, llava/conversation.py and train.py; llama2, mistral, zephyr, gemma, chatml: the models' chat
# templates as recorded by huggingface.js (packages/jinja/test/e2e.test.js); llama3, phi3: the model cards; qwen:
# Qwen2-Instruct's template; internlm: InternLM2's `build_inputs`; deepseek: the README of DeepSeek-LLM.
PUBLISHED = {
    "plain": f"{HELLO}{GREAT}\n{SHOW}",
    "vicuna_v1": f"{VICUNA} USER: {HELLO} ASSISTANT: {GREAT}</s>USER: {SHOW} ASSISTANT:",
    "vicuna_turns": f"USER: {HELLO} ASSISTANT: {GREAT}</s>USER: {SHOW} ASSISTANT: ",
    "llama2": f"[INST] {HELLO} [/INST] {GREAT} </s><s>[INST] {SHOW} [/INST]",
    "llama3": (
        f"<|start_header_id|>user<|end_header_id|>\n\n{HELLO}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        f"{GREAT}<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n{SHOW}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "qwen": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{HELLO}<|im_end|>\n<|im_start|>assistant\n{GREAT}<|im_end|>\n"
        f"<|im_start|>user\n{SHOW}<|im_end|>\n<|im_start|>assistant\n"
    ),
    "internlm": (
        "<|im_start|>system\nYou are an AI assistant whose name is InternLM (书生·浦语).<|im_end|>\n"
        f"<|im_start|>user\n{HELLO}<|im_end|>\n<|im_start|>assistant\n{GREAT}<|im_end|>\n"
        f"<|im_start|>user\n{SHOW}<|im_end|>\n<|im_start|>assistant\n"
    ),
    "mistral": f"[INST] {HELLO} [/INST]{GREAT}</s> [INST] {SHOW} [/INST]",
    "phi3": (f"<|user|>\n{HELLO}<|end|>\n<|assistant|>\n{GREAT}<|end|>\n<|user|>\n{SHOW}<|end|>\n<|assistant|>\n"),
    "gemma": (
        f"<start_of_turn>user\n{HELLO}<end_of_turn>\n<start_of_turn>model\n{GREAT}<end_of_turn>\n"
        f"<start_of_turn>user\n{SHOW}<end_of_turn>\n<start_of_turn>model\n"
    ),
    "chatml": (
        f"<|im_start|>user\n{HELLO}<|im_end|>\n<|im_start|>assistant\n{GREAT}<|im_end|>\n"
        f"<|im_start|>user\n{SHOW}<|im_end|>\n<|im_start|>assistant\n"
    ),
    "deepseek": f"User: {HELLO}\n\nAssistant: {GREAT}</s>User: {SHOW}\n\nAssistant:",
    "zephyr": f"<|user|>\n{HELLO}</s>\n<|assistant|>\n{GREAT}</s>\n<|user|>\n{SHOW}</s>\n<|assistant|>\n",
}
WITH_SYSTEM = {
    "vicuna_v1": f"{PIRATE} USER: {HELLO} ASSISTANT:",
    "vicuna_turns": f"{PIRATE} USER: {HELLO} ASSISTANT: ",
    "llama2": f"[INST] <<SYS>>\n{PIRATE}\n<</SYS>>\n\n{HELLO} [/INST]",
    "llama3": (
        f"<|start_header_id|>system<|end_header_id|>\n\n{PIRATE}<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
        f"{HELLO}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "qwen": f"<|im_start|>system\n{PIRATE}<|im_end|>\n<|im_start|>user\n{HELLO}<|im_end|>\n<|im_start|>assistant\n",
    "phi3": f"<|system|>\n{PIRATE}<|end|>\n<|user|>\n{HELLO}<|end|>\n<|assistant|>\n",
    "zephyr": f"<|system|>\n{PIRATE}</s>\n<|user|>\n{HELLO}</s>\n<|assistant|>\n",
}


@pytest.mark.parametrize("name", CHAT_FORMATS)
def test_a_format_is_the_published_one(name: str) -> None:
    assert render(name, HELLO, GREAT, SHOW, prompt=True)[0] == PUBLISHED[name]
    if name in WITH_SYSTEM:
        assert render(name, HELLO, system=PIRATE, prompt=True)[0] == WITH_SYSTEM[name]


@pytest.mark.parametrize("name", CHAT_FORMATS)
def test_an_answer_begins_where_a_prompt_for_it_ends(name: str) -> None:
    turns = (HELLO, GREAT, "", "", SHOW, " yes ")
    text, spans = render(name, *turns)
    assert len(spans) == 3
    for answer, (start, end) in enumerate(spans):
        assert render(name, *turns[: 2 * answer + 1], prompt=True)[0] == text[:start]
        said = text[start:end]
        assert said.startswith(CHAT_FORMATS[name].lead + turns[2 * answer + 1])
        assert said.endswith(CHAT_FORMATS[name].closing.replace("{eos}", "</s>"))


def golden_samples() -> list[dict[str, Any]]:
    """An image and several turns, an empty answer, paragraphs, letters of many bytes, an answer that plays a role."""
    red = Image.new("RGB", (16, 16), "red")
    first = [
        tiny.user(red, "\nWhat is it?"),
        tiny.assistant("yes, a red circle."),
        tiny.user("and now?"),
        tiny.assistant(""),
    ]
    second = [
        tiny.user("Twice."),
        tiny.assistant("It is red.\n\nIt is blé \U0001f642"),
        tiny.user(""),
        tiny.assistant(" USER: no"),
    ]
    return [
        {"flow": "talk", "kind": "conversation", "index": n, "messages": messages}
        for n, messages in enumerate((first, second))
    ]


def written_mask(name: str) -> str:
    """One token a line, `+` before those that are learned; equal lines in a row are counted."""
    batch = FlowCollator(processor(name))(golden_samples())["talk"]
    tokenizer, written = processor(name).tokenizer, ""
    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        tokens = tokenizer.convert_ids_to_tokens(ids[mask.bool()])
        learned = (labels[mask.bool()] != IGNORED).tolist()
        lines = [f"{'+' if each else ' '} {token}" for token, each in zip(tokens, learned, strict=True)]
        runs = [(line, len(list(run))) for line, run in groupby(lines)]
        written += "".join(f"{line} x{count}\n" if count > 1 else f"{line}\n" for line, count in runs) + "\n"
    return written


@pytest.mark.parametrize("name", CHAT_FORMATS)
def test_golden_label_masks(name: str) -> None:
    assert written_mask(name) == (GOLDEN / f"{name}.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", CHAT_FORMATS)
def test_golden_label_masks_without_marks_in_the_template(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the templates are that hosts bring along."""
    template = str(processor(name).chat_template)
    unmarked = template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    assert unmarked != template
    monkeypatch.setattr(processor(name), "chat_template", unmarked)
    assert written_mask(name) == (GOLDEN / f"{name}.txt").read_text(encoding="utf-8")


def test_attach_takes_a_format_by_name_and_stops_at_its_closing_token() -> None:
    texts = byte_level()
    host = tiny.language_model("llama", rows=len(texts))
    model, unified = attach(host, image_tokenizer(), texts, chat_template="llama3")
    prompt = unified.apply_chat_template([tiny.user("yes")], add_generation_prompt=True)
    assert prompt.endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")
    assert texts.convert_tokens_to_ids("<|eot_id|>") in model.generation_config.eos_token_id
    assert model.config.null_prompt == unified.null_prompt_ids()


# What earlier versions gave to text tokenizers without a template, byte for byte: such checkpoints are in use.
EARLIER = {
    "chatml": """\
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' -%}
{% generation %}{{ render(message.content) + '<|im_end|>' }}{% endgeneration %}
{%- else -%}
{{ render(message.content) + '<|im_end|>' }}
{%- endif -%}
{{ '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
""",
    "vicuna_turns": """\
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{{ 'ASSISTANT: ' }}{% generation %}{{ render(message.content) + eos_token }}{% endgeneration %}
{%- elif message.role == 'user' -%}
{{ 'USER: ' + render(message.content) + ' ' }}
{%- else -%}
{{ render(message.content) + ' ' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT: ' }}{%- endif -%}
""",
}


@pytest.mark.parametrize("name", EARLIER)
@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("system", [None, "You draw."])
def test_a_tokenizer_without_a_template_renders_as_before(name: str, prompt: bool, system: str | None) -> None:
    texts = byte_level() if name == "chatml" else tiny.text_tokenizer(())
    template = str(chat_template(texts, add_markers(texts)))
    content, found, _ = template.partition("{%- endmacro -%}\n")
    assert found
    red = Image.new("RGB", (16, 16), "red")
    turns = [
        tiny.user(red, "What is it?"),
        tiny.assistant("a circle", red),
        {"role": "user", "content": " again "},
        tiny.assistant(""),
    ]
    if system is not None:
        turns.insert(0, {"role": "system", "content": system})
    for count in range(1, len(turns) + 1):
        ours, before = (
            render_jinja_template(
                conversations=[turns[:count]],
                chat_template=each,
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=True,
                **texts.special_tokens_map,
            )
            for each in (template, content + found + EARLIER[name])
        )
        assert ours == before


def test_a_format_of_another_model_is_refused() -> None:
    texts = tiny.text_tokenizer(())
    markers = add_markers(texts)
    with pytest.raises(UserError, match=r"'llama3' ends answers with '<\|eot_id\|>', which is no token"):
        chat_template(texts, markers, "llama3")
    with pytest.raises(UserError, match="no chat template 'vicuna'; known are plain, vicuna_v1"):
        chat_template(texts, markers, "vicuna")
    texts.eos_token = None
    with pytest.raises(UserError, match="'zephyr' ends answers with an end token, and the text tokenizer has none"):
        chat_template(texts, markers, "zephyr")


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for each in CHAT_FORMATS:
        (GOLDEN / f"{each}.txt").write_text(written_mask(each), encoding="utf-8")
