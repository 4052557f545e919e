"""VFMTok and IDEAL inside a language model: what is seen is patches, what is drawn is ids, and they need not be as
many."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.mllm import tiny
from tests.tokenizer.conftest import tiny as tiny_tokenizer
from unimm.mllm import attach
from unimm.mllm.doctor import examine
from unimm.testing.hosts import tiny_host

TOKENS = {"vfmtok": 9, "ideal": 16}


def attached(kind: str):
    images = tiny_tokenizer(kind, codebook_size=32, codebook_dim=8)
    return images, *attach(tiny.language_model(), images, tiny.text_tokenizer())


@pytest.mark.parametrize("kind", TOKENS)
def test_seen_tokens_are_patches_and_drawn_tokens_are_ids(kind: str) -> None:
    images, model, processor = attached(kind)
    assert (model.config.image_seq_length, model.num_image_tokens) == (16, TOKENS[kind])
    assert (processor.image_seq_length, processor.num_image_tokens) == (16, TOKENS[kind])
    inputs = processor(text="<|image_pad|>", images=[tiny.image()], return_tensors="pt")
    assert int((inputs.input_ids == model.config.image_token_id).sum()) == 16
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()
        features = model.get_image_features(inputs.pixel_values, return_dict=True).pooler_output[0]
    assert features.shape == (16, 32)
    token_ids = model.get_image_tokens(inputs.pixel_values)
    assert torch.equal(token_ids, images.encode(inputs.pixel_values).ids + model.config.image_vocab_start)
    assert torch.equal(model.decode_image_tokens(token_ids), images.decode(token_ids - model.config.image_vocab_start))


@pytest.mark.parametrize("kind", TOKENS)
def test_a_reloaded_host_sees_and_draws_the_same(kind: str, tmp_path: Path) -> None:
    images, model, processor = attached(kind)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    reader = AutoProcessor.from_pretrained(tmp_path)
    assert type(again.image_tokenizer) is type(images) and reader.image_seq_length == 16
    pixel_values = reader(images=[tiny.image("green")], return_tensors="pt").pixel_values
    assert torch.equal(again.image_tokenizer.encode(pixel_values).ids, images.encode(pixel_values).ids)
    assert again.image_tokenizer.fingerprint == images.fingerprint == again.config.tokenizer_fingerprint
    drawn = []
    for one, its in ((model, processor), (again, reader)):
        prompt = its(text=[its.drawing_prompt("a photo of a red circle")], return_tensors="pt")
        drawn.append(one.generate(**prompt, generation_mode="image", seed=3))
    assert torch.equal(*drawn) and drawn[0].shape == (1, TOKENS[kind])
    assert again.decode_image_tokens(drawn[1]).shape == (1, 3, 32, 32)


@pytest.mark.parametrize("kind", TOKENS)
@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "internvl"])
def test_multimodal_hosts_take_them(kind: str, family: str) -> None:
    host, texts = tiny_host(family)
    images = tiny_tokenizer(kind, codebook_size=32, codebook_dim=8)
    model, processor = attach(host, images, texts, image_position_mode="2d" if family == "qwen3_vl" else "1d")
    seen = processor.image_seq_length
    assert (seen, model.num_image_tokens) == (16 if family == "llava" else 4, TOKENS[kind])
    inputs = processor(text=processor.image_token, images=[tiny.image()], return_tensors="pt")
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()
        prompt = processor(text=[processor.drawing_prompt("red")], return_tensors="pt")
        assert model.generate(**prompt, generation_mode="image", seed=1).shape == (1, TOKENS[kind])


@pytest.mark.parametrize("kind", TOKENS)
def test_the_doctor_finds_nothing(kind: str) -> None:
    _, model, processor = attached(kind)
    assert [finding.line() for finding in examine(model, processor) if not finding.ok] == []
