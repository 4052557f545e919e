"""Attaching leaves the host's text as it was, to the last bit, and says what it cannot do."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, PreTrainedModel

from tests.mllm import tiny
from unimm.errors import UserError
from unimm.mllm import attach

LENGTHS = (1, 2, 3, 4, 5, 6, 7, 50)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rows", [301, 304])
def test_text_logits_change_by_exactly_zero(rows: int, tied: bool, dtype: torch.dtype) -> None:
    host = tiny.language_model(rows=rows, tied=tied).to(dtype)
    model, _ = attach(host, tiny.image_tokenizer(), tiny.text_tokenizer())
    assert model.dtype == dtype and model.get_input_embeddings().weight.shape[0] == 384 + 32
    with torch.no_grad():
        for length in LENGTHS:
            input_ids = torch.randint(0, 290, (3, length))
            attention_mask = torch.ones_like(input_ids)
            attention_mask[1, : length // 2] = 0  # padded on the left
            for mask in (None, attention_mask):
                expected = host(input_ids, attention_mask=mask).logits
                found = model(input_ids, attention_mask=mask).logits
                assert found.shape[-1] == 384
                assert torch.equal(found[..., :rows], expected)


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rows", [290, 301], ids=["unpadded", "padded"])
def test_greedy_texts_do_not_change_at_all(family: str, rows: int, tied: bool) -> None:
    host = tiny.language_model(family, rows=rows, tied=tied)
    assert len(tiny.text_tokenizer()) == 290
    model, _ = attach(host, tiny.image_tokenizer(), tiny.text_tokenizer(), row_init="mean")
    input_ids = torch.randint(0, 290, (50, 6))
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": [], "pad_token_id": 0}
    mask = torch.ones_like(input_ids)
    assert torch.equal(
        model.generate(input_ids, attention_mask=mask, **options),
        host.generate(input_ids, attention_mask=mask, **options),
    )


def test_arguments_are_left_as_they_were() -> None:
    host, texts, images = tiny.language_model(), tiny.text_tokenizer(), tiny.image_tokenizer()
    before = [tensor.clone() for tensor in (*host.state_dict().values(), *images.state_dict().values())]
    size = len(texts)
    model, _ = attach(host, images, texts)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    after = [*host.state_dict().values(), *images.state_dict().values()]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert len(texts) == size and texts.chat_template is None and host.config.vocab_size == 301


def test_config_says_where_the_image_ids_are() -> None:
    model, processor = tiny.unified()
    config, tokenizer = model.config, processor.tokenizer
    assert (config.image_vocab_start, config.codebook_size, config.text_vocab_size) == (384, 32, 301)
    assert config.text_config.vocab_size == 416 and list(config.image_grid) == [4, 4]
    assert tokenizer.convert_ids_to_tokens([config.boi_token_id, config.image_token_id, config.eoi_token_id]) == [
        "<|vision_start|>",
        "<|image_pad|>",
        "<|vision_end|>",
    ]
    assert tokenizer.decode(config.null_prompt) == (
        "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n<|vision_start|>"
    )
    assert config.tokenizer_fingerprint == model.image_tokenizer.fingerprint
    assert config.vision_config.model_type == "vqrae" and config.image_position_mode == "1d"
    assert model.generation_config.eos_token_id[0] == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_the_tower_is_the_image_tokenizer_and_gives_its_features() -> None:
    images = tiny.image_tokenizer()
    model, processor = attach(tiny.language_model(), images, tiny.text_tokenizer())
    pixel_values = processor(images=[tiny.image()], return_tensors="pt").pixel_values
    with torch.no_grad():
        features = images(pixel_values).last_hidden_state
        projected = model.get_image_features(pixel_values, return_dict=True).pooler_output[0]
        torch.testing.assert_close(projected, model.model.multi_modal_projector(features)[0], rtol=0, atol=0)
    assert torch.equal(model.get_image_tokens(pixel_values), images.encode(pixel_values).ids + 384)
    assert torch.equal(
        model.decode_image_tokens(model.get_image_tokens(pixel_values)), images.decode(images.encode(pixel_values).ids)
    )


def test_codebook_stays_in_float32() -> None:
    model, _ = tiny.unified(dtype=torch.bfloat16)
    tower = model.image_tokenizer
    assert model.dtype == torch.bfloat16 and tower.encoder.dtype == torch.bfloat16
    kept = {*tower.quantizer.state_dict().values(), *tower.sampler.state_dict().values()}
    assert {tensor.dtype for tensor in kept} == {torch.float32}
    assert tower.fingerprint == tiny.image_tokenizer().fingerprint


def test_parts_can_be_given_as_paths(tmp_path: Path) -> None:
    host, images, texts = tiny.language_model(), tiny.image_tokenizer(), tiny.text_tokenizer()
    host.save_pretrained(tmp_path / "host")
    texts.save_pretrained(tmp_path / "host")
    images.save_pretrained(tmp_path / "images")
    model, _ = attach(tmp_path / "host", tmp_path / "images")
    expected, _ = attach(host, images, texts)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))


def test_arguments_of_loading_reach_the_host_and_the_result_spreads_over_devices(tmp_path: Path) -> None:
    host, texts = tiny.language_model(), tiny.text_tokenizer()
    host.save_pretrained(tmp_path / "host")
    texts.save_pretrained(tmp_path / "host")
    options = {"dtype": torch.bfloat16, "attn_implementation": "eager", "device_map": "cpu"}
    model, processor = attach(str(tmp_path / "host"), tiny.image_tokenizer(), **options)
    assert model.dtype == torch.bfloat16
    assert model.model.language_model.config._attn_implementation == "eager"
    model.save_pretrained(tmp_path / "model")
    parts = {"model.vision_tower": "cpu", "model.multi_modal_projector": "cpu", "model.language_model": "cpu"}
    inputs = processor(text=[processor.drawing_prompt("a red circle")], return_tensors="pt")
    draw = {"generation_mode": "image", "seed": 4, "guidance_scale": 2.0}
    expected = model.generate(**inputs, **draw)
    for device_map in ("auto", parts | {"lm_head": "cpu"}):
        again = AutoModelForImageTextToText.from_pretrained(
            tmp_path / "model", dtype=torch.bfloat16, device_map=device_map, attn_implementation="eager"
        )
        assert torch.equal(again.generate(**inputs, **draw), expected)


@pytest.mark.parametrize("part", ["host", "tokenizer"])
def test_parts_with_holes_are_refused_with_the_counts(part: str, tmp_path: Path) -> None:
    models = {"host": tiny.language_model(tied=False), "tokenizer": tiny.image_tokenizer()}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    file = tmp_path / part / "model.safetensors"
    weights = load_file(file)
    total, name = len(weights), sorted(weights)[3]
    del weights[name]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"loaded {total - 1} of {total} weights; missing 1 \({name}"):
        attach(tmp_path / "host", tmp_path / "tokenizer", tiny.text_tokenizer())


def test_what_cannot_be_attached_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="siglip_vision_model model; supported are llava.*AutoModelForCausalLM"):
        attach(tiny.image_tokenizer().encoder, tiny.image_tokenizer(), tiny.text_tokenizer())
    with pytest.raises(UserError, match="give text_tokenizer"):
        attach(tiny.language_model(), tiny.image_tokenizer())
    with pytest.raises(ValueError, match="row_init is 'none'"):
        attach(tiny.language_model(), tiny.image_tokenizer(), tiny.text_tokenizer(), row_init="none")
    tiny.image_tokenizer().encoder.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="siglip_vision_model model, not an image tokenizer"):
        attach(tiny.language_model(), tmp_path, tiny.text_tokenizer())


def test_later_text_tokens_take_spare_rows() -> None:
    model, _ = tiny.unified()
    weight = model.get_input_embeddings().weight
    model.resize_token_embeddings(310)
    assert model.config.text_vocab_size == 310 and model.get_input_embeddings().weight is weight
    model.resize_token_embeddings(305)
    assert model.config.text_vocab_size == 310
    with pytest.raises(ValueError, match="385 text tokens.*384"):
        model.resize_token_embeddings(385)


def gradient(model: PreTrainedModel, name: str) -> torch.Tensor:
    found = model.get_parameter(name).grad
    assert found is not None, name
    return found


@pytest.mark.parametrize("tied", [True, False])
def test_labels_train_projector_and_image_rows(tied: bool) -> None:
    model, processor = tiny.unified(tied=tied)
    model.train()
    seen = processor.apply_chat_template(
        [tiny.user(tiny.image(), "what?"), tiny.assistant("a red circle")],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    drawn = torch.cat([torch.tensor([model.config.null_prompt]), 384 + torch.arange(16)[None]], dim=1)
    loss = model(**seen, labels=seen["input_ids"]).loss + model(input_ids=drawn, labels=drawn).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert gradient(model, "model.multi_modal_projector.linear_1.weight").abs().sum() > 0
    assert gradient(model, "model.vision_tower.encoder.embeddings.patch_embedding.weight").abs().sum() > 0
    assert (gradient(model, "model.language_model.embed_tokens.weight")[384:399].abs().sum(1) > 0).all()
    assert (gradient(model, "lm_head.weight")[384:].abs().sum(1) > 0).all()


def test_loss_is_the_plain_next_token_loss_over_the_whole_vocabulary() -> None:
    model, _ = tiny.unified()
    input_ids = torch.tensor([[5, 6, 384, 400, 415, 7]])
    labels = input_ids.clone()
    labels[:, :2] = -100
    with torch.no_grad():
        output = model(input_ids, labels=labels)
    assert output.logits.shape == (1, 6, 416)
    expected = torch.nn.functional.cross_entropy(output.logits[0, 1:-1], input_ids[0, 2:])
    torch.testing.assert_close(output.loss, expected)


def test_forward_computes_the_rows_that_are_asked_for() -> None:
    model, _ = tiny.unified()
    input_ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        everything = model(input_ids, vocabulary="all").logits
        torch.testing.assert_close(model(input_ids).logits, everything[..., :384])
        torch.testing.assert_close(model(input_ids, vocabulary="image").logits, everything[..., 384:])
        answer = model(input_ids, vocabulary="answer", logits_to_keep=1).logits
        assert model.train()(input_ids).logits.shape == everything.shape
    torch.testing.assert_close(answer, everything[:, -1:, :301])
    with pytest.raises(ValueError, match="'pixels'; known"):
        model(input_ids, vocabulary="pixels")
    with pytest.raises(ValueError, match="labels need"):
        model(input_ids, labels=input_ids, vocabulary="text")


def test_a_wrapped_head_gives_the_same_logits() -> None:
    model, _ = tiny.unified(tied=False)

    class Wrapped(torch.nn.Linear):
        """Stands for a quantized or adapted head, whose weight alone says nothing."""

    input_ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        expected = [model(input_ids, vocabulary=each).logits for each in ("text", "image", "answer")]
        model.lm_head.__class__ = Wrapped
        found = [model(input_ids, vocabulary=each).logits for each in ("text", "image", "answer")]
    torch.testing.assert_close(found, expected)
