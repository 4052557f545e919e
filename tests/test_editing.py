"""Edits, variations and drawings from a conversation."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.mllm import tiny
from unimm.chat import ChatSession
from unimm.errors import UserError


@pytest.fixture
def drawn(parts: tuple, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of every `generate`, and its result as `token_ids`."""
    calls: list[dict[str, Any]] = []
    original = parts[0].generate

    def generate(**arguments: Any) -> Tensor:
        calls.append(dict(arguments) | {"token_ids": original(**arguments)})
        return calls[-1]["token_ids"]

    monkeypatch.setattr(parts[0], "generate", generate)
    return calls


def scene(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8))


def source_ids(parts: tuple, image: Image.Image) -> Tensor:
    model, processor = parts
    pixels = processor.image_processor([image], return_tensors="pt")["pixel_values"]
    return model.image_tokenizer.encode(pixels).ids[0] + 384


def prompt_text(parts: tuple, call: dict[str, Any]) -> str:
    return parts[1].tokenizer.decode(call["input_ids"][0])


def test_an_edit_is_conditioned_on_image_and_instruction(
    parts: tuple, session: ChatSession, drawn: list[dict[str, Any]]
) -> None:
    """The prompt is one user turn of text and image, in this order, and the result is what `generate` draws of it."""
    model, processor = parts
    session.ask("one")
    images = session.edit("make it blue", scene(), num_images=2, seed=4, guidance_scale=3.0, top_k=7)
    inputs = processor.apply_chat_template(
        [[tiny.user("make it blue", scene())]],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    expected = model.generate(
        **inputs, generation_mode="image", num_return_sequences=2, seed=4, guidance_scale=3.0, top_k=7
    )
    assert torch.equal(drawn[1]["token_ids"], expected) and len(expected.unique(dim=0)) == 2
    shown = processor.postprocess(model.decode_image_tokens(expected))
    assert [each.tobytes() for each in images] == [each.tobytes() for each in shown]
    assert session.messages[2:] == [tiny.user("make it blue", scene()), tiny.assistant(*images)]


def test_without_an_image_the_last_one_is_edited(session: ChatSession, drawn: list[dict[str, Any]]) -> None:
    with pytest.raises(UserError, match="no image to edit"):
        session.edit("make it blue")
    session.messages = [tiny.user(scene(1), "what?"), tiny.assistant("a circle")]
    session.edit("make it blue", seed=1)
    assert session.messages[2] == tiny.user("make it blue"), "the image is not remembered twice"
    drawing = session.messages[3]["content"][0]["image"]
    session.edit("make it green", seed=1)
    fresh = ChatSession(session.model, session.processor)
    fresh.edit("make it blue", scene(1), seed=1)
    fresh.reset()
    fresh.edit("make it green", drawing, seed=1)
    assert torch.equal(drawn[0]["token_ids"], drawn[2]["token_ids"])
    assert torch.equal(drawn[1]["token_ids"], drawn[3]["token_ids"])


@pytest.mark.parametrize("parallel_tokens", [1, "auto"])
def test_what_a_mask_does_not_touch_is_kept(
    parts: tuple, session: ChatSession, drawn: list[dict[str, Any]], parallel_tokens: Any
) -> None:
    kept = source_ids(parts, scene())
    mask = Image.new("L", (64, 32))
    mask.paste(255, (20, 10, 40, 14))  # touches rows 1 and columns 1 to 2 of 4 x 4
    session.edit("two", scene(), mask, num_images=3, seed=2, parallel_tokens=parallel_tokens, guidance_scale=2.0)
    redrawn = np.zeros((4, 4), dtype=bool)
    redrawn[1, 1:3] = True
    cells = torch.from_numpy(redrawn.flatten())
    token_ids = drawn[0]["token_ids"]
    assert torch.equal(token_ids[:, ~cells], kept[~cells].expand(3, -1))
    assert len(token_ids[:, cells].unique(dim=0)) > 1
    session.edit("two", scene(), redrawn, num_images=3, seed=2, guidance_scale=2.0)
    assert torch.equal(drawn[1]["token_ids"], token_ids)
    session.edit("two", scene(), np.ones((4, 4), dtype=bool), seed=2)
    session.edit("two", scene(), seed=2)
    session.edit("two", scene(), strength=1, seed=2)
    assert torch.equal(drawn[2]["token_ids"], drawn[3]["token_ids"])
    assert torch.equal(drawn[2]["token_ids"], drawn[4]["token_ids"])
    session.edit("two", scene(), do_sample=False, guidance_scale=2.0, guidance_interval=(0, 4))


def test_a_variation_keeps_a_share(parts: tuple, session: ChatSession, drawn: list[dict[str, Any]]) -> None:
    kept = source_ids(parts, scene())
    session.draw("two", num_images=3, seed=6, variation_of=scene(), strength=0.25)
    session.draw("two", num_images=2, seed=6, variation_of=scene(), strength=0.25)
    session.edit("two", scene(), num_images=2, seed=6, strength=0.25)
    first, second, edited = (call["token_ids"] for call in drawn)
    assert ((first == kept).sum(1) >= 12).all() and (first != kept).any() and torch.equal(first[:2], second)
    assert ((edited == kept).sum(1) >= 12).all() and "pixel_values" not in drawn[0] and "pixel_values" in drawn[2]
    forced = drawn[0]["forced_token_ids"]
    assert (forced < 0).sum(1).tolist() == [4, 4, 4] and len((forced < 0).unique(dim=0)) > 1


def test_a_drawing_may_know_the_conversation(parts: tuple, session: ChatSession, drawn: list[dict[str, Any]]) -> None:
    session.messages = [tiny.user(scene(), "what is there?"), tiny.assistant("a red circle")]
    session.draw("two", seed=3)
    assert "red circle" not in prompt_text(parts, drawn[0]) and "pixel_values" not in drawn[0]
    before = list(session.messages)
    session.draw("two", seed=3, history=True)
    assert "red circle" in prompt_text(parts, drawn[1]) and len(drawn[1]["pixel_values"]) == 2
    assert session.messages == [*before, tiny.user("two"), session.messages[-1]]
    other = ChatSession(*parts)
    other.messages = [tiny.user(scene(5), "what is there?"), *before[1:]]
    other.draw("two", seed=3, history=True)
    assert not torch.equal(drawn[1]["token_ids"], drawn[2]["token_ids"]), "the first image matters"
    other.reset()
    other.draw("two", seed=3, history=True)
    assert torch.equal(drawn[3]["token_ids"], drawn[0]["token_ids"])


def test_a_conversation_that_leaves_no_room_for_an_image_loses_its_oldest_turns(session: ChatSession) -> None:
    session.messages = [turn for _ in range(60) for turn in (tiny.user("two"), tiny.assistant(scene()))]
    session.draw("two", history=True)
    inputs = session._inputs(session.messages[:-1])
    assert 2 < len(session.messages) < 60 and inputs["input_ids"].shape[1] + 17 <= 256


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"mask": np.ones((3, 4), dtype=bool)}, "3 x 4 booleans, and this model draws 4 x 4"),
        ({"mask": Image.new("L", (8, 8))}, "redraws 0 of 16"),
        ({"mask": np.ones((4, 4), dtype=bool), "strength": 0.5}, "strength=0.5 and a mask"),
        ({"strength": 0}, "strength is 0"),
        ({"image": "none.png"}, "no such file"),
        ({"num_images": 0}, "num_images is 0"),
        ({"seed": 0.5}, "seed is 0.5"),
        ({"guidance_scale": -1}, "guidance_scale is -1"),
        ({"prompt": " "}, "The prompt is empty"),
        ({"prompt": "word " * 10_000}, "tokens long"),
        ({"guidance_schedule": "fast"}, "guidance_schedule is 'fast'"),
        ({"image_guidance_scale": "x"}, "image_guidance_scale is 'x'"),
        ({"warmth": 3}, "warmth is no sampling setting"),
    ],
)
def test_edits_without_a_meaning_are_one_sentence(session: ChatSession, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        session.edit(**{"prompt": "two", "image": scene(), **arguments})
    assert "\n" not in str(error.value) and session.messages == []


def test_a_tokenizer_without_patches_takes_no_mask(parts: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts[0].image_tokenizer, "ids_are_patches", False)
    session = ChatSession(*parts)
    with pytest.raises(UserError, match="image tokens of a VQRAE are no patches"):
        session.edit("two", scene(), np.ones((4, 4), dtype=bool))
    session.edit("two", scene(), strength=0.5)
