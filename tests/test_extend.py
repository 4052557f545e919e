"""docs/extend.md: the tokenizer that it writes keeps the promises that it makes, and its code is short."""

import re
import sys
from types import ModuleType

import pytest
import torch
from transformers import AutoModel

from tests.conftest import ROOT
from tests.mllm import tiny
from unimm.mllm import attach
from unimm.tokenizer import TOKENIZERS
from unimm.training.tokenizer.objective import ObjectiveConfig, PerceptualConfig, TokenizerObjective

TEXT = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")


@pytest.fixture
def pooled(monkeypatch: pytest.MonkeyPatch) -> type:
    monkeypatch.setitem(TOKENIZERS, "pooled", None)  # and gone afterwards
    (code,) = re.findall(r"^```python\n(.*?)^```", TEXT, flags=re.DOTALL | re.MULTILINE)
    assert len(code.splitlines()) < 60
    module = ModuleType("pooled")
    monkeypatch.setitem(sys.modules, "pooled", module)
    exec(compile(code, "docs/extend.md", "exec"), module.__dict__)
    return module.Pooled


def test_a_fourth_tokenizer(pooled, tmp_path):
    assert TOKENIZERS["pooled"] is pooled
    encoder = {"model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    encoder |= {"num_attention_heads": 4, "image_size": 32, "patch_size": 4}
    tokenizer = pooled(pooled.config_class(encoder_config=encoder, codebook_size=32, codebook_dim=8)).eval()
    pixel_values = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        output = tokenizer.reconstruct(pixel_values)
        assert output.ids.shape == (2, 16) and output.features.shape == (2, 64, 32)
        assert torch.equal(tokenizer.decode(output.ids), output.pixels.clamp(0, 1))
    tokenizer.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path).eval()
    assert type(again) is pooled and torch.equal(again.encode(pixel_values).ids, output.ids)
    objective = TokenizerObjective(ObjectiveConfig(perceptual=PerceptualConfig(kind="none")))
    terms = objective.terms(tokenizer.train().reconstruct(pixel_values), tokenizer.denormalize(pixel_values), None)
    objective.total(terms).backward()
    assert tokenizer.quantizer.codebook.grad.any() and tokenizer.sampler.projection.weight.grad.any()
    model, processor = attach(tiny.language_model(), tokenizer.eval(), tiny.text_tokenizer())
    assert (processor.image_seq_length, model.num_image_tokens) == (64, 16)
