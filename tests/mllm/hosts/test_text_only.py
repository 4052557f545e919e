"""Text-only hosts of every family keep their texts to the last bit; those that cannot are refused by name."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import unimm
from unimm.errors import UserError
from unimm.mllm import attach
from unimm.mllm.export import causal_lm, detach, stock_understanding
from unimm.mllm.hosts.heads import finished_logits
from unimm.mllm.hosts.text_only import TEXT_HOSTS
from unimm.testing.hosts import ROWS, text_tokenizer, tiny_host, tiny_tokenizer
from unimm.training.language_model.adapters import LoraSettings, add_lora

GREEDY = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": [], "pad_token_id": 0}


def attached(family: str, **options: Any) -> tuple[PreTrainedModel, Any, Any]:
    host, texts = tiny_host(family)
    return host, *attach(host, tiny_tokenizer(host, "siglip_vision_model")[0], texts, **options)


def prompts() -> dict[str, torch.Tensor]:
    """Return two prompts longer than the tiny hosts' sliding windows, one of them padded on the left."""
    ids = torch.randint(10, 200, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("family", TEXT_HOSTS)
@torch.no_grad()
def test_attach_text_save_draw_detach(family: str, tmp_path: Path) -> None:
    host, model, processor = attached(family)
    inputs = prompts()
    expected = host(**inputs).logits
    assert torch.equal(model(**inputs).logits[..., :ROWS], expected)
    written = host.generate(**inputs, **GREEDY)
    assert torch.equal(model.generate(**inputs, **GREEDY), written)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, _ = unimm.load(tmp_path)
    assert torch.equal(again(**inputs).logits[..., :ROWS], expected)
    drawing = {"generation_mode": "image", "guidance_scale": 2.0}
    drawn = model.generate(**inputs, **drawing, seed=[1, 2])
    assert torch.equal(again.generate(**inputs, **drawing, seed=[1, 2]), drawn)
    alone = {name: value[1:, 5:] for name, value in inputs.items()}
    assert torch.equal(model.generate(**alone, **drawing, seed=2), drawn[1:])
    state = detach(again).state_dict()
    assert state.keys() == host.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in host.state_dict().items())
    stock = causal_lm(model)
    everything = model(**inputs, vocabulary="all").logits
    torch.testing.assert_close(stock(**inputs).logits, everything, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "gpt2", "phi"])
@torch.no_grad()
def test_a_static_cache_gives_the_same_ids(family: str) -> None:
    _, model, _ = attached(family)
    dynamic = model.generate(**prompts(), **GREEDY)
    assert torch.equal(model.generate(**prompts(), **GREEDY, cache_implementation="static"), dynamic)


@pytest.mark.parametrize("family", ["gemma2", "granite", "cohere"])
def test_finished_logits_are_those_of_the_stock_model(family: str) -> None:
    host, _ = tiny_host(family)
    with torch.no_grad():
        raw = host.get_output_embeddings()(host.base_model(**prompts()).last_hidden_state)
        assert not torch.equal(raw, host(**prompts()).logits)
        assert torch.equal(finished_logits(raw, host.config), host(**prompts()).logits)


@pytest.mark.parametrize("family", ["gpt2", "gemma3_text", "phi"])
def test_lora_trains_and_its_base_keeps_its_bits(family: str, tmp_path: Path) -> None:
    _, model, _ = attached(family)
    with torch.no_grad():
        before = model(**prompts()).logits[..., :ROWS]
    adapter = add_lora(model, LoraSettings(r=2, alpha=4, dropout=0.0, dtype="float32"), base=str(tmp_path))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert any("trainable_tokens_delta" in name for name in trained) and any("lora_A" in name for name in trained)
    ids = torch.tensor([[20, 21, model.config.image_vocab_start, model.config.image_vocab_start + 5]])
    model.train()(input_ids=ids, labels=ids).loss.backward()
    learning = [p for p in model.parameters() if p.requires_grad and p.grad is not None]
    torch.optim.SGD(learning, lr=1.0).step()
    with torch.no_grad():
        assert not torch.equal(model.eval()(**prompts(), vocabulary="all").logits[..., :ROWS], before)
        with adapter.peft.disable_adapter():
            assert torch.equal(model(**prompts(), vocabulary="text").logits[..., :ROWS], before)


def test_a_stock_llava_cannot_finish_logits() -> None:
    _, model, processor = attached("gemma2")
    with pytest.raises(UserError, match="head of this gemma2 has logits that are scaled or capped"):
        stock_understanding(model, processor)
    _, model, processor = attached("phi")
    with pytest.raises(UserError, match="head of this phi has a bias"):
        stock_understanding(model, processor)


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": ROWS}
REFUSED = {
    "bert": ({**SMALL, "intermediate_size": 64}, "its logits are not those of its head"),
    "lfm2": ({**SMALL, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]}, "its cache holds more"),
    "opt": ({**SMALL, "ffn_dim": 64, "word_embed_proj_dim": 16}, "its embedding is 16 wide and its decoder 32"),
    "bloom": (
        {"hidden_size": 32, "n_layer": 2, "n_head": 2, "vocab_size": ROWS},
        "its config does not say how many tokens",
    ),
}


@pytest.mark.parametrize("family", REFUSED)
def test_others_are_refused_by_name(family: str) -> None:
    fields, why = REFUSED[family]
    torch.manual_seed(0)
    host = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **fields))
    modes = [module.training for module in host.modules()]
    before = copy.deepcopy(host.state_dict())
    tokenizer, _ = tiny_tokenizer(tiny_host("llama")[0], "siglip_vision_model")
    with pytest.raises(UserError, match=f"The host is a {family} model, which cannot be attached: {why}"):
        attach(host, tokenizer, text_tokenizer(()))
    assert [module.training for module in host.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in host.state_dict().items())
