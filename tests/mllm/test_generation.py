"""Image mode against slow references: no cache, no batch, no padding."""

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from tests.mllm import tiny
from unimm.errors import UserError
from unimm.mllm import ImageSampling, UnimmLlavaForConditionalGeneration, UnimmProcessor
from unimm.sampling import per_prompt_scale

PROMPTS = ["a photo of a red circle", "two", "an image of two green squares"]


@pytest.fixture(scope="module")
def parts() -> tuple[UnimmLlavaForConditionalGeneration, UnimmProcessor]:
    return tiny.unified()


@pytest.fixture
def model(parts: tuple) -> UnimmLlavaForConditionalGeneration:
    return parts[0]


@pytest.fixture
def processor(parts: tuple) -> UnimmProcessor:
    return parts[1]


def prompts(processor: UnimmProcessor, texts: list[str]) -> dict[str, Tensor]:
    return dict(processor(text=[processor.drawing_prompt(text) for text in texts], return_tensors="pt", padding=True))


def draw(model: UnimmLlavaForConditionalGeneration, inputs: dict[str, Tensor], **options: object) -> Tensor:
    return model.generate(**inputs, generation_mode="image", **options)


@torch.no_grad()
def reference(model: UnimmLlavaForConditionalGeneration, prompt: Tensor, scale: float, null: list[int]) -> Tensor:
    """Greedy guided ids of one prompt [L], without cache, batch or padding."""
    conditional, unconditional = prompt.tolist(), list(null)
    drawn = []
    for _ in range(16):
        logits = model(torch.tensor([conditional]), vocabulary="all").logits[0, -1, 384:]
        if scale > 1:
            other = model(torch.tensor([unconditional]), vocabulary="all").logits[0, -1, 384:]
            logits = other + scale * (logits - other)
        drawn.append(384 + int(logits.argmax()))
        conditional.append(drawn[-1])
        unconditional.append(drawn[-1])
    return torch.tensor(drawn)


class Forwards:
    """Counts the rows of every forward of the language model, and keeps its inputs."""

    def __init__(self, model: UnimmLlavaForConditionalGeneration) -> None:
        self.rows: list[int] = []
        self.caches: set[int] = set()
        self.handle = model.model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        self.rows.append(len(kwargs["input_ids"]))
        self.caches.add(id(kwargs["past_key_values"]))

    def __enter__(self) -> "Forwards":
        return self

    def __exit__(self, *error: object) -> None:
        self.handle.remove()


@pytest.mark.parametrize("scale", [None, 0, 1, 3.5])
def test_greedy_with_cache_batch_and_padding_is_the_reference(
    model: UnimmLlavaForConditionalGeneration, processor: UnimmProcessor, scale: float | None
) -> None:
    inputs = prompts(processor, PROMPTS)
    drawn = draw(model, inputs, guidance_scale=scale, do_sample=False)
    assert drawn.shape == (3, 16)
    for row, ids, mask in zip(drawn, inputs["input_ids"], inputs["attention_mask"], strict=True):
        assert torch.equal(row, reference(model, ids[mask.bool()], scale or 0, model.config.null_prompt))


def test_scale_per_row(model: UnimmLlavaForConditionalGeneration, processor: UnimmProcessor) -> None:
    inputs, scales = prompts(processor, PROMPTS), [4.0, 0.0, 1.5]
    drawn = draw(model, inputs, guidance_scale=scales, do_sample=False)
    assert torch.equal(drawn, draw(model, inputs, guidance_scale=torch.tensor(scales), do_sample=False))
    for row, text, scale in zip(drawn, PROMPTS, scales, strict=True):
        alone = draw(model, prompts(processor, [text]), guidance_scale=scale, do_sample=False)
        assert torch.equal(row, alone[0])


@pytest.mark.parametrize(("scale", "rows"), [(None, 3), (0, 3), (1, 3), (1.0, 3), (2, 6), ([2, 1, 0], 4)])
def test_rows_and_cache_of_a_step(
    model: UnimmLlavaForConditionalGeneration, processor: UnimmProcessor, scale: object, rows: int
) -> None:
    """The prompts are read once, with one null prompt for all of them; then a row for each sequence and each side."""
    with Forwards(model) as forwards:
        draw(model, prompts(processor, PROMPTS), guidance_scale=scale)
    assert forwards.rows == [3 if rows == 3 else 4, *[rows] * 15] and len(forwards.caches) == 1
    with Forwards(model) as forwards:
        draw(model, prompts(processor, [*PROMPTS, PROMPTS[0]]), num_return_sequences=2, guidance_scale=None)
    assert forwards.rows == [3, *[8] * 15]


def test_only_image_rows_of_the_head_are_computed(
    model: UnimmLlavaForConditionalGeneration, processor: UnimmProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    slices = []
    original = type(model)._head
    monkeypatch.setattr(
        type(model), "_head", lambda self, hidden, a, b: (slices.append((a, b)), original(self, hidden, a, b))[1]
    )
    draw(model, prompts(processor, PROMPTS))
    assert set(slices) == {(384, 416)}
    slices.clear()
    model.generate(**prompts(processor, PROMPTS), max_new_tokens=3)
    assert set(slices) == {(0, 301)}


def test_unconditional_rows_never_see_the_prompt(
    model: UnimmLlavaForConditionalGeneration, processor: UnimmProcessor
) -> None:
    """Prompts of unequal length and text: the first hidden state of the null row is the same."""
    seen: list[Tensor] = []

    def keep(module: torch.nn.Module, args: tuple, output: Tensor) -> None:
        seen.append(output.last_hidden_state[:, -1])

    for text in PROMPTS[:2]:
        with torch.no_grad():
            handle = model.model.register_forward_hook(keep)
            draw(model, prompts(processor, [text]), guidance_scale=3.0, do_sample=False)
            handle.remove()
    first, second = seen[0], seen[16]
    assert not torch.allclose(first[0], second[0])
    torch.testing.assert_close(first[1], second[1])


def test_negative_prompt_replaces_the_null_prompt(
    model: UnimmLlavaForConditionalGeneration, processor: UnimmProcessor
) -> None:
    inputs = prompts(processor, PROMPTS[:1])
    negative = processor(text=processor.drawing_prompt("blue ring"), return_tensors="pt").input_ids
    drawn = draw(model, inputs, guidance_scale=5.0, do_sample=False, negative_prompt_ids=negative)
    assert torch.equal(drawn[0], reference(model, inputs["input_ids"][0], 5.0, negative[0].tolist()))
    null = torch.tensor([model.config.null_prompt])
    assert torch.equal(
        draw(model, inputs, guidance_scale=5.0, do_sample=False, negative_prompt_ids=null[:, :-1]),
        draw(model, inputs, guidance_scale=5.0, do_sample=False),
    )
    assert not torch.equal(drawn, draw(model, inputs, guidance_scale=5.0, do_sample=False))


def test_exactly_the_grid_and_only_image_ids(
    model: UnimmLlavaForConditionalGeneration, processor: UnimmProcessor
) -> None:
    inputs = prompts(processor, PROMPTS * 20)
    drawn = draw(model, inputs, max_new_tokens=3, temperature=5.0)
    assert drawn.shape == (60, 16) and model.visual_vocabulary.contains(drawn).all()
    assert model.decode_image_tokens(drawn).shape == (60, 3, 16, 16)
    assert len(drawn.unique()) == 32


@pytest.mark.parametrize("scale", [None, 2.5])
def test_image_k_depends_on_seed_and_k_only(
    model: UnimmLlavaForConditionalGeneration, processor: UnimmProcessor, scale: float | None
) -> None:
    options = {"seed": 7, "guidance_scale": scale, "do_sample": True}
    four = draw(model, prompts(processor, PROMPTS[:1]), num_return_sequences=4, **options)
    assert len(four.unique(dim=0)) == 4
    two = draw(model, prompts(processor, PROMPTS[:1]), num_return_sequences=2, **options)
    assert torch.equal(two, four[:2])
    assert torch.equal(draw(model, prompts(processor, PROMPTS[:1] * 4), **options), four)
    batch = draw(model, prompts(processor, PROMPTS), num_return_sequences=2, **options)
    assert torch.equal(batch[:2], two)
    shuffled = draw(model, prompts(processor, PROMPTS[::-1]), num_return_sequences=2, **options)
    assert torch.equal(shuffled.view(3, 2, 16).flip(0), batch.view(3, 2, 16))
    assert not torch.equal(draw(model, prompts(processor, PROMPTS[:1]), **{**options, "seed": 8}), four[:1])


def test_seeds_per_prompt_and_fresh_seeds(model: UnimmLlavaForConditionalGeneration, processor: UnimmProcessor) -> None:
    both = draw(model, prompts(processor, PROMPTS[:2]), seed=[3, 4])
    assert torch.equal(both[1], draw(model, prompts(processor, PROMPTS[1:2]), seed=4)[0])
    torch.manual_seed(0)
    first, second = (draw(model, prompts(processor, PROMPTS[:1])) for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(draw(model, prompts(processor, PROMPTS[:1])), first)


def test_samples_follow_the_distribution(model: UnimmLlavaForConditionalGeneration, processor: UnimmProcessor) -> None:
    inputs = prompts(processor, PROMPTS[:1])
    output = draw(
        model,
        inputs,
        num_return_sequences=2000,
        seed=0,
        temperature=0.7,
        return_dict_in_generate=True,
        output_scores=True,
    )
    expected = output.scores[0][0].softmax(-1)
    found = torch.bincount(output.sequences[:, 0] - 384, minlength=32) / 2000
    assert (found - expected).abs().max() < 0.045  # four standard deviations of the largest share


def test_top_k_and_top_p_narrow_the_choice(
    model: UnimmLlavaForConditionalGeneration, processor: UnimmProcessor
) -> None:
    inputs = prompts(processor, PROMPTS)
    greedy = draw(model, inputs, do_sample=False)
    assert torch.equal(draw(model, inputs, top_k=1), greedy)
    assert torch.equal(draw(model, inputs, top_p=1e-6), greedy)
    assert torch.equal(draw(model, inputs, temperature=0), greedy)
    options = {"return_dict_in_generate": True, "output_scores": True}
    scores = draw(model, inputs, top_k=5, **options).scores
    assert {int(torch.isfinite(step).sum(1).max()) for step in scores} == {5}


def test_scores_and_logits_are_there_for_every_step(
    model: UnimmLlavaForConditionalGeneration, processor: UnimmProcessor
) -> None:
    inputs = prompts(processor, PROMPTS[:2])
    output = draw(
        model,
        inputs,
        guidance_scale=3.0,
        temperature=0.5,
        num_return_sequences=2,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    assert output.sequences.shape == (4, 16) and len(output.scores) == len(output.logits) == 16
    assert all(step.shape == (4, 32) for step in (*output.scores, *output.logits))
    torch.testing.assert_close(output.scores[5], output.logits[5] / 0.5)


class Kept(BaseStreamer):
    def __init__(self) -> None:
        self.values: list[Tensor] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.values.append(value)

    def end(self) -> None:
        self.ended = True


def test_streamer_gets_the_prompt_then_every_id(
    model: UnimmLlavaForConditionalGeneration, processor: UnimmProcessor
) -> None:
    streamer, inputs = Kept(), prompts(processor, PROMPTS[:2])
    drawn = draw(model, inputs, streamer=streamer)
    assert torch.equal(streamer.values[0], inputs["input_ids"])
    assert torch.equal(torch.stack(streamer.values[1:], 1), drawn) and streamer.ended


def test_begin_marker_is_appended_where_it_is_missing(
    model: UnimmLlavaForConditionalGeneration, processor: UnimmProcessor
) -> None:
    with_marker = prompts(processor, PROMPTS)
    expected = draw(model, with_marker, do_sample=False)
    without = {name: value[:, :-1] for name, value in with_marker.items()}
    assert torch.equal(draw(model, without, do_sample=False), expected)
    texts = [processor.drawing_prompt(PROMPTS[0]), processor.drawing_prompt(PROMPTS[1])[: -len(processor.boi_token)]]
    mixed = dict(processor(text=texts, return_tensors="pt", padding=True))
    assert torch.equal(draw(model, mixed, do_sample=False), expected[:2])


def test_prompts_may_hold_images(model: UnimmLlavaForConditionalGeneration, processor: UnimmProcessor) -> None:
    def inputs(*messages: dict) -> dict[str, Tensor]:
        return dict(
            processor.apply_chat_template(
                [[message] for message in messages],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True},
            )
        )

    red, blue = tiny.image("red"), tiny.image("blue")
    turns = [
        tiny.user(red, blue, "like these"),
        tiny.user("two"),
        tiny.user(blue, "like this"),
        tiny.user(red, "like this"),
    ]
    options = {"guidance_scale": 2.0, "seed": 1, "num_return_sequences": 2}
    batch = draw(model, inputs(*turns), **options).view(4, 2, 16)
    for row, turn in zip(batch, turns, strict=True):
        assert torch.equal(row, draw(model, inputs(turn), **options))
    assert not torch.equal(batch[2], batch[3])
    missing = inputs(turns[0])
    del missing["pixel_values"]
    with pytest.raises(ValueError, match="32 image placeholders, 0 images"):
        draw(model, missing)


def test_text_mode_is_left_padding_invariant_and_never_writes_image_ids(
    model: UnimmLlavaForConditionalGeneration, processor: UnimmProcessor
) -> None:
    with torch.no_grad():
        model.get_input_embeddings().weight[384:] *= 100  # they would win every choice
    try:
        inputs = prompts(processor, PROMPTS)
        options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": []}
        batch = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
        assert (batch < 301).all()
        for row, text in zip(batch, PROMPTS, strict=True):
            alone = prompts(processor, [text])
            assert torch.equal(row, model.generate(**alone, **options)[0, alone["input_ids"].shape[1] :])
        beams = model.generate(**inputs, max_new_tokens=4, num_beams=3, repetition_penalty=1.2)
        assert (beams[:, inputs["input_ids"].shape[1] :] < 301).all()
        sampled = model.generate(
            **inputs, max_new_tokens=4, do_sample=True, return_dict_in_generate=True, output_scores=True
        )
        assert sampled.scores[0].shape == (3, 301)
    finally:
        with torch.no_grad():
            model.get_input_embeddings().weight[384:] /= 100


def test_decode_accepts_parts_and_whole_sequences(
    model: UnimmLlavaForConditionalGeneration, processor: UnimmProcessor
) -> None:
    inputs = prompts(processor, PROMPTS[:2])
    drawn = draw(model, inputs)
    pixels = model.decode_image_tokens(drawn, 16, 16)
    whole = torch.cat([inputs["input_ids"], drawn, torch.full((2, 1), model.config.eoi_token_id)], dim=1)
    assert torch.equal(model.decode_image_tokens(whole), pixels)
    torch.testing.assert_close(model.decode_image_tokens(drawn[0]), pixels[:1])
    with pytest.raises(ValueError, match="16 image ids, a row with 15"):
        model.decode_image_tokens(drawn[:, 1:])
    with pytest.raises(ValueError, match="16x16 pixels only, 32x16"):
        model.decode_image_tokens(drawn, 32, 16)


def test_settings_come_from_the_checkpoint_unless_given(model: UnimmLlavaForConditionalGeneration) -> None:
    assert model.generation_config.image_generation["do_sample"] is True
    stored = GenerationConfig(do_sample=False, temperature=0.2, image_generation={"top_k": 9, "guidance_scale": 3.0})
    assert ImageSampling.of(stored, top_p=0.5) == ImageSampling(top_k=9, guidance_scale=3.0, top_p=0.5)
    assert ImageSampling.of(stored, guidance_scale=None).guidance_scale is None
    assert ImageSampling.of(GenerationConfig(do_sample=False)) == ImageSampling(do_sample=False)
    stored.image_editing = {"guidance_scale": 1.5}
    assert ImageSampling.of(stored, top_p=0.5) == ImageSampling(top_k=9, guidance_scale=3.0, top_p=0.5)
    assert ImageSampling.of(stored, editing=True, top_p=0.5) == ImageSampling(top_k=9, guidance_scale=1.5, top_p=0.5)
    assert ImageSampling.of(stored, editing=True, guidance_scale=2.0).guidance_scale == 2.0


def test_bad_requests_say_what_is_wrong(model: UnimmLlavaForConditionalGeneration, processor: UnimmProcessor) -> None:
    inputs = prompts(processor, PROMPTS)
    for options, message in (
        ({"guidance_scale": 0.5}, r"guidance_scale is 0\.5; give 0 or 1"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"guidance_scale": [1, 2]}, "2 values, give 1 or one per prompt, 3"),
        ({"seed": [1, 2]}, "seed has 2 values"),
        ({"temprature": 1.0}, "does not know the arguments temprature"),
        ({"num_return_sequences": 2, "do_sample": False}, "2 greedy images"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"negative_prompt_ids": torch.ones(2, 3).long(), "guidance_scale": 2}, "2 rows, give 1 or one per prompt, 3"),
    ):
        with pytest.raises(ValueError, match=message):
            draw(model, inputs, **options)
    right = {name: value.flip(1) for name, value in inputs.items()}
    with pytest.raises(ValueError, match="padded on the left"):
        draw(model, right)
    with pytest.raises(ValueError, match="'video'; known: text, image"):
        model.generate(**inputs, generation_mode="video")
    with pytest.raises(ValueError, match="seed belongs to image mode"):
        model.generate(**inputs, seed=1)
    long = torch.ones(1, 250, dtype=torch.long)
    with pytest.raises(UserError, match="251 tokens and an image 16.*256"):
        model.generate(long, generation_mode="image")


def test_scales_that_mean_off() -> None:
    assert per_prompt_scale(None, 2).tolist() == per_prompt_scale(-1, 2).tolist() == [0, 0]
    assert per_prompt_scale([0, 1, 1.25], 3).tolist() == [0, 0, 1.25]
