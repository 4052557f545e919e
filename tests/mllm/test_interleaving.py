"""Interleaved answers: the tokens of training, whole images, room that is kept, and what is refused."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.mllm import tiny
from unimm.chat import ChatSession
from unimm.data.text.collators import FlowCollator
from unimm.errors import UserError
from unimm.mllm import attach
from unimm.mllm.interleaving import ImageOpening, Interleaving
from unimm.sampling import ImageSampling
from unimm.testing.hosts import tiny_host, tiny_tokenizer

FAMILIES = ("qwen3", "llava", "internvl", "llava_onevision", "qwen3_vl")
CHATS = [[tiny.user("one two")], [tiny.user(tiny.image(), "what is this?")], [tiny.user("three")]]
IMAGE = 18  # tokens, with both markers


@cache
def build(family: str) -> tuple:
    host, tokenizer = tiny_host(family)
    images, _ = tiny_tokenizer(host, "siglip_vision_model")
    options = {"image_position_mode": "2d"} if family == "qwen3_vl" else {}
    return attach(host, images, tokenizer, **options)


@pytest.fixture(scope="module")
def parts() -> tuple:
    return build("qwen3")


def prompts(processor: Any, chats: list[list[dict]]) -> dict[str, Tensor]:
    return processor.apply_chat_template(
        chats,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )


def eager_to_draw(model: Any, bias: float = 6.0) -> dict[str, Any]:
    """Text sampling in which an untrained model opens images often."""
    return {"do_sample": True, "sequence_bias": [[[model.config.boi_token_id], bias]]}


def answers(model: Any, processor: Any, chats: list[list[dict]], **options: Any) -> list[list[int]]:
    """The answers without their padding."""
    inputs = prompts(processor, chats)
    written = model.generate(**inputs, generation_mode="interleaved", **options)
    length = inputs["input_ids"].shape[1]
    assert torch.equal(written[:, :length], inputs["input_ids"])
    ends = set(options.get("eos_token_id", model.generation_config.eos_token_id))
    rows = written[:, length:].tolist()
    return [row[: next((n + 1 for n, token in enumerate(row) if token in ends), len(row))] for row in rows]


def check_whole_images(model: Any, answer: list[int]) -> int:
    """Hold an answer against a plain state machine; return the number of its images."""
    config, vocabulary = model.config, model.visual_vocabulary
    images, place = 0, 0
    while place < len(answer):
        token = answer[place]
        assert token not in (config.eoi_token_id, config.image_token_id) and token < config.text_vocab_size
        if token == config.boi_token_id:
            drawn, end = answer[place + 1 : place + 17], answer[place + 17]
            assert len(drawn) == 16 and all(vocabulary.base <= each < vocabulary.end for each in drawn)
            assert end == config.eoi_token_id
            images, place = images + 1, place + IMAGE
        else:
            place += 1
    return images


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_hold_text_and_whole_images(family: str) -> None:
    model, processor = build(family)
    torch.manual_seed(0)
    found = answers(model, processor, CHATS, max_new_tokens=70, seed=1, **eager_to_draw(model, 4.0))
    counts = [check_whole_images(model, answer) for answer in found]
    assert sum(counts) >= 3 and any(len(answer) > IMAGE * count for answer, count in zip(found, counts, strict=True))
    for answer, parts in zip(found, processor.split_parts(torch.tensor(found[0])[None]), strict=False):
        assert [part["ids"].tolist() for part in parts if part["type"] == "image"] == [
            [token - model.visual_vocabulary.base for token in answer[place + 1 : place + 17]]
            for place, token in enumerate(answer)
            if token == model.config.boi_token_id
        ]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("guidance_scale", "parallel_tokens"), [(None, 1), (3.0, 1), (3.0, 5)])
def test_logits_of_generation_are_those_of_the_training_forward(
    family: str, guidance_scale: float | None, parallel_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = build(family)
    chat = [tiny.user(tiny.image(), "what?")]
    inputs = prompts(processor, [chat])
    length = inputs["input_ids"].shape[1]
    seen = spied(model, monkeypatch)
    torch.manual_seed(2)
    written = model.generate(
        **inputs,
        generation_mode="interleaved",
        max_new_tokens=60,
        seed=1,
        guidance_scale=guidance_scale,
        parallel_tokens=parallel_tokens,
        **eager_to_draw(model, 4.0),
    )[0]
    found = list(seen)
    monkeypatch.undo()
    base, end = model.visual_vocabulary.base, model.visual_vocabulary.end
    drawn = model.visual_vocabulary.contains(written)
    assert drawn.sum() >= 16 and (~drawn[length:]).sum() > 4, "text and an image"
    model.train()  # the forward of a training step; there is no dropout
    with torch.no_grad():
        whole = model(
            input_ids=written[None], attention_mask=torch.ones_like(written)[None], pixel_values=inputs["pixel_values"]
        ).logits[0]
    model.eval()
    images = 0
    for place, logits in found:
        where = length + place
        if logits.shape[-1] == end:
            expected = whole[where - 1]
        else:
            expected = whole[where - 1, base:]
            if guidance_scale is not None:
                expected = guided(model, written, where, expected, guidance_scale)
            images += 1
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    closing = int((written[length:] == model.config.eoi_token_id).sum())
    assert images == int(drawn.sum()) and len(found) == len(written) - length - closing, "every chosen token was held"


def guided(model: Any, written: Tensor, where: int, conditional: Tensor, scale: float) -> Tensor:
    """Guidance by its formula, from a forward over the null prompt and the ids of the image so far."""
    opened = int((written[:where] == model.config.boi_token_id).nonzero()[-1])
    row = torch.cat([torch.tensor(model.config.null_prompt), written[opened + 1 : where]])
    with torch.no_grad():
        other = model(input_ids=row[None], attention_mask=torch.ones_like(row)[None], vocabulary="image").logits[0, -1]
    return other + scale * (conditional - other)


def spied(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, Tensor]]:
    """Keep (place in the answer, logits of the choice) of a generation of one row."""
    seen: list[tuple[int, Tensor]] = []
    begin = Interleaving.__init__

    def listening(self: Interleaving, model: Any, write: Callable, draw: Callable, *given: Any, **options: Any) -> None:
        def both(of: Callable, token_ids: Tensor, *rest: Any, **how: Any) -> Tensor:
            how |= {"return_dict_in_generate": True, "output_logits": True}
            output = of(token_ids, *rest, **how)
            start = token_ids.shape[1] - self.prompts.shape[1]
            seen.extend((start + n, each[0]) for n, each in enumerate(output.logits))
            return output.sequences

        begin(
            self,
            model,
            lambda *rest, **how: both(write, *rest, **how),
            lambda *rest, **how: both(draw, *rest, **how),
            *given,
            **options,
        )

    monkeypatch.setattr(Interleaving, "__init__", listening)
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_has_the_tokens_that_training_makes_of_the_turn(family: str) -> None:
    """A model that says what the sample says, in phases, writes the row that the collator makes, token by token."""
    model, processor = build(family)
    turn = tiny.assistant("one ", tiny.image(), " two ", tiny.image("blue"), " three")
    sample = {"flow": "interleaved", "kind": "conversation", "index": 0, "messages": [*CHATS[1], turn]}
    batch = FlowCollator(processor)([sample])["interleaved"]
    assert batch["drawn"].sum() == 32 and len(batch["drawn_pixel_values"]) == 2
    token_ids = model.get_image_tokens(batch["drawn_pixel_values"])
    trained = batch["input_ids"].masked_scatter(batch["drawn"], token_ids)[0]
    learned = (batch["labels"][0] != -100).nonzero()[:, 0]
    inputs = prompts(processor, [CHATS[1]])
    start = inputs["input_ids"].shape[1]
    assert torch.equal(inputs["input_ids"][0], trained[:start]), "the prompt"
    assert learned.tolist() == list(range(start, len(trained))), "all of the answer is learned"
    begin = model.config.boi_token_id

    def write(prompt: Tensor, *_: Any, **__: Any) -> Tensor:
        rest = trained[prompt.shape[1] :].tolist()
        return trained[None, : prompt.shape[1] + (rest.index(begin) + 1 if begin in rest else len(rest))]

    def draw(prompt: Tensor, **_: Any) -> Tensor:
        return trained[None, prompt.shape[1] : prompt.shape[1] + 16]

    mask = inputs["attention_mask"]
    options = {"images": ImageSampling(), "counts": [1], "text": {}}
    written = Interleaving(model, write, draw, inputs["input_ids"], mask, **options).run()
    assert torch.equal(written[0], trained)
    parts = processor.split_parts(written[:, start:])[0]
    assert [part.get("text") for part in parts] == ["one ", None, " two ", None, " three"]
    ids = torch.stack([part["ids"] for part in parts if part["type"] == "image"])
    assert torch.equal(ids, token_ids - model.visual_vocabulary.base)


def test_rows_do_not_depend_on_their_batch(parts: tuple) -> None:
    model, processor = parts
    bias = {"sequence_bias": [[[model.config.boi_token_id], 3.0]], "do_sample": False, "repetition_penalty": 1.3}
    options = {"max_new_tokens": 64, "seed": 5, "guidance_scale": 2.0, **bias}
    together = answers(model, processor, CHATS, **options)
    alone = [answers(model, processor, [chat], **options)[0] for chat in CHATS]
    assert together == alone and sum(check_whole_images(model, answer) for answer in together) >= 2
    assert answers(model, processor, CHATS[::-1], **options)[::-1] == together
    ahead = answers(model, processor, CHATS, parallel_tokens=4, **options)
    assert ahead == together
    scales = answers(model, processor, CHATS, **{**options, "guidance_scale": [2.0, 1.0, 4.0]})
    one = answers(model, processor, CHATS[1:2], **{**options, "guidance_scale": None})
    assert scales[0] == together[0] and scales[1] == one[0]


def test_image_k_of_a_row_depends_on_its_seed_and_k(parts: tuple) -> None:
    model, processor = parts
    torch.manual_seed(0)
    inputs = prompts(processor, CHATS[:1])
    options = {"max_new_tokens": 80, **eager_to_draw(model, 20.0)}
    (answer,) = answers(model, processor, CHATS[:1], seed=9, **options)
    assert check_whole_images(model, answer) >= 3
    places = [n for n, token in enumerate(answer) if token == model.config.boi_token_id]
    first = torch.cat([inputs["input_ids"], torch.tensor([answer[: places[0] + 1]])], 1)
    drawn = model.generate(first, attention_mask=torch.ones_like(first), generation_mode="image", seed=9)
    assert drawn[0].tolist() == answer[places[0] + 1 : places[0] + 17], "image mode's image 0"
    images = [answer[place + 1 : place + 17] for place in places]
    assert images[0] != images[1]
    both = answers(model, processor, CHATS[:1] * 2, seed=[9, 10], **options)
    assert both[0][:IMAGE] == answer[:IMAGE] and both[1][:IMAGE] != answer[:IMAGE]


@pytest.mark.parametrize("room", [IMAGE, IMAGE + 1, 2 * IMAGE, 2 * IMAGE + 1, 50])
def test_an_image_opens_only_while_it_fits(parts: tuple, room: int) -> None:
    model, processor = parts
    torch.manual_seed(room)
    for bias in (100.0, 3.0):  # always at the first chance, and at some time
        options = eager_to_draw(model, bias) | {"eos_token_id": []}
        for answer in answers(model, processor, CHATS, max_new_tokens=room, **options):
            images = check_whole_images(model, answer)
            assert len(answer) == room and images <= room // IMAGE
            assert images == room // IMAGE or bias < 100


def test_the_context_is_room_too() -> None:
    model, processor = tiny.unified(rows=301, context=64)
    torch.manual_seed(0)
    inputs = prompts(processor, CHATS[:1])
    length = inputs["input_ids"].shape[1]
    for options in ({}, {"max_new_tokens": 1000}):
        (answer,) = answers(model, processor, CHATS[:1], eos_token_id=[], **options, **eager_to_draw(model, 100.0))
        assert len(answer) + length == 64 and check_whole_images(model, answer) == (64 - length) // IMAGE


def test_the_opening_counts_by_hand() -> None:
    allowed = torch.tensor([True, True, False, True])  # V = 4, marker 1
    opening = ImageOpening(allowed, 1, length=3, latest=[0, 1, -1])
    scores = torch.zeros(3, 4)
    hidden = -torch.inf
    first = opening(torch.zeros(3, 3, dtype=torch.long), scores)
    assert first.tolist() == [[0, 0, hidden, 0], [0, 0, hidden, 0], [0, hidden, hidden, 0]]
    second = opening(torch.zeros(3, 4, dtype=torch.long), scores)
    assert second.tolist() == [[0, hidden, hidden, 0], [0, 0, hidden, 0], [0, hidden, hidden, 0]]
    assert (scores == 0).all(), "the input is not changed"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_new_tokens": 17}, "max_new_tokens is 17 and an image takes 18 tokens"),
        ({"num_beams": 2}, "does not take num_beams"),
        ({"streamer": 1, "num_return_sequences": 2}, "does not take num_return_sequences, streamer"),
        ({"seed": [1, 2]}, "seed has 2 values, give 1 or one per prompt, 3"),
        ({"guidance_scale": 0.5}, "guidance_scale is 0.5"),
        ({"guidance_scale": [2.0, 2.0]}, "guidance_scale has 2 values, give 1 or one per prompt, 3"),
        ({"image_generation": {"hot": 1}}, "image_generation holds hot; known: do_sample"),
        ({"image_generation": {"top_p": 2}}, "top_p=2"),
        ({"parallel_tokens": 0}, "parallel_tokens is 0"),
    ],
)
def test_what_has_no_meaning_is_one_sentence(parts: tuple, options: dict, said: str) -> None:
    model, processor = parts
    with pytest.raises(UserError, match=said.replace("(", r"\(")):
        model.generate(**prompts(processor, CHATS), generation_mode="interleaved", **options)


def test_a_model_without_markers_cannot_interleave(parts: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = parts
    inputs = prompts(processor, CHATS)
    opened = processor(text=processor.drawing_prompt("one"), return_tensors="pt")
    with pytest.raises(UserError, match="ends with the begin marker of an image: use generation_mode='image'"):
        model.generate(**opened, generation_mode="interleaved")
    monkeypatch.setattr(model.config, "eoi_token_id", None)
    with pytest.raises(UserError, match="no tokens that begin and end an image"):
        model.generate(**inputs, generation_mode="interleaved")


def test_parts_of_a_broken_answer_are_refused(parts: tuple) -> None:
    model, processor = parts
    row = torch.tensor([65, model.config.boi_token_id, *[model.visual_vocabulary.base] * 15])
    with pytest.raises(UserError, match="An image has 16 ids, this answer has one with 15"):
        processor.split_parts(row)
    assert processor.split_parts(row[:2]) == [[{"type": "text", "text": processor.tokenizer.decode([65])}]]
    assert processor.post_process_multimodal_output(row[:1], generation_mode="interleaved") == processor.split_parts(
        row[:1]
    )


def test_respond_returns_texts_and_images_and_keeps_them(parts: tuple) -> None:
    model, processor = parts
    session = ChatSession(model, processor, **eager_to_draw(model, 4.0))
    torch.manual_seed(3)
    answer = session.respond("one", tiny.image(), seed=4, max_new_tokens=60)
    images = [part for part in answer if isinstance(part, Image.Image)]
    assert images and all(image.size == (16, 16) for image in images)
    assert all(isinstance(part, str | Image.Image) for part in answer) and len(answer) > len(images)
    assert session.messages == [tiny.user(tiny.image(), "one"), tiny.assistant(*answer)]
    assert len(session._inputs(session.messages)["pixel_values"]) == 1 + len(images), "a later question sees them"
    torch.manual_seed(3)
    again = ChatSession(model, processor, **eager_to_draw(model, 4.0)).respond(
        "one", tiny.image(), seed=4, max_new_tokens=60
    )
    assert [part if isinstance(part, str) else part.tobytes() for part in again] == [
        part if isinstance(part, str) else part.tobytes() for part in answer
    ]
    before = list(session.messages)
    for text, options in (("", {}), ("two", {"seed": "x"}), ("two", {"max_new_tokens": 3}), ("word " * 5000, {})):
        with pytest.raises(UserError):
            session.respond(text, **options)
    assert session.messages == before
