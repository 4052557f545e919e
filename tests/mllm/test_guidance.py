"""Two guidance scales, for images and for text, against three forwards without cache, batch or padding."""

from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.mllm import tiny
from unimm.errors import UserError
from unimm.mllm.answering import chat_inputs

TEXTS = ["a photo of a red circle", "two", "an image of two green squares"]
COLORS = ["red", "blue", "red"]


def inputs(model: Any, processor: Any, texts: list[str]) -> dict[str, Any]:
    """Return prompts of one image and a text each, and the same without texts."""
    turns = [[tiny.user(tiny.image(color), text)] for color, text in zip(COLORS, texts, strict=True)]
    alone = [[tiny.user(tiny.image(color), "")] for color in COLORS]
    images = chat_inputs(model, processor, alone)
    extra = {"image_prompt_ids": images["input_ids"], "image_prompt_attention_mask": images["attention_mask"]}
    return dict(chat_inputs(model, processor, turns)) | extra


def slow(model: Any, prompt: Tensor, drawn: Tensor, pixel_values: Tensor | None) -> Tensor:
    """Return the logits [M, K] before each drawn id, by one forward."""
    boi = torch.tensor([model.config.boi_token_id])
    whole = torch.cat([prompt, boi, drawn[:-1]])[None]
    return model(whole, pixel_values=pixel_values, vocabulary="image").logits[0, -len(drawn) :]


@torch.no_grad()
def expected_logits(model: Any, batch: dict[str, Any], n: int, drawn: Tensor, scales: tuple[float, float]) -> Tensor:
    """Return e(0, 0) + image scale (e(image, 0) - e(0, 0)) + scale (e(image, text) - e(image, 0))."""
    pixels = batch["pixel_values"][n : n + 1]
    prompt = batch["input_ids"][n][batch["attention_mask"][n].bool()]
    image = batch["image_prompt_ids"][n][batch["image_prompt_attention_mask"][n].bool()]
    both, one = slow(model, prompt, drawn, pixels), slow(model, image, drawn, pixels)
    neither = slow(model, torch.tensor(model.config.null_prompt[:-1]), drawn, None)
    return neither + scales[1] * (one - neither) + scales[0] * (both - one)


@pytest.mark.parametrize("family", ["qwen3", "qwen2_5_vl", "internvl"])
def test_two_scales_are_exact(family: str, rows_fed: list[int]) -> None:
    model, processor = tiny.attached(family)
    batch = inputs(model, processor, TEXTS)
    for scales, images, rows in (
        (4.0, 2.0, [9] * 15),
        ([3.0, 1.0, 0.0], [1.5, 2.0, 1.0], [7] * 15),  # the third is not guided
        (5.0, 1.0, [6] * 15),  # images alone take the null prompt's place
        (1.0, 1.0, [3] * 15),
    ):
        rows_fed.clear()
        asked = {"guidance_scale": scales, "image_guidance_scale": images, "seed": 3}
        output = model.generate(
            **batch, generation_mode="image", return_dict_in_generate=True, output_logits=True, **asked
        )
        assert rows_fed == rows
        for n in range(3):
            pair = [max(each[n] if isinstance(each, list) else each, 1.0) for each in (scales, images)]
            expected = expected_logits(model, batch, n, output.sequences[n], (pair[0], pair[1]))
            found = torch.stack([step[n] for step in output.logits])
            torch.testing.assert_close(found, expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-5)
        again = model.generate(**batch, generation_mode="image", parallel_tokens=4, **asked)
        assert torch.equal(again, output.sequences)


def test_equal_scales_are_one_scale() -> None:
    """In eq. 3 the images' side cancels if both scales are equal."""
    model, processor = tiny.unified()
    batch = inputs(model.double(), processor, TEXTS)
    both = model.generate(**batch, generation_mode="image", seed=1, guidance_scale=3.0, image_guidance_scale=3.0)
    assert torch.equal(both, model.generate(**batch, generation_mode="image", seed=1, guidance_scale=3.0))
    other = model.generate(**batch, generation_mode="image", seed=1, guidance_scale=3.0, image_guidance_scale=1.5)
    assert not torch.equal(both, other)


def test_intervals_and_several_images_hold_for_both_scales(rows_fed: list[int]) -> None:
    model, processor = tiny.unified()
    batch = inputs(model, processor, TEXTS)
    asked = {"guidance_scale": 3.0, "image_guidance_scale": 2.0, "guidance_interval": (2, 6), "seed": 5}
    several = model.generate(**batch, generation_mode="image", num_return_sequences=2, **asked)
    assert rows_fed == [18] * 5 + [6] * 10
    assert torch.equal(several[::2], model.generate(**batch, generation_mode="image", **asked))
    output = model.generate(**batch, generation_mode="image", return_dict_in_generate=True, output_logits=True, **asked)
    for n in range(3):
        guided = expected_logits(model, batch, n, output.sequences[n], (3.0, 2.0))
        plain = expected_logits(model, batch, n, output.sequences[n], (1.0, 1.0))
        expected = torch.cat([plain[:2], guided[2:6], plain[6:]])
        found = torch.stack([step[n] for step in output.logits])
        torch.testing.assert_close(found, expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-5)


def test_scales_that_cannot_be_are_one_sentence() -> None:
    model, processor = tiny.unified()
    batch = inputs(model, processor, TEXTS)
    text = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    with pytest.raises(UserError, match="image_guidance_scale compares.*give image_prompt_ids"):
        model.generate(**text, generation_mode="image", image_guidance_scale=2.0)
    with pytest.raises(UserError, match="image_guidance_scale is 0.5; give 0 or 1"):
        model.generate(**batch, generation_mode="image", guidance_scale=2.0, image_guidance_scale=0.5)
    with pytest.raises(UserError, match="image_guidance_scale has 2 values, give 1 or one per prompt, 3"):
        model.generate(**batch, generation_mode="image", guidance_scale=2.0, image_guidance_scale=[2.0, 3.0])
    wrong = batch | {"image_prompt_ids": batch["image_prompt_ids"][:2], "image_prompt_attention_mask": None}
    with pytest.raises(UserError, match="holds 1, 1 images and the prompts 1, 1, 1"):
        model.generate(**wrong, generation_mode="image", image_guidance_scale=2.0)
    model.generation_config.image_generation = {"image_guidance_scale": 2.0, "guidance_scale": 3.0}
    model.generate(**text, generation_mode="image")  # a default of the checkpoint, for edits alone


def test_an_edit_takes_both_scales(rows_fed: list[int]) -> None:
    from unimm.chat import ChatSession

    session = ChatSession(*tiny.unified())
    image = Image.new("RGB", (16, 16), "red")
    session.edit("two", image, num_images=2, guidance_scale=3.0, image_guidance_scale=2.0)
    assert rows_fed == [6] * 15
    with pytest.raises(UserError, match="image_guidance_scale is -1"):
        session.edit("two", image, image_guidance_scale=-1)
