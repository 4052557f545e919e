"""Forced image tokens: kept bit for bit, and conditions of those drawn after them."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.mllm import tiny
from tests.mllm.test_decoding import SCALES, TEXTS, draw, inputs, slow_logits
from unimm.errors import UserError
from unimm.mllm import decoding
from unimm.mllm.decoding import CompiledSteps, HostSteps, PlainSteps

BASE, CODES = 384, 32


@pytest.fixture(autouse=True)
def _no_compiled_steps_stay() -> Iterator[None]:
    """The compiler keeps a limited number of versions of a step in a process."""
    yield
    torch._dynamo.reset()


def masks(seed: int = 0) -> Tensor:
    """Return forced token ids [3, 16]: a prefix in all rows, a hole, and a random half in each row."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(BASE, BASE + CODES, (3, 16), generator=generator)
    kept = torch.rand(3, 16, generator=generator) < 0.5
    kept[:, :3], kept[:, 7:10], kept[:, 14:] = True, True, True
    return ids.where(kept, torch.tensor(-1))


@pytest.mark.parametrize("family", ["qwen3", "llama", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("options", [{"do_sample": False}, {"temperature": 0.9, "top_k": 20}])
def test_forced_tokens_are_kept_and_condition_the_rest(family: str, options: dict[str, Any]) -> None:
    """Guided logits of every token equal forwards without cache, batch or padding, forced tokens among their input."""
    model, processor = tiny.attached(family)
    forced = masks()
    asked = {"guidance_scale": SCALES, "forced_token_ids": forced, **options}
    output = draw(model, processor, return_dict_in_generate=True, output_logits=True, **asked)
    kept = forced >= 0
    assert torch.equal(output.sequences[kept], forced[kept])
    batch = inputs(processor)
    for n, (ids, mask) in enumerate(zip(*batch.values(), strict=True)):
        expected = slow_logits(model, ids[mask.bool()], output.sequences[n], [SCALES[n]] * 16)
        found = torch.stack([step[n] for step in output.logits])
        torch.testing.assert_close(found, expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-5)
        if not options.get("do_sample", True):
            assert torch.equal(output.sequences[n][~kept[n]], expected.argmax(-1)[~kept[n]] + BASE)
    assert torch.equal(draw(model, processor, **asked), output.sequences), "skipped logits change nothing"


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3", "qwen2_5_vl"])
def test_every_way_draws_the_same_around_forced_tokens(
    family: str, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """In parallel, compiled, with intervals, several images of a prompt, alone and in a batch; in float64."""
    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda step, **kwargs: original(step, backend="eager", dynamic=False))
    model, processor = tiny.attached(family)
    model = model.double()
    forced = masks(1)
    for options in (
        {"guidance_scale": SCALES, "num_return_sequences": 2},
        {"guidance_scale": 3.0, "guidance_interval": (2, 9), "top_k": 5},
        {"do_sample": False},
    ):
        expected = draw(model, processor, forced_token_ids=forced, **options)
        for how in ({"parallel_tokens": 3}, {"parallel_tokens": "auto"}, {"compile": True}):
            assert torch.equal(draw(model, processor, forced_token_ids=forced, **options, **how), expected)
        repeats = options.get("num_return_sequences", 1)
        each = forced.repeat_interleave(repeats, 0)
        assert torch.equal(draw(model, processor, forced_token_ids=each, **options), expected)
        for n, text in enumerate(TEXTS):
            one = {**options, "forced_token_ids": forced[n : n + 1]}
            if isinstance(one.get("guidance_scale"), list):
                one["guidance_scale"] = one["guidance_scale"][n]
            alone = draw(model, processor, [text], **one)
            assert torch.equal(alone, expected[n * repeats : (n + 1) * repeats])
    assert not [w for w in recwarn if "slower" in str(w.message)]


def test_nothing_forced_is_drawing_as_ever_and_all_forced_is_the_input() -> None:
    model, processor = tiny.unified()
    options = {"guidance_scale": 3.0, "num_return_sequences": 2}
    free = draw(model, processor, **options)
    assert torch.equal(draw(model, processor, forced_token_ids=torch.full((3, 16), -1), **options), free)
    other = torch.randint(BASE, BASE + CODES, (6, 16), generator=torch.Generator().manual_seed(5))
    assert torch.equal(draw(model, processor, forced_token_ids=other, **options), other)
    assert torch.equal(draw(model, processor, forced_token_ids=free, seed=9, **options), free)
    prefix = free.clone()
    prefix[:, 8:] = -1
    assert torch.equal(draw(model, processor, forced_token_ids=prefix, **options), free), "the noise is that of a place"


def test_equal_prompts_with_other_forced_tokens_are_other_requests() -> None:
    """An edit does not depend on the edits beside it: each is image 0 of its request."""
    model, processor = tiny.unified()
    forced = masks(2)
    batch = draw(model, processor, [TEXTS[0]] * 3, forced_token_ids=forced)
    for n in range(3):
        assert torch.equal(draw(model, processor, TEXTS[:1], forced_token_ids=forced[n : n + 1])[0], batch[n])
    same = draw(model, processor, [TEXTS[0]] * 2, forced_token_ids=forced[:1].expand(2, -1))
    assert torch.equal(same[0], batch[0]) and not torch.equal(same[0], same[1])


@pytest.mark.parametrize("kind", [PlainSteps, HostSteps])
def test_runs_of_forced_tokens_are_read_at_once(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prefix and a run within are one forward each, nothing is computed behind the last drawn token."""
    model, processor = tiny.unified()
    monkeypatch.setattr(decoding, "is_plain", lambda model: kind is PlainSteps)
    fed: list[tuple[int, int]] = []
    original = kind.logits
    monkeypatch.setattr(kind, "logits", lambda self, ids, n: (fed.append((ids.shape[1], n)), original(self, ids, n))[1])
    forced = torch.full((3, 16), BASE)
    forced[:, 5:7] = forced[:, 12] = -1
    expected = draw(model, processor, forced_token_ids=forced, guidance_scale=2.0)
    assert fed == [(5, 1), (1, 1), (6, 1)]
    fed.clear()
    assert torch.equal(draw(model, processor, forced_token_ids=forced, guidance_scale=2.0, parallel_tokens=3), expected)
    assert fed[0] == (7, 3)
    fed.clear()
    draw(model, processor, forced_token_ids=torch.full((3, 16), BASE), guidance_scale=2.0)
    assert fed == []


def test_a_prefix_of_a_compiled_drawing_is_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = tiny.unified()
    forced = masks()
    expected = draw(model, processor, forced_token_ids=forced, guidance_scale=2.0)
    fed: list[int] = []
    original, compiler = CompiledSteps.choose, torch.compile
    monkeypatch.setattr(torch, "compile", lambda step, **kwargs: compiler(step, backend="eager", dynamic=False))
    monkeypatch.setattr(
        CompiledSteps, "choose", lambda self, ids, *others: (fed.append(ids.shape[1]), original(self, ids, *others))[1]
    )
    drawn = draw(model, processor, forced_token_ids=forced, guidance_scale=2.0, compile=True)
    assert torch.equal(drawn, expected) and fed[0] == 3 and set(fed[1:]) == {1}


@pytest.mark.parametrize(
    ("forced", "said"),
    [
        (torch.full((3, 15), -1), r"\[3, 15\].*\[3, 16\] or \[6, 16\]"),
        (torch.full((2, 16), -1), r"\[2, 16\].*\[3, 16\] or \[6, 16\]"),
        (torch.full((16,), -1), r"\[16\]"),
        (torch.full((3, 16), -1.0), "torch.float32: give whole numbers"),
        (torch.ones(3, 16, dtype=torch.bool), "torch.bool: give whole numbers"),
        (torch.full((3, 16), 5), "holds 5: image ids are 384 to 415"),
        (torch.full((3, 16), 416), "holds 416: image ids are 384 to 415"),
        (torch.full((3, 16), -2), "holds -2"),
    ],
)
def test_wrong_forced_tokens_are_one_sentence(forced: Tensor, said: str) -> None:
    model, processor = tiny.unified()
    with pytest.raises(UserError, match=said):
        draw(model, processor, forced_token_ids=forced, num_return_sequences=2)
