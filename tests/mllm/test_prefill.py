"""Prompts are read once and with little padding: token positions of every forward, and the same ids as ever."""

import itertools
from typing import Any

import pytest
import torch

from tests.mllm import tiny
from unimm.mllm import attach, prefill
from unimm.mllm.answering import chat_inputs
from unimm.testing.hosts import tiny_host

SYSTEM = {"role": "system", "content": [{"type": "text", "text": "Be brief and draw what you are asked for. " * 3}]}
WORDS = "a photo of a red circle beside two green squares on white and one blue ring "


def turns(*words: int, system: bool = True) -> list[list[dict]]:
    """Return one conversation for each number of words."""
    texts = [" ".join((WORDS * 20).split()[:count]) for count in words]
    return [[*([SYSTEM] if system else []), tiny.user(text)] for text in texts]


@pytest.fixture
def fed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Rows and tokens of every forward that reads prompts."""
    shapes: list[tuple[int, int]] = []
    original = prefill._read

    def read(model: Any, rows: Any, done: int, cache: Any, images: Any) -> Any:
        handle = model.model.register_forward_pre_hook(
            lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
        )
        try:
            return original(model, rows, done, cache, images)
        finally:
            handle.remove()

    monkeypatch.setattr(prefill, "_read", read)
    return shapes


def lengths(model: Any, processor: Any, chats: list[list[dict]]) -> list[int]:
    """Return the tokens of each prompt, with its begin marker."""
    return (chat_inputs(model, processor, chats)["attention_mask"].sum(1) + 1).tolist()


@pytest.mark.parametrize("family", ["qwen3", "qwen2_5_vl"])
def test_common_tokens_are_read_once_and_little_is_padded(family: str, fed: list[tuple[int, int]]) -> None:
    host, texts = tiny_host(family)
    host.config.get_text_config().max_position_embeddings = 4096
    model, processor = attach(host, tiny.image_tokenizer(), texts)
    model = model.double()
    chats = turns(3, 90, 5, 88, 92, 4)
    options = {"generation_mode": "image", "seed": 2, "guidance_scale": 2.5}
    null = chat_inputs(model, processor, turns(0))
    options |= {"negative_prompt_ids": null["input_ids"]}
    batch = model.generate(**chat_inputs(model, processor, chats), **options)
    found, each = list(fed), lengths(model, processor, [*chats, *turns(0)])
    common, short, long = found[0][1], found[1], found[2]
    assert len(found) == 3 and found[0][0] == 1 and {short[0], long[0]} == {4, 3}
    assert {short[1], long[1]} == {max(each[n] for n in (0, 2, 5, 6)) - common, max(each) - common}
    positions = sum(rows * tokens for rows, tokens in found)
    assert positions < 0.5 * 7 * max(each), "what one forward over padded rows would take"
    alone = [model.generate(**chat_inputs(model, processor, [chat]), **options)[0] for chat in chats]
    assert torch.equal(batch, torch.stack(alone))
    again = model.generate(**chat_inputs(model, processor, chats[::-1]), **options)
    assert torch.equal(again.flip(0), batch)


def test_one_forward_reads_what_is_short(fed: list[tuple[int, int]]) -> None:
    model, processor = tiny.unified()
    model.generate(**chat_inputs(model, processor, turns(3, 4, system=False)), generation_mode="image", seed=0)
    assert len(fed) == 1


def test_logits_after_any_plan_are_those_of_the_prompt_alone(fed: list[tuple[int, int]]) -> None:
    """Images among the prompts, masked cells between their tokens: guided logits equal single forwards."""
    model, processor = tiny.unified(context=4096)
    chats = turns(2, 95, 3)
    chats[1][1]["content"].insert(0, {"type": "image", "image": tiny.image("red")})
    chats[2][1]["content"].append({"type": "image", "image": tiny.image("blue")})
    batch = chat_inputs(model, processor, chats)
    output = model.generate(
        **batch, generation_mode="image", return_dict_in_generate=True, output_logits=True, guidance_scale=None
    )
    assert len(fed) == 3 and fed[0][0] == 1
    for n, chat in enumerate(chats):
        inputs = chat_inputs(model, processor, [chat])
        boi = torch.tensor([[model.config.boi_token_id]])
        whole = torch.cat([inputs["input_ids"], boi, output.sequences[n : n + 1, :-1]], dim=1)
        with torch.no_grad():
            logits = model(whole, pixel_values=inputs.get("pixel_values"), vocabulary="image").logits[0, -16:]
        found = torch.stack([step[n] for step in output.logits])
        torch.testing.assert_close(found, logits, atol=1e-5 * float(logits.abs().max()), rtol=1e-5)


def test_images_are_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = tiny.unified()
    seen: list[int] = []
    original = model.image_tokenizer.forward
    monkeypatch.setattr(
        model.image_tokenizer,
        "forward",
        lambda pixels, *a, **k: (seen.append(len(pixels)), original(pixels, *a, **k))[1],
    )
    chats = [[tiny.user(tiny.image("red"), "two")]] * 3 + [[tiny.user(tiny.image("blue"), "two")]]
    images = chat_inputs(model, processor, [[tiny.user(tiny.image("red"), "")]] * 4)["input_ids"]
    options = {"guidance_scale": 2.0, "image_guidance_scale": 3.0, "image_prompt_ids": images}
    model.generate(**chat_inputs(model, processor, chats), generation_mode="image", **options)
    assert seen == [4], "all sides of guidance share the features"


def test_groups_are_the_cheapest() -> None:
    """Against every way to cut the sorted lengths."""
    generator = torch.Generator().manual_seed(0)
    for count in range(1, 8):
        given = torch.randint(1, 300, (count,), generator=generator).tolist()
        ordered = sorted(given)
        costs = []
        for cuts in itertools.product([False, True], repeat=count - 1):
            groups, begin = [], 0
            for n, cut in enumerate([*cuts, True]):
                if cut:
                    groups.append(ordered[begin : n + 1])
                    begin = n + 1
            costs.append(sum(prefill._FORWARD + len(group) * group[-1] for group in groups))
        cost, found = prefill._grouped(given)
        assert cost == min(costs) and sorted(n for group in found for n in group) == list(range(count))
        assert cost == sum(prefill._FORWARD + len(group) * max(given[n] for n in group) for group in found)
