"""GGUF files against those who read them: transformers' reader to equal logits, and llama.cpp itself to equal ids."""

import json
import urllib.request
from pathlib import Path
from typing import Any

import jinja2
import pytest
import torch
from gguf import GGUFReader, TokenType
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from tests.mllm import tiny
from tests.mllm.test_multimodal_hosts import build
from unimm.errors import UserError
from unimm.export import gguf_file
from unimm.export.gguf_file import PRE_TOKENIZERS, TYPES, pre_tokenizer_name, refuse_other_computation, save_gguf
from unimm.mllm import attach
from unimm.mllm.export import causal_lm

HEAD_DIM = {"qwen3": {"head_dim": 16}}  # the one setting that transformers' reader does not take from a file


@pytest.fixture(autouse=True)
def without_onnx(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the image tokenizer, which has tests of its own."""
    monkeypatch.setattr(gguf_file, "write_onnx", lambda tokenizer, image_processor, folder: None)


def read_back(folder: Path, family: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", **HEAD_DIM.get(family, {})).eval()


@pytest.mark.parametrize(("family", "tied"), [("qwen3", True), ("qwen2", False), ("llama", True), ("llama", False)])
def test_transformers_reads_it_back_to_equal_logits(family: str, tied: bool, tmp_path: Path) -> None:
    model, processor = tiny.unified(family, tied=tied)
    save_gguf(model, processor, tmp_path)
    again, plain = read_back(tmp_path, family), causal_lm(model)
    token_ids = torch.randint(0, plain.config.vocab_size, (2, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(again(token_ids).logits, plain(token_ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    for text in ("a photo of a red circle", "<|im_start|>user\nis  there a 12?<|im_end|>", "<|image_id_3|> ünique"):
        assert tokenizer(text)["input_ids"] == processor.tokenizer(text)["input_ids"]


def test_so_it_does_the_language_model_of_a_multimodal_host(tmp_path: Path) -> None:
    host, tokenizer, image_tokenizer, _ = build("llava-clip")
    model, processor = attach(host, image_tokenizer, tokenizer)
    save_gguf(model, processor, tmp_path)
    with torch.no_grad():
        token_ids = torch.arange(2, 30)[None]
        assert torch.equal(read_back(tmp_path, "qwen2")(token_ids).logits, causal_lm(model)(token_ids).logits)


def strings(reader: GGUFReader, field: str) -> Any:
    return reader.fields[field].contents()


def test_image_ids_are_rows_that_no_text_reaches(tmp_path: Path) -> None:
    model, processor = tiny.unified()
    save_gguf(model, processor, tmp_path)
    reader = GGUFReader(tmp_path / "model.gguf")
    tokens, types = (strings(reader, f"tokenizer.ggml.{name}") for name in ("tokens", "token_type"))
    base, size = model.config.image_vocab_start, model.config.codebook_size
    assert len(tokens) == len(types) == len(set(tokens)) == base + size
    assert tokens[base] == "<|image_id_0|>" and set(types[base:]) == {TokenType.UNUSED}
    length = len(processor.tokenizer)
    assert tokens[:length] == processor.tokenizer.convert_ids_to_tokens(range(length))
    assert types[tokens.index("<|im_end|>")] == TokenType.CONTROL and types[tokens.index("a")] == TokenType.NORMAL
    about = json.loads((tmp_path / "image_vocabulary.json").read_text())
    assert (about["image_vocab_start"], about["codebook_size"]) == (base, size)
    assert about["drawing_prompt"].replace("{prompt}", "a red circle") == processor.drawing_prompt("a red circle")


def test_its_chat_template_needs_no_tag_of_transformers(tmp_path: Path) -> None:
    model, processor = tiny.unified()
    assert "generation" in processor.chat_template
    save_gguf(model, processor, tmp_path)
    template = strings(GGUFReader(tmp_path / "model.gguf"), "tokenizer.chat_template")
    chat = [
        {"role": "user", "content": "is it?"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "b"},
    ]
    found = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(template)
    expected = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert found.render(messages=chat, add_generation_prompt=True) == expected


@pytest.mark.parametrize("weight_type", ["f16", "bf16", "q8_0"])
def test_smaller_types_round_the_matrices_only(weight_type: str, tmp_path: Path) -> None:
    model, processor = tiny.unified("llama")
    save_gguf(model, processor, tmp_path, weight_type)
    for tensor in GGUFReader(tmp_path / "model.gguf").tensors:
        assert tensor.tensor_type == (TYPES[weight_type] if len(tensor.shape) > 1 else TYPES["f32"])
    again, plain = read_back(tmp_path, "llama"), causal_lm(model)
    with torch.no_grad():
        difference = (again(torch.arange(20)[None]).logits - plain(torch.arange(20)[None]).logits).abs().max()
    assert 0 < difference < {"f16": 0.02, "bf16": 0.2, "q8_0": 0.2}[weight_type]


# ---- llama.cpp ----


def test_llama_cpp_draws_the_same_ids(tmp_path: Path) -> None:
    """With llama.cpp's own server, from the prompt's token ids and from its text."""
    xllamacpp = pytest.importorskip("xllamacpp")
    for family in ("qwen3", "llama"):
        model, processor = tiny.unified(family)
        save_gguf(model, processor, tmp_path / family)
        about = json.loads((tmp_path / family / "image_vocabulary.json").read_text())
        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx = str(tmp_path / family / "model.gguf"), 128
        params.n_parallel = params.cpuparams.n_threads = 1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.verbosity = 0
        server = xllamacpp.Server(params)
        for prompt in ("a red circle", "two green squares", "a blue ring <|image_id_3|>"):
            inputs = processor(text=[processor.drawing_prompt(prompt)], return_tensors="pt")
            expected = model.generate(**inputs, generation_mode="image", do_sample=False, guidance_scale=None)[0]
            text = about["drawing_prompt"].replace("{prompt}", prompt)
            for start in (inputs["input_ids"][0].tolist(), text):
                body = {
                    "prompt": start,
                    "n_predict": 16,
                    "temperature": 0,
                    "ignore_eos": True,
                    "return_tokens": True,
                    "logit_bias": [[token, False] for token in range(about["image_vocab_start"])],
                }
                address, headers = f"{server.listening_address}/completion", {"Content-Type": "application/json"}
                request = urllib.request.Request(address, json.dumps(body).encode(), headers)
                with urllib.request.urlopen(request) as answer:
                    found = json.load(answer)
                assert found["tokens"] == expected.tolist() and found["content"] == ""
                assert found["tokens_evaluated"] == inputs["input_ids"].shape[1]
        del server


# ---- what is refused ----


def bpe(pre_tokenizer: Any) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizer
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def split(pattern: str) -> Any:
    step = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([step, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def test_llama_cpps_name_of_a_pre_tokenizer() -> None:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    found = [pre_tokenizer_name(bpe(each)) for each in (byte_level, digits, *map(split, PRE_TOKENIZERS))]
    assert found == ["gpt-2", "smollm", "qwen2", "llama-bpe"]


@pytest.mark.parametrize(
    ("pre_tokenizer", "message"),
    [
        (split(r"\w+"), "does not know how this text tokenizer splits"),
        (pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), "does not know how"),
        (pre_tokenizers.Metaspace(), "byte-level BPE text tokenizers only"),
    ],
)
def test_another_text_tokenizer_is_refused(pre_tokenizer: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        pre_tokenizer_name(bpe(pre_tokenizer))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "rope_type 'linear'"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layers with sliding_attention"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_bias": True}, "attention_bias"),
    ],
)
def test_a_model_that_llama_cpp_computes_otherwise_is_refused(fields: dict[str, Any], message: str) -> None:
    config = tiny.language_model("qwen3").config
    for name, value in fields.items():
        setattr(config, name, value)
    with pytest.raises(UserError, match=message):
        refuse_other_computation(config)
