"""Stock multimodal hosts: what they knew stays, to the last bit, when the tokenizer is built on their own encoder."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)

from tests.mllm import tiny
from unimm.errors import UserError
from unimm.mllm import attach
from unimm.mllm.hosts.registry import HOSTS as FAMILIES
from unimm.tokenizer import VQRAE

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
ROWS = 320


def text_config(rows: int = ROWS, tied: bool = False) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=rows,
        num_key_value_heads=1,
        max_position_embeddings=256,
        initializer_range=0.2,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=None,
        **SIZES,
    )


def texts(*markers: str) -> PreTrainedTokenizerFast:
    return tiny.text_tokenizer(("<|im_start|>", "<|im_end|>", *markers))


def llava_clip() -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    tokenizer = texts("<image>")
    vision = CLIPVisionConfig(image_size=16, patch_size=4, **SIZES)
    config = LlavaConfig(
        vision_config=vision,
        text_config=text_config(),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    return LlavaForConditionalGeneration(config), tokenizer


def llava_siglip() -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    tokenizer = texts("<image>")
    vision = SiglipVisionConfig(image_size=16, patch_size=4, vision_use_head=False, **SIZES)
    config = LlavaConfig(
        vision_config=vision,
        text_config=text_config(tied=True),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return LlavaForConditionalGeneration(config), tokenizer


def internvl() -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    tokenizer = texts("<img>", "<IMG_CONTEXT>", "</img>")
    vision = InternVLVisionConfig(image_size=[16, 16], patch_size=[4, 4], attention_bias=True, **SIZES)
    config = InternVLConfig(
        vision_config=vision,
        text_config=text_config(),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    host = InternVLForConditionalGeneration(config)
    torch.nn.init.normal_(host.model.vision_tower.embeddings.patch_embeddings.projection.weight)  # 0 by default
    return host, tokenizer


HOSTS = {"llava-clip": (llava_clip, -2, 1), "llava-siglip": (llava_siglip, -1, 1), "internvl": (internvl, -1, 4)}


def build(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerFast, VQRAE, int]:
    """A random host, its text tokenizer, an image tokenizer on the host's own encoder, patches per seen token."""
    torch.manual_seed(5)
    make, layer, merged = HOSTS[name]
    host, tokenizer = make()
    tower, post_norm = host.model.vision_tower, FAMILIES[host.config.model_type].post_norm
    fields = {"codebook_size": 32, "codebook_dim": 8, "feature_layer": layer, "apply_post_norm": post_norm}
    image_tokenizer = VQRAE(VQRAE.config_class(encoder_config=tower.config.to_dict(), **fields))
    image_tokenizer.encoder.load_state_dict(tower.state_dict())
    return host.eval(), tokenizer, image_tokenizer.eval(), merged


def sentence(host: PreTrainedModel, images: int, merged: int) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids [2, L] that hold one image each among text, and pixel_values."""
    torch.manual_seed(6)
    before, after = torch.randint(0, 250, (2, 3)), torch.randint(0, 250, (2, 9))
    placeholders = torch.full((2, 16 // merged), host.config.image_token_id)
    return torch.cat([before, placeholders, after], 1), torch.randn(images, 3, 16, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", HOSTS)
def test_understanding_logits_change_by_exactly_zero(name: str, dtype: torch.dtype) -> None:
    host, tokenizer, image_tokenizer, merged = build(name)
    host = host.to(dtype)
    model, _ = attach(host, image_tokenizer, tokenizer)
    assert model.dtype == dtype and model.image_tokenizer.quantizer.codebook.dtype == torch.float32
    input_ids, pixel_values = sentence(host, 2, merged)
    pixel_values = pixel_values.to(dtype)
    with torch.no_grad():
        expected = host(input_ids=input_ids, pixel_values=pixel_values).logits
        found = model(input_ids=input_ids, pixel_values=pixel_values).logits
        text = torch.randint(0, 250, (3, 7))
        assert torch.equal(model(input_ids=text).logits[..., :ROWS], host(input_ids=text).logits)
    assert torch.equal(found[..., :ROWS], expected)
    assert model.attachment.untrained == ("image rows",) and "projector" in model.attachment.kept


@pytest.mark.parametrize("name", HOSTS)
def test_answers_are_the_hosts_and_drawings_are_images(name: str) -> None:
    host, tokenizer, image_tokenizer, merged = build(name)
    model, processor = attach(host, image_tokenizer, tokenizer)
    messages = [tiny.user(tiny.image(), "is there a red circle?")]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 16 // merged
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": [], "pad_token_id": 0}
    theirs = host.generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, **options), theirs)
    drawn = model.generate(**inputs, generation_mode="image", seed=1, num_return_sequences=2, guidance_scale=2.0)
    assert drawn.shape == (2, 16)
    assert processor.postprocess(model.decode_image_tokens(drawn))[0].size == (16, 16)


@pytest.mark.parametrize("name", HOSTS)
def test_saved_and_reloaded_by_the_auto_classes(name: str, tmp_path: Path) -> None:
    host, tokenizer, image_tokenizer, merged = build(name)
    model, processor = attach(host, image_tokenizer, tokenizer)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    input_ids, pixel_values = sentence(host, 2, merged)
    with torch.no_grad():
        pair = {"input_ids": input_ids, "pixel_values": pixel_values}
        assert torch.equal(again(**pair).logits, model(**pair).logits)
    assert type(again.image_tokenizer) is VQRAE and type(again) is type(model)
    reread = AutoProcessor.from_pretrained(tmp_path)
    assert (reread.image_seq_length, reread.mark_images) == (16 // merged, processor.mark_images)


@pytest.mark.parametrize("name", HOSTS)
def test_labels_reach_tower_projector_and_new_rows(name: str) -> None:
    host, tokenizer, image_tokenizer, merged = build(name)
    model, _ = attach(host, image_tokenizer, tokenizer)
    input_ids, pixel_values = sentence(host, 2, merged)
    base = model.config.image_vocab_start
    input_ids[:, -1] = torch.tensor([base, base + 31])
    model.train()
    loss = model(input_ids=input_ids, pixel_values=pixel_values, labels=input_ids).loss
    loss.backward()
    assert torch.isfinite(loss)
    head = model.get_output_embeddings().weight.grad
    assert head[base].abs().sum() > 0 and head[base + 31].abs().sum() > 0
    for part in (model.model.multi_modal_projector, model.image_tokenizer.encoder):
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())


def test_a_projector_of_another_width_is_new_and_said_so() -> None:
    host, tokenizer, *_ = build("llava-siglip")
    wide = SiglipVisionConfig(image_size=16, patch_size=4, **(SIZES | {"hidden_size": 48})).to_dict()
    image_tokenizer = VQRAE(VQRAE.config_class(encoder_config=wide, codebook_size=32, codebook_dim=8))
    model, _ = attach(host, image_tokenizer, tokenizer)
    assert model.attachment.untrained == ("projector", "image rows")
    assert "recipes/sft.py (projector first" in model.attachment.sentence()


def test_a_grid_that_the_host_cannot_merge_is_refused_with_both_numbers() -> None:
    host, tokenizer, *_ = build("internvl")
    odd = SiglipVisionConfig(image_size=20, patch_size=4, **SIZES).to_dict()
    image_tokenizer = VQRAE(VQRAE.config_class(encoder_config=odd, codebook_size=32, codebook_dim=8))
    with pytest.raises(UserError, match="merges 2 x 2 patches.*grid of 5 x 5 does not divide by 2"):
        attach(host, image_tokenizer, tokenizer)
