"""Adapters on a unified model: PEFT trains the new rows alone, saves them small and merges them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from tests.mllm import tiny

LANGUAGE_MODEL = r".*language_model.*\.(q|v)_proj"


def adapted(tied: bool) -> tuple[Any, Any, torch.Tensor]:
    """An adapted model after one large step, the plain one's rows before it, and a sentence with image ids."""
    model, _ = tiny.unified(tied=tied)
    before = [model.get_input_embeddings().weight.clone(), model.get_output_embeddings().weight.clone()]
    rows = model.trainable_token_indices()
    config = LoraConfig(r=2, target_modules=LANGUAGE_MODEL, trainable_token_indices=rows)
    base = model.config.image_vocab_start
    input_ids = torch.tensor([[5, 6, model.config.boi_token_id, base, base + 3, model.config.eoi_token_id, 7]])
    adapted = get_peft_model(model, config).train()
    adapted(input_ids=input_ids, labels=input_ids).loss.backward()
    torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0).step()
    return adapted.eval(), before, input_ids


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_only_the_new_rows_and_the_adapters_change(tied: bool) -> None:
    with torch.enable_grad():
        model, before, input_ids = adapted(tied)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name or "trainable_tokens_delta" in name for name in trained)
    assert not any("vision_tower" in name for name in trained)
    expected = model(input_ids=input_ids).logits
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=input_ids).logits, expected, rtol=1e-4, atol=1e-5)
    new = set(merged.trainable_token_indices()["embed_tokens"])
    for old, layer in zip(before, (merged.get_input_embeddings(), merged.get_output_embeddings()), strict=True):
        changed = (old != layer.weight).any(1).nonzero()[:, 0].tolist()
        assert changed and set(changed) <= new


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_an_adapter_reloads_and_draws_the_same(tied: bool, tmp_path: Path) -> None:
    with torch.enable_grad():
        model, _, input_ids = adapted(tied)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny.unified(tied=tied)[0], tmp_path).eval()
    for vocabulary in ("text", "image"):
        expected = model(input_ids=input_ids, vocabulary=vocabulary).logits
        assert torch.equal(again(input_ids=input_ids, vocabulary=vocabulary).logits, expected)
    draw = {"generation_mode": "image", "seed": 2, "guidance_scale": 2.0}
    assert torch.equal(again.generate(input_ids=input_ids, **draw), model.generate(input_ids=input_ids, **draw))
