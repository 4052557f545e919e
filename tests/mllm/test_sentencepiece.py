"""Vicuna-like hosts: a Llama with a sentencepiece tokenizer, read from its folder as it is published."""

import json
from pathlib import Path

import pytest
import sentencepiece
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.mllm import tiny
from unimm.chat import ChatSession
from unimm.mllm import attach
from unimm.mllm.answering import chat_inputs

ROWS = 300


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tokenizer.model (BPE with byte fallback), its config and a random Llama."""
    folder = tmp_path_factory.mktemp("vicuna")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(tiny.TEXTS * 50),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=ROWS,
        model_type="bpe",
        byte_fallback=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, "legacy": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(special | settings))
    tiny.language_model("llama", rows=ROWS, tied=False).save_pretrained(folder)
    return folder


def test_texts_become_the_ids_of_sentencepiece(host: Path) -> None:
    _, processor = attach(host, tiny.image_tokenizer())
    reference = sentencepiece.SentencePieceProcessor(model_file=str(host / "tokenizer.model"))
    for text in ("a photo of a red circle", "is there a blue ring? yes", "café 3"):
        ids = processor.tokenizer(text).input_ids
        assert ids == [reference.bos_id(), *reference.encode(text)]
        assert processor.tokenizer.decode(ids, skip_special_tokens=True) == text


@torch.no_grad()
def test_it_reads_draws_and_reloads(host: Path, tmp_path: Path) -> None:
    model, processor = attach(host, tiny.image_tokenizer())
    chat = [tiny.user(tiny.image(), "is there a blue ring?")]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    inputs = processor.apply_chat_template(chat, **options)
    ids = inputs["input_ids"][0].tolist()
    assert ids.count(1) == 1 and ids[0] == 1, "one begin token, at the beginning"
    assert ids.count(processor.image_token_id) == 16
    assert processor.null_prompt_ids()[0] == 1 and processor.null_prompt_ids()[-1] == processor.boi_token_id
    drawn = model.generate(**inputs, generation_mode="image", seed=1)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    reread = AutoProcessor.from_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert reread.apply_chat_template(chat, **options)["input_ids"][0].tolist() == ids
    assert torch.equal(again.generate(**inputs, generation_mode="image", seed=1), drawn)
    assert "</s>" in reread.apply_chat_template([*chat, tiny.assistant("yes")], tokenize=False)


def test_a_begin_token_of_the_tokenizer_stands_before_conversations_once(host: Path) -> None:
    model, processor = attach(host, tiny.image_tokenizer())
    chats = [[tiny.user(tiny.image(), "is there a blue ring?")], [tiny.user("one two three")]]
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
    inputs = chat_inputs(model, processor, chats)
    for row, mask, chat in zip(inputs["input_ids"], inputs["attention_mask"], chats, strict=True):
        expected = processor.apply_chat_template(chat, **options, return_tensors="pt")["input_ids"][0]
        assert row[mask.bool()].tolist() == expected.tolist() and expected[0] == 1
    session = ChatSession(model, processor, max_new_tokens=3)
    assert isinstance(session.ask(f"a {processor.boi_token} ring?"), str)
