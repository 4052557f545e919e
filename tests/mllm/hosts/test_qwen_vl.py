"""Qwen2.5-VL and Qwen3-VL hosts: positions and logits held to the stock models', drawings to runs without a cache."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, DynamicCache

from tests.mllm import tiny
from unimm.errors import UserError
from unimm.mllm import attach
from unimm.mllm.export import causal_lm, detach, stock_understanding
from unimm.mllm.hosts.qwen_vl import MergedPatches, mrope_positions
from unimm.testing.hosts import tiny_host, vision_config
from unimm.tokenizer import VQRAE

HOSTS = ("qwen2_5_vl", "qwen3_vl")
MODES = ("1d", "2d")


def image_tokenizer(width: int = 32, side: int = 16) -> VQRAE:
    torch.manual_seed(3)
    config = vision_config("siglip_vision_model").to_dict() | {"hidden_size": width, "image_size": side}
    return VQRAE(VQRAE.config_class(encoder_config=config, codebook_size=32, codebook_dim=8)).eval()


def unified(family: str, mode: str = "1d") -> tuple[Any, Any, Any]:
    host, texts = tiny_host(family)
    return (*attach(host, image_tokenizer(), texts, image_position_mode=mode), host)


def sentences(model: Any) -> tuple[Tensor, Tensor]:
    """Three rows, padded on the left: two images, one image, none. input_ids and mask [3, 24]."""
    torch.manual_seed(4)
    seen = [model.config.image_token_id] * 4
    text = torch.randint(10, 200, (60,)).tolist()
    rows = [text[:3] + seen + text[3:4] + seen + text[4:16], text[20:25] + seen + text[25:27], text[30:37]]
    ids = torch.tensor([[0] * (24 - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (24 - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


@pytest.mark.parametrize("family", HOSTS)
def test_positions_of_seen_images_are_the_stock_models(family: str) -> None:
    model, _, host = unified(family)
    ids, mask = sentences(model)
    expected, deltas = host.model.get_rope_index(
        ids,
        mm_token_type_ids=(ids == model.config.image_token_id).int(),
        image_grid_thw=torch.tensor([[1, 4, 4]] * 3),
        attention_mask=mask,
    )
    assert torch.equal(model.token_positions(ids, mask), expected)
    cache = DynamicCache()
    model(input_ids=ids, attention_mask=mask, pixel_values=torch.randn(3, 3, 16, 16), past_key_values=cache)
    assert torch.equal(cache.rope_deltas, deltas) and model.model.rope_deltas is None


@pytest.mark.parametrize("family", HOSTS)
@torch.no_grad()
def test_a_cache_goes_on_where_its_own_images_ended(family: str) -> None:
    """Two conversations in turn on one model: neither takes its positions from the other."""
    model, _, _ = unified(family)
    ids, mask = sentences(model)
    pixel_values = torch.randn(3, 3, 16, 16)
    whole = model(input_ids=ids, attention_mask=mask, pixel_values=pixel_values).logits
    caches = [DynamicCache() for _ in range(3)]
    images = pixel_values.split([2, 1, 0])
    for n, cache in enumerate(caches):
        row = ids[n : n + 1, mask[n].bool()]
        model(input_ids=row[:, :-1], pixel_values=images[n] if len(images[n]) else None, past_key_values=cache)
    for n, cache in enumerate(caches):
        logits = model(input_ids=ids[n : n + 1, -1:], past_key_values=cache).logits
        torch.testing.assert_close(logits[0, -1], whole[n, -1])


@pytest.mark.parametrize("family", HOSTS)
@torch.no_grad()
def test_logits_are_the_stock_models_for_the_same_features(family: str) -> None:
    model, _, host = unified(family)
    ids, mask = sentences(model)
    pixel_values = torch.randn(3, 3, 16, 16)
    features = model.get_image_features(pixel_values)
    expected = host(
        input_ids=ids,
        attention_mask=mask,
        mm_encoder_outputs={"image": features},
        mm_token_type_ids=(ids == model.config.image_token_id).int(),
        image_grid_thw=torch.tensor([[1, 4, 4]] * 3),
    ).logits
    found = model(input_ids=ids, attention_mask=mask, pixel_values=pixel_values).logits
    assert torch.equal(found[..., : expected.shape[-1]], expected)


@pytest.mark.parametrize("family", HOSTS)
@torch.no_grad()
def test_greedy_texts_are_those_of_runs_without_a_cache(family: str) -> None:
    model, processor, _ = unified(family)
    chats = [
        [tiny.user(tiny.image("red"), "is there a blue ring? ", tiny.image("blue"), "yes")],
        [tiny.user("no")],
        [tiny.user(tiny.image("green"), "one")],
    ]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    batch = processor.apply_chat_template(chats, processor_kwargs={"padding": True}, **options)
    written = model.generate(**batch, max_new_tokens=8, do_sample=False, eos_token_id=[], pad_token_id=0)
    for n, chat in enumerate(chats):
        inputs = processor.apply_chat_template(chat, **options)
        ids, images = inputs["input_ids"], {k: v for k, v in inputs.items() if k == "pixel_values"}
        for _ in range(8):
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **images).logits[:, -1]
            ids = torch.cat([ids, logits[:, : model.config.text_vocab_size].argmax(-1, keepdim=True)], 1)
        assert torch.equal(written[n, -8:], ids[0, -8:])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", HOSTS)
@torch.no_grad()
def test_greedy_drawings_are_those_of_runs_without_a_cache(family: str, mode: str) -> None:
    model, processor, _ = unified(family, mode)
    texts = [processor.drawing_prompt(text) for text in ("a red circle", "two blue squares and a ring")]
    batch = processor(text=texts, return_tensors="pt", padding=True)
    drawn = model.generate(**batch, generation_mode="image", do_sample=False, guidance_scale=None)
    base = model.config.image_vocab_start
    for n, text in enumerate(texts):
        ids = processor(text=[text], return_tensors="pt")["input_ids"]
        for _ in range(16):
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), vocabulary="image").logits[:, -1]
            ids = torch.cat([ids, base + logits.argmax(-1, keepdim=True)], 1)
        assert torch.equal(drawn[n], ids[0, -16:])


@torch.no_grad()
def test_modes_of_positions_differ_in_drawn_images_only() -> None:
    model, _, _ = unified("qwen2_5_vl", "2d")
    base = model.config.image_vocab_start
    ids = torch.tensor([[10, 11, *range(base, base + 16), 12]])
    positions = model.token_positions(ids, torch.ones_like(ids))
    grid = [[2] * 16, [2 + k // 4 for k in range(16)], [2 + k % 4 for k in range(16)]]
    assert positions[:, 0].tolist() == [[0, 1, *row, 6] for row in grid]
    model.config.image_position_mode = "1d"
    assert positions.shape == (3, 1, 19)
    assert torch.equal(model.token_positions(ids, torch.ones_like(ids)), torch.arange(19).expand(3, 1, -1))
    seen, mask = sentences(model)
    one = model.token_positions(seen, mask)
    model.config.image_position_mode = "2d"
    assert torch.equal(model.token_positions(seen, mask), one)


def test_positions_of_images_that_follow_each_other_directly() -> None:
    places = torch.tensor([[False, *[True] * 8, False]])
    found = mrope_positions(torch.ones(1, 10, dtype=torch.long), [(places, 2, 2)])
    assert found[1, 0].tolist() == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5]
    assert found[2, 0].tolist() == [0, 1, 2, 1, 2, 3, 4, 3, 4, 5]


@pytest.mark.parametrize("mode", MODES)
def test_the_mode_is_part_of_the_checkpoint(mode: str, tmp_path: Path) -> None:
    model, processor, _ = unified("qwen3_vl", mode)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    inputs = AutoProcessor.from_pretrained(tmp_path)(text=[processor.drawing_prompt("a")], return_tensors="pt")
    draw = {"generation_mode": "image", "seed": 3, "guidance_scale": 2.0}
    assert again.config.image_position_mode == mode
    assert torch.equal(again.generate(**inputs, **draw), model.generate(**inputs, **draw))


def test_a_merged_token_is_the_merger_of_a_block_of_patches() -> None:
    model, _, _ = unified("qwen2_5_vl")
    projector: MergedPatches = model.model.multi_modal_projector
    features = torch.randn(2, 16, 32)
    grid = features.view(2, 4, 4, 32)
    for row in range(2):
        for column in range(2):
            block = grid[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].reshape(2 * 4, 32)
            torch.testing.assert_close(projector(features)[:, 2 * row + column], projector.merger(block))


@pytest.mark.parametrize("family", HOSTS)
def test_the_merger_is_kept_where_the_widths_agree(family: str) -> None:
    host, texts = tiny_host(family)
    model, _ = attach(host, image_tokenizer(), texts)
    ours, theirs = model.model.multi_modal_projector.merger.state_dict(), host.model.visual.merger.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert model.attachment.untrained == ("image rows",)
    model, _ = attach(host, image_tokenizer(width=48), texts)
    assert model.attachment.untrained == ("projector", "image rows")


@pytest.mark.parametrize(("family", "plain"), [("qwen2_5_vl", "qwen2"), ("qwen3_vl", "qwen3")])
@torch.no_grad()
def test_the_language_model_goes_out_as_a_plain_one(family: str, plain: str, tmp_path: Path) -> None:
    model, _, _ = unified(family)
    causal_lm(model).save_pretrained(tmp_path)
    alone = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.randint(0, model.visual_vocabulary.end, (2, 20))
    ids[ids == model.config.image_token_id] = 1
    assert alone.config.model_type == plain
    assert torch.equal(alone(input_ids=ids).logits, model(input_ids=ids, vocabulary="all").logits)


def test_what_these_hosts_cannot_do_is_refused() -> None:
    model, processor, host = unified("qwen3_vl", "2d")
    with pytest.raises(UserError, match="rows and columns"):
        causal_lm(model)
    with pytest.raises(UserError, match="stock qwen3_vl reads patches of any image size"):
        stock_understanding(model, processor)
    with pytest.raises(UserError, match="tower or projector was replaced"):
        detach(model)
    with pytest.raises(UserError, match="come from another processor"):
        model.get_image_features(torch.randn(16, 96), image_grid_thw=torch.tensor([[1, 4, 4]]))
    with pytest.raises(UserError, match="not videos"):
        model.get_video_features(torch.randn(16, 96))
    with pytest.raises(UserError, match="merges 2 x 2 patches.*grid of 5 x 5 does not divide by 2"):
        attach(host, image_tokenizer(side=20), tiny.text_tokenizer())
    with pytest.raises(UserError, match='"2d" is for qwen2_5_vl and qwen3_vl'):
        attach(tiny.language_model(), image_tokenizer(), tiny.text_tokenizer(), image_position_mode="2d")
