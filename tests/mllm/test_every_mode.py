"""Every mode of drawing in every way: guided logits against single forwards, ids whatever the batch, rows of a step."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.mllm import tiny
from tests.mllm.test_guidance import slow
from unimm.mllm.answering import chat_inputs, edit_inputs

TEXTS = ["a photo of a red circle", "two", "an image of two green squares", "blue", "one", "is there", "a ring", "yes"]
COLORS = ["red", "blue", "red", "green", "white", "black", "blue", "red"]
SCALES = [4.0, 0.0, 1.5, 3.0, 1.0, 2.0, 5.0, 3.0]
IMAGE_SCALES = [1.5, 2.0, 1.0, 3.0, 1.0, 2.0, 1.5, 4.0]
EIGHT = list(range(8))
INTERVAL = (2, 11)
MODES = ("text", "images", "negative", "rising", "forced", "two scales")


@pytest.fixture(autouse=True)
def _no_compiled_steps_stay() -> Iterator[None]:
    """The compiler keeps a limited number of versions of a step in a process."""
    yield
    torch._dynamo.reset()


def chat(n: int, shown: bool, text: str) -> list[dict]:
    return [tiny.user(tiny.image(COLORS[n]), text) if shown else tiny.user(text)]


def request(model: Any, processor: Any, mode: str, rows: list[int]) -> dict[str, Any]:
    """Return the arguments of `generate` for these rows of a mode."""
    shown = [mode == "two scales" or (mode in ("images", "forced") and n % 2 == 0) for n in rows]
    inputs = chat_inputs(model, processor, [chat(n, image, TEXTS[n]) for n, image in zip(rows, shown, strict=True)])
    given: dict[str, Any] = {**inputs, "seed": [10 + n for n in rows], "guidance_scale": [SCALES[n] for n in rows]}
    if mode == "negative":
        negative = chat_inputs(model, processor, [chat(n, False, TEXTS[7 - n]) for n in rows])
        given |= {"negative_prompt_ids": negative["input_ids"]}
        given |= {"negative_prompt_attention_mask": negative["attention_mask"]}
    elif mode == "rising":
        given |= {"guidance_schedule": "linear", "guidance_interval": INTERVAL}
    elif mode == "forced":
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(32, (8, 16), generator=generator) + model.visual_vocabulary.base
        kept = torch.rand(8, 16, generator=generator) < 0.5
        kept[:, :3] = kept[:, 7:9] = True
        given |= {"forced_token_ids": ids.where(kept, torch.tensor(-1))[rows]}
    elif mode == "two scales":
        given = edit_inputs(given, chat_inputs(model, processor, [chat(n, True, "") for n in rows]))
        given |= {"image_guidance_scale": [IMAGE_SCALES[n] for n in rows]}
    return given | {"generation_mode": "image", "temperature": 0.9, "top_k": 20}


@torch.no_grad()
def expected_logits(model: Any, given: dict[str, Any], row: int, drawn: Tensor) -> Tensor:
    """Return the guided logits [M, K] of a row by forwards of one prompt without cache or padding."""

    def prompt(name: str, mask: str) -> Tensor:
        return given[name][row][given[mask][row].bool()]

    pixels, before = given.get("pixel_values"), 0
    if pixels is not None:
        counts = [
            int(n) // model.config.image_seq_length for n in (given["input_ids"] == model.config.image_token_id).sum(1)
        ]
        before = sum(counts[:row])
        pixels = pixels[before : before + counts[row]] if counts[row] else None
    both = slow(model, prompt("input_ids", "attention_mask"), drawn, pixels)
    null = torch.tensor(model.config.null_prompt[:-1])
    if "negative_prompt_ids" in given:
        null = prompt("negative_prompt_ids", "negative_prompt_attention_mask")
    neither = slow(model, null, drawn, None)
    scale = torch.full((16, 1), max(given["guidance_scale"][row], 1.0), dtype=both.dtype)
    if "guidance_interval" in given:
        place = torch.arange(16)[:, None]
        inside = (place >= INTERVAL[0]) & (place < INTERVAL[1])
        scale = torch.where(inside, 1 + (scale - 1) * (place + 1) / 16, 1.0)
    if "image_prompt_ids" not in given:
        return neither + scale * (both - neither)
    one = slow(model, prompt("image_prompt_ids", "image_prompt_attention_mask"), drawn, pixels)
    return neither + max(given["image_guidance_scale"][row], 1.0) * (one - neither) + scale * (both - one)


@pytest.mark.parametrize("family", ["qwen3", "qwen2_5_vl"])
@pytest.mark.parametrize("mode", MODES)
def test_guided_logits_are_those_of_single_forwards_in_every_way(
    mode: str, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One by one, in parallel, and on a static cache."""
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda step, **kwargs: compiler(step, backend="eager", dynamic=False))
    model, processor = tiny.attached(family)
    given = request(model, processor, mode, [0, 1, 2, 3])
    expected: dict[bytes, Tensor] = {}
    for how in ({}, {"parallel_tokens": 4}, {"parallel_tokens": "auto"}, {"compile": True}):
        output = model.generate(**given, return_dict_in_generate=True, output_logits=True, **how)
        for row, drawn in enumerate(output.sequences):
            key = bytes([row]) + drawn.numpy().tobytes()
            if key not in expected:
                expected[key] = expected_logits(model, given, row, drawn)
            found, right = torch.stack([step[row] for step in output.logits]), expected[key]
            torch.testing.assert_close(found, right, atol=1e-5 * float(right.abs().max()), rtol=1e-5)
    assert len(expected) == 4, "all ways draw the same"


def drawn_ids(model: Any, processor: Any, mode: str, rows: list[int], **how: Any) -> dict[int, list[int]]:
    """Return the ids of each row; in interleaved mode those of its answer."""
    if mode != "interleaved":
        return dict(zip(rows, model.generate(**request(model, processor, mode, rows), **how).tolist(), strict=True))
    given = request(model, processor, "images", rows) | {"generation_mode": "interleaved", "max_new_tokens": 44}
    for name in ("temperature", "top_k"):
        given.pop(name)
    eager = {"sequence_bias": [[[model.config.boi_token_id], 3.0]], "repetition_penalty": 1.3, "do_sample": False}
    length = given["input_ids"].shape[1]
    answers = model.generate(**given, **eager, eos_token_id=[], pad_token_id=0, **how)[:, length:]
    assert answers.shape[1] == 44 and (answers == model.config.boi_token_id).any()
    return dict(zip(rows, answers.tolist(), strict=True))


@pytest.mark.parametrize("mode", [*MODES, pytest.param("interleaved", marks=pytest.mark.slow)])
def test_ids_do_not_depend_on_batch_order_neighbours_or_parallel_tokens(mode: str) -> None:
    """Alone, by four, by eight, shuffled, among others, one by one and in parallel; in float64, as ids are exact."""
    model, processor = tiny.attached("qwen3")
    model = model.double()
    expected = drawn_ids(model, processor, mode, EIGHT)
    assert len({tuple(ids) for ids in expected.values()}) == 8
    shuffled, others = [5, 2, 7, 0, 3, 6, 1, 4], [[3, 6], [0, 5, 7]]
    for how in ({"parallel_tokens": 1}, {"parallel_tokens": 3}, {"parallel_tokens": "auto"}):
        for rows in (EIGHT, *([n] for n in EIGHT), EIGHT[:4], EIGHT[4:], shuffled, *others):
            assert drawn_ids(model, processor, mode, rows, **how) == {n: expected[n] for n in rows}, (how, rows)


@pytest.mark.parametrize("scale", [None, 0, 1, 1.0, [1.0, 0.0, 1.0]])
@pytest.mark.parametrize("mode", [*MODES, "interleaved"])
def test_no_second_row_at_scales_up_to_one(mode: str, scale: Any, rows_fed: list[int]) -> None:
    model, processor = tiny.unified()
    given = request(model, processor, "images" if mode == "interleaved" else mode, [0, 1, 2])
    given |= {"guidance_scale": scale}
    if mode == "two scales":
        given["image_guidance_scale"] = scale
    if mode == "interleaved":
        bias = [[[model.config.boi_token_id], 100.0]]
        given |= {"generation_mode": mode, "max_new_tokens": 18, "sequence_bias": bias, "do_sample": True}
    model.generate(**given)
    assert set(rows_fed) == {3}, "B rows in every step"
    rows_fed.clear()
    model.generate(**given | {"guidance_scale": 2.0})
    assert max(rows_fed) == 6, "an image scale up to one takes no third row"
    assert mode == "rising" or min(rows_fed) == 6
