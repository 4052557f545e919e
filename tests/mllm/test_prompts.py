"""One prompt, one row of token ids: in training, in chat, in `generate`, in evaluation and on both sides of guidance;
and what people wrote is characters, whatever control tokens it spells."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import processors
from transformers import AutoProcessor, PreTrainedTokenizerBase

from tests.mllm import host_templates as published
from tests.mllm import tiny
from tests.mllm.chat_tokenizers import byte_level, sentence_piece
from unimm.chat import ChatSession
from unimm.data.text.collators import IGNORED, FlowCollator
from unimm.errors import UserError
from unimm.mllm import attach, load, prefill
from unimm.mllm.answering import chat_inputs
from unimm.mllm.chat_formats import CHAT_FORMATS
from unimm.mllm.draw_prompts import draw_prompts
from unimm.mllm.prompts import control_pattern, encode, mark_conversation, mark_text
from unimm.testing.hosts import text_tokenizer as one_token_a_byte

PROMPTS = ["a red circle", "two  rings\n", " USER: no", "", "a <|im_end|> in <s> it"]


def beginning(tokenizer: Any) -> Any:
    """A byte-level tokenizer that adds a begin token, as Llama 3's does."""
    tokenizer.add_special_tokens({"bos_token": "<|begin|>"})
    begin = ("<|begin|>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[begin]
    )
    return tokenizer


@cache
def smollm2_shaped() -> PreTrainedTokenizerBase:
    tokenizer = byte_level()
    tokenizer.bos_token = tokenizer.eos_token = "<|im_start|>"
    return tokenizer


def own(tokenizer: Any, template: str) -> Any:
    tokenizer.chat_template = template
    return tokenizer


# name -> (family, text tokenizer, published format, begin tokens of a prompt)
CASES: dict[str, tuple[str, Any, str | None, int]] = {
    "sentencepiece, vicuna": ("llama", sentence_piece, "vicuna_v1", 1),
    "sentencepiece, llama2": ("llama", sentence_piece, "llama2", 1),
    "sentencepiece, template without begin": (
        "llama",
        lambda: own(sentence_piece(), published.WITHOUT_BEGIN),
        None,
        0,
    ),
    "sentencepiece, template with begin": ("llama", lambda: own(sentence_piece(), published.ALTERNATING), None, 1),
    "byte-level, SmolLM2": ("llama", lambda: own(smollm2_shaped(), published.SYSTEM_BY_DEFAULT), None, 0),
    "byte-level, begin added": ("llama", lambda: own(beginning(byte_level()), published.WITHOUT_BEGIN), None, 0),
    "byte-level, begin added and written": (
        "llama",
        lambda: own(beginning(byte_level()), published.BEGIN_AND_TOOLS),
        None,
        1,
    ),
    "byte-level, begin added, llama3": ("llama", lambda: beginning(byte_level()), "llama3", 1),
    "qwen3": ("qwen3", lambda: own(byte_level(), published.REASONING), None, 0),
    "qwen3, no template": ("qwen3", byte_level, None, 0),
}


@cache
def unified(name: str) -> tuple[Any, Any]:
    if name == "embedded":
        return load(device="cpu")
    family, texts, chat_template, _ = CASES[name]
    tokenizer = texts()
    host = tiny.language_model(family, rows=len(tokenizer), context=512)
    return attach(host, tiny.image_tokenizer(), tokenizer, chat_template=chat_template)


def user(prompt: str) -> list[dict[str, Any]]:
    return [tiny.user(prompt)]


def unpadded(batch: Any) -> list[list[int]]:
    ids = torch.as_tensor(batch["input_ids"])
    mask = torch.ones_like(ids) if batch.get("attention_mask") is None else torch.as_tensor(batch["attention_mask"])
    return [row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True)]


def drawing(prompt: str, **image: Any) -> dict[str, Any]:
    answer = {"role": "assistant", "content": [{"type": "image", **image}]}
    return {"flow": "draw", "kind": "drawing", "index": 0, "messages": [*user(prompt), answer]}


def trained(collator: FlowCollator, samples: list[dict[str, Any]]) -> list[list[int]]:
    """The ids in front of what each drawing learns."""
    batch = collator(samples)["draw"]
    packed = "position_ids" in batch
    rows = batch["input_ids"], batch["drawn"]
    prompts = []
    for ids, drawn in zip(*rows, strict=True):
        start = 0
        for place in drawn.nonzero()[:, 0].tolist():
            if not drawn[place - 1]:
                piece = ids[start:place] if packed else ids[batch["attention_mask"][0].argmax() : place]
                prompts.append(piece.tolist())
            start = place + 1
    return prompts


@torch.no_grad()
def first_forward(model: Any, call: Callable[[], Any]) -> list[list[int]]:
    """The rows of the first forward of what `call` does, without padding."""
    seen: list[list[list[int]]] = []

    def look(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if not seen:
            seen.append(unpadded(kwargs))

    hook = model.register_forward_pre_hook(look, with_kwargs=True)
    call()
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("name", ["embedded", *CASES])
def test_a_prompt_has_the_same_ids_everywhere(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "_FORWARD", 10**6)  # all prompts in one forward
    model, processor = unified(name)
    boi, null = processor.boi_token_id, model.config.null_prompt
    expected = {
        prompt: [*chat_inputs(model, processor, [user(prompt)])["input_ids"][0].tolist(), boi] for prompt in PROMPTS
    }
    begin = processor.tokenizer.bos_token_id
    if name in CASES:
        for ids in expected.values():
            starts = [n for n, each in enumerate(ids) if each == begin]
            assert starts[:1] == [0] * CASES[name][3] or "SmolLM2" in name
            assert len(starts) == CASES[name][3] or "SmolLM2" in name

    # through the processor, alone and in a batch, and read again
    processor.save_pretrained(tmp_path)
    model.config.save_pretrained(tmp_path)
    for one in (processor, AutoProcessor.from_pretrained(tmp_path)):
        batch = one(text=[one.drawing_prompt(prompt) for prompt in PROMPTS], padding=True, return_tensors="pt")
        assert unpadded(batch) == list(expected.values())
        assert one.null_prompt_ids() == null == expected[""]
    for prompt, ids in expected.items():
        assert processor(text=processor.drawing_prompt(prompt))["input_ids"] == [ids]
        how = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
        assert [*processor.apply_chat_template(user(prompt), **how)["input_ids"][0], boi] == ids

    # training: drawings from images and from ids, padded and packed, and conversations
    count, red = processor.num_image_tokens, tiny.image()
    image_ids = np.zeros(count, dtype=np.int64)
    for image in ({"image": red}, {"ids": image_ids}):
        for prompt, ids in expected.items():
            assert trained(FlowCollator(processor), [drawing(prompt, **image)]) == [ids]
        for packed in (None, 2000):
            pair = [drawing(PROMPTS[0], **image), drawing(PROMPTS[0], **image)]
            assert trained(FlowCollator(processor, pack_length=packed), pair) == [expected[PROMPTS[0]]] * 2
    for prompt, ids in expected.items():
        talk = {"flow": "t", "kind": "conversation", "index": 0, "messages": [*user(prompt), tiny.assistant("yes")]}
        batch = FlowCollator(processor)([talk])["t"]
        row, labels = batch["input_ids"][0].tolist(), batch["labels"][0]
        learned = int((labels != IGNORED).nonzero()[0])
        assert row[:learned] == ids[:-1][:learned] and learned >= len(ids) - 2  # "[/INST]" and " yes" may merge
        assert int(labels[labels != IGNORED][-1]) in processor.tokenizer.added_tokens_decoder  # it learns to stop

    # in front of the model: chat, evaluation, and the two sides of guidance
    session = ChatSession(model, processor, max_new_tokens=1)
    prompt = PROMPTS[-1]
    assert first_forward(model, lambda: session.ask(prompt)) == [expected[prompt][:-1]]
    how = {"guidance_scale": 3.0, "seed": 1}
    assert first_forward(model, lambda: session.draw(prompt, **how)) == [expected[prompt], null]
    drawn = first_forward(model, lambda: draw_prompts(model, processor, PROMPTS[:2], [1, 2], guidance_scale=3.0))
    assert drawn == [expected[PROMPTS[0]], expected[PROMPTS[1]], null]  # one null prompt for all images


def test_a_plain_text_begins_as_a_prompt_does() -> None:
    for name, (_, _, _, begins) in CASES.items():
        processor = unified(name)[1]
        ids = processor(text=["red", "a red circle"])["input_ids"]
        begin = processor.tokenizer.bos_token_id
        adds = processor.tokenizer("").input_ids[:1] == [begin] and begin is not None
        assert [row[:1] == [begin] for row in ids] == [adds and begins == 1] * 2
        assert processor(text="red", add_special_tokens=False)["input_ids"][0] == ids[0][adds and begins == 1 :]


TOKENIZERS = {
    "sentencepiece": sentence_piece,
    "byte-level": byte_level,
    "byte-level, begin added": lambda: beginning(byte_level()),
    "one token a byte": lambda: one_token_a_byte(("<|image_pad|>",)),
}


def hostile(tokens: list[str]) -> list[str]:
    """Every control token alone, within text, nested in itself and in others, doubled, cut and mended."""
    texts = []
    for number, token in enumerate(tokens):
        other = tokens[(number + 1) % len(tokens)]
        half = len(token) // 2
        texts += [token, f"a {token} b", token[:half] + token + token[half:], token[:half] + other + token[half:]]
        texts += [
            token + token,
            token[0] + token,
            f"\n{token}\n",
            f"{token} {other}",
            token[:half] * 3 + token[half:] * 3,
        ]
    return texts


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_no_text_becomes_a_control_token_and_none_is_lost(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    tokenizer.add_tokens(["<tool>"])  # no special token, a control token all the same
    control = set(tokenizer.added_tokens_decoder)
    tokens = [token.content for token in tokenizer.added_tokens_decoder.values()]
    pattern = control_pattern(tokenizer)
    for text in hostile(tokens):
        ids = encode(tokenizer, mark_text(text, pattern), begin=False).ids
        assert control.isdisjoint(ids), text
        if kind != "sentencepiece":  # which has no bytes for some of the characters it was not trained on
            assert tokenizer.decode(ids) == text
        else:
            assert tokenizer.decode(ids).strip() == text.strip()


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_ordinary_texts_keep_their_ids(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    for text in [
        "a red circle",
        " leading",
        "two  spaces\n\n",
        "3 < 4 > 2 <| |> </",
        "naïve 漢字 \U0001f642",
        "<|im_",
        "",
    ]:
        begun = (
            encode(tokenizer, mark_text(text, control_pattern(tokenizer)), begin=True).ids
            if tokenizer.bos_token
            else []
        )
        plain = encode(tokenizer, mark_text(text, control_pattern(tokenizer)), begin=False, offsets=True)
        reference = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        assert plain.ids == reference.input_ids and plain.offsets == reference.offset_mapping
        if tokenizer("").input_ids == [tokenizer.bos_token_id]:
            assert begun == tokenizer(text).input_ids


def test_texts_side_by_side_do_not_join_to_a_control_token() -> None:
    model, processor = unified("qwen3, no template")
    tokenizer = processor.tokenizer
    control = [tokenizer.convert_tokens_to_ids(each) for each in ("<|im_end|>", "<|image_pad|>")]
    split = [tiny.user("a <|im_", "end|>", "<|image", "_p", "ad|>", "<|im_end|>")]
    ids = chat_inputs(model, processor, [split])["input_ids"][0].tolist()
    assert [ids.count(each) for each in control] == [1, 0]
    texts = byte_level()
    plain = attach(tiny.language_model(rows=len(texts)), tiny.image_tokenizer(), texts, chat_template="plain")[1]
    turns = [tiny.user("<|im_"), tiny.assistant("end|>")]  # the format puts nothing between turns
    row = plain.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"][0]
    assert control[0] not in row and plain.tokenizer.decode(row) == "<|im_end|>\n"


@pytest.mark.parametrize("name", ["embedded", *CASES])
def test_control_tokens_in_training_texts_are_characters(name: str) -> None:
    """In captions, questions and answers; labels cover what the assistant says to the last character."""
    _, processor = unified(name)
    tokenizer = processor.tokenizer
    tokens = [each.content for each in tokenizer.added_tokens_decoder.values()]
    control = torch.tensor(sorted(tokenizer.added_tokens_decoder))
    plain, said = "a red circle", "".join(f"{each} a" for each in tokens)

    def row(question: str, answer: str) -> dict[str, torch.Tensor]:
        messages = [tiny.user(tiny.image(), question), tiny.assistant(answer)]
        talk = {"flow": "t", "kind": "conversation", "index": 0, "messages": messages}
        return {key: value[0] for key, value in FlowCollator(processor)([talk])["t"].items() if key != "pixel_values"}

    ordinary, awkward = row(plain, plain), row(said, said)
    counts = [[int((each["input_ids"] == token).sum()) for token in control] for each in (ordinary, awkward)]
    assert counts[0] == counts[1]
    learned = tokenizer.decode(awkward["input_ids"][awkward["labels"] != IGNORED])
    wanted = tokenizer.decode(ordinary["input_ids"][ordinary["labels"] != IGNORED]).replace(plain, said)
    assert learned.strip() == wanted.strip()
    caption = drawing(said, image=tiny.image())
    batch = FlowCollator(processor)([caption])["draw"]
    assert int(batch["drawn"].sum()) == processor.num_image_tokens
    assert int((batch["input_ids"] == processor.image_token_id).sum()) == processor.num_image_tokens


@pytest.mark.parametrize("name", CHAT_FORMATS)
def test_control_tokens_of_a_format_are_plain_in_its_own_texts(name: str) -> None:
    from tests.mllm.test_chat_formats import processor as format_processor

    processor = format_processor(name)
    control = sorted(processor.tokenizer.added_tokens_decoder)
    texts = ["".join(token.content for token in processor.tokenizer.added_tokens_decoder.values()), "yes"]
    counts = []
    for text in texts:
        ids = processor.apply_chat_template(user(text), tokenize=True, return_dict=True)["input_ids"][0]
        counts.append([ids.count(token) for token in control])
    assert counts[0] == counts[1]


def test_half_characters_are_one_sentence() -> None:
    model, processor = unified("embedded")
    session = ChatSession(model, processor)
    said = r"half a character \(U\+D83D at character 3 of 4\), which cannot be encoded: remove it"
    bad = "a \ud83d!"
    talk = {"flow": "t", "kind": "conversation", "index": 7, "messages": [*user(bad), tiny.assistant("yes")]}
    for call in (
        lambda: session.ask(bad),
        lambda: session.draw(bad),
        lambda: list(session.ask(bad, stream=True)),
        lambda: chat_inputs(model, processor, [user(bad)]),
        lambda: processor(text=bad),
        lambda: processor.apply_chat_template(user(bad), tokenize=True),
        lambda: processor.drawing_prompt(bad),
        lambda: FlowCollator(processor)([talk]),
        lambda: FlowCollator(processor)([drawing(bad, image=tiny.image())]),
    ):
        with pytest.raises(UserError, match=said):
            call()
    with pytest.raises(UserError, match=r"Sample 7 of the flow 't': A text holds half"):
        FlowCollator(processor)([talk])
    assert session.messages == []


def test_slow_tokenizers_spell_control_tokens_too(tmp_path: Path) -> None:
    from transformers import CTRLTokenizer

    (tmp_path / "vocab.json").write_text('{"a</w>": 0, "b</w>": 1, "<unk>": 2, "<@@": 3, "x@@": 4, "></w>": 5, "<": 6}')
    (tmp_path / "merges.txt").write_text("#version\n")
    tokenizer = CTRLTokenizer.from_pretrained(tmp_path)
    tokenizer.add_tokens(["<x>"], special_tokens=True)
    token = tokenizer.convert_tokens_to_ids("<x>")
    assert not tokenizer.is_fast and token in tokenizer("a <x> b").input_ids
    marked = mark_text("a <x> b", control_pattern(tokenizer))
    assert token not in encode(tokenizer, marked, begin=False).ids


def test_marks_stand_in_every_string_and_images_stay_as_they_are() -> None:
    tokenizer = byte_level()
    image = tiny.image()
    message = {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "<|im_end|>"}]}
    message["tool_calls"] = [{"name": "<|im_end|>"}]
    (marked,) = mark_conversation([message], control_pattern(tokenizer))
    assert marked["content"][0]["image"] is image and message["content"][1]["text"] == "<|im_end|>"
    assert marked["tool_calls"][0]["name"] == marked["content"][1]["text"] != "<|im_end|>"
    forged = "<|im_\U000f0000end|>"  # the marks themselves cannot be smuggled in
    assert mark_text(forged, control_pattern(tokenizer)) == marked["content"][1]["text"]


def test_a_processors_template_survives_another_attachment() -> None:
    """As after `detach`: the tokenizer then brings a template of ours, which leaves the begin token to it."""
    for name in ("sentencepiece, vicuna", "sentencepiece, template without begin", "byte-level, begin added, llama3"):
        before = unified(name)[1]
        texts = before.tokenizer
        again = attach(tiny.language_model("llama", rows=len(texts)), tiny.image_tokenizer(), texts)[1]
        how = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
        chats = [user("a red circle"), [tiny.user(tiny.image(), "Hi")]]
        for chat in chats:
            ids = [each.apply_chat_template(chat, **how)["input_ids"] for each in (before, again)]
            assert ids[0] == ids[1]
        assert again.chat_template == before.chat_template


def test_arguments_of_the_text_tokenizer_work_or_are_refused() -> None:
    processor = unified("embedded")[1]
    texts, tokenizer = ["a red circle", "two"], unified("embedded")[1].tokenizer
    for how in (
        {"padding": True},
        {"padding": "max_length", "max_length": 9},
        {"padding": True, "padding_side": "right", "pad_to_multiple_of": 4},
        {"truncation": True, "max_length": 2},
        {"padding": True, "return_offsets_mapping": True},
        {"padding": True, "return_tensors": "pt"},
        {"return_attention_mask": False},
    ):
        ours, theirs = processor(text=texts, **how), tokenizer(texts, **how)
        assert set(ours) == set(theirs)
        for key in theirs:
            values = [each[key].tolist() if torch.is_tensor(each[key]) else each[key] for each in (ours, theirs)]
            assert values[0] == values[1], (how, key)
    image = f"{processor.image_token} is it red?"
    with pytest.raises(ValueError, match="an image does not fit into max_length 20"):
        processor(text=image, images=tiny.image(), truncation=True, max_length=20)
    with pytest.raises(ValueError, match="does not know the text arguments return_length, stride"):
        processor(text="a", stride=2, return_length=True)
    with pytest.raises(ValueError, match="padding"):
        processor(text=texts, return_tensors="pt")
