"""Packed rows against padded ones: the same loss, and no sample that sees another."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.mllm import tiny
from tests.training.language_model.tiny_host import LLM, tiny_image_tokenizer
from unimm.data.conversations import message, shapes_corpus
from unimm.data.mixture import FlowConfig, Mixture, MixtureConfig
from unimm.data.text.collators import IGNORED, FlowCollator
from unimm.data.text.packing import even_rows, first_fit
from unimm.errors import UserError
from unimm.mllm import UnimmProcessor, attach
from unimm.training.language_model.small_model import CHAT_TOKENS, new_language_model
from unimm.training.language_model.text_tokenizer import train_text_tokenizer
from unimm.training.language_model.trainer import HostTrainer, check_packing
from unimm.training.loop.arguments import HostTrainingArguments

CAPACITY = 200


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def host(request: pytest.FixtureRequest) -> tuple[Any, UnimmProcessor]:
    torch.manual_seed(0)
    texts = train_text_tokenizer(shapes_corpus(50, 0), 400, CHAT_TOKENS)
    model = new_language_model(LLM, texts)
    return attach(model, tiny_image_tokenizer(), texts, attn_implementation=request.param)


def drawings(count: int) -> list[dict[str, Any]]:
    stream = Mixture(MixtureConfig({"drawing": FlowConfig("drawing", null_prompt_prob=0.2)}))
    return [stream[n] for n in range(count)]


def texts(count: int) -> list[dict[str, Any]]:
    """Conversations without an image, of very different lengths."""
    return [
        {
            "flow": "text",
            "kind": "conversation",
            "index": n,
            "messages": [message("user", "one " * (n % 7)), message("assistant", "red " * (3 * n % 11))] * (1 + n % 2),
        }
        for n in range(count)
    ]


def trainer_of(host: tuple[Any, UnimmProcessor], folder: Path, collate: FlowCollator) -> HostTrainer:
    model, processor = host
    arguments = HostTrainingArguments(
        str(folder), max_steps=1, per_device_train_batch_size=8, pack_length=collate.pack_length, disable_tqdm=True
    )
    return HostTrainer(
        model,
        arguments,
        processor=processor,
        data_collator=collate,
        train_dataset=Mixture(MixtureConfig({"drawing": FlowConfig("drawing")})),
        flow_weights={"drawing": 1.0, "text": 0.5},
    )


def test_first_fit_fills_rows_and_loses_nobody() -> None:
    lengths = torch.randint(1, 60, (500,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = first_fit(lengths, 64)
    assert sorted(sample for row in rows for sample in row) == list(range(500))
    filled = [sum(lengths[sample] for sample in row) for row in rows]
    assert max(filled) <= 64
    assert len(rows) <= 11 / 9 * -(-sum(lengths) // 64) + 1  # first fit decreasing's bound (Johnson 1973)


def test_rows_are_filled_evenly() -> None:
    generator = torch.Generator().manual_seed(0)
    for capacity in (160, 256, 512, 1000):
        for _ in range(10):
            lengths = torch.randint(80, 156, (32,), generator=generator).tolist()
            tight, even = first_fit(lengths, capacity), even_rows(lengths, capacity)
            assert sorted(sample for row in even for sample in row) == list(range(32))
            widths = [max(sum(lengths[sample] for sample in row) for row in rows) for rows in (tight, even)]
            assert len(even) == len(tight) and widths[1] <= widths[0] <= capacity
            if capacity >= 512:
                assert sum(lengths) / (len(even) * widths[1]) > 0.88
    assert even_rows([10, 10, 10], 20) == [[0, 2], [1]]
    assert even_rows([5, 8, 6, 9, 9], 19) == first_fit([5, 8, 6, 9, 9], 19)  # dealt evenly a row would have 20


def test_the_packed_loss_is_the_padded_one_and_so_are_its_gradients(
    host: tuple[Any, UnimmProcessor], tmp_path: Path
) -> None:
    samples = [*drawings(9), *texts(14)]
    found = []
    for pack_length in (None, CAPACITY):
        trainer = trainer_of(host, tmp_path, FlowCollator(host[1], pack_length=pack_length))
        model = trainer.model.train()
        model.zero_grad()
        batch = trainer.data_collator(samples)
        loss = trainer.compute_loss(model, batch)
        loss.backward()
        found.append((loss.item(), model.model.language_model.embed_tokens.weight.grad.clone(), batch))
    (padded, gradient, rows), (packed, packed_gradient, packed_rows) = found
    assert packed_rows["drawing"]["input_ids"].shape[0] < 9 and packed_rows["text"]["input_ids"].shape[0] < 14
    assert "attention_mask" not in packed_rows["drawing"]
    assert packed == pytest.approx(padded, abs=1e-5)
    assert torch.allclose(gradient, packed_gradient, atol=1e-6)
    for flow in ("drawing", "text"):
        assert (rows[flow]["labels"] != IGNORED).sum() == (packed_rows[flow]["labels"] != IGNORED).sum()


@torch.no_grad()
def test_a_packed_sample_sees_nothing_of_the_others(host: tuple[Any, UnimmProcessor]) -> None:
    """Another sample's tokens change no bit of the logits, and its own logits are those that it has alone."""
    model, processor = host
    batch = FlowCollator(processor, pack_length=CAPACITY)(texts(12))["text"]
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    logits = model(**inputs, vocabulary="all", use_cache=False).logits
    row = inputs["input_ids"][0]
    starts = [*(inputs["position_ids"][0] == 0).nonzero()[:, 0].tolist(), len(row)]
    assert len(starts) > 3
    start, end = starts[1], starts[2]
    other = inputs["input_ids"].clone()
    other[0, start:end] = (other[0, start:end] + 7) % 300
    changed = model(**inputs | {"input_ids": other}, vocabulary="all", use_cache=False).logits
    inside = torch.zeros(len(row), dtype=torch.bool)
    inside[start:end] = True
    assert torch.equal(changed[0][~inside], logits[0][~inside])
    assert torch.equal(changed[1:], logits[1:])
    assert not torch.equal(changed[0][inside], logits[0][inside])
    alone = model(input_ids=row[None, start:end], vocabulary="all").logits
    assert torch.allclose(alone[0], logits[0, start:end], atol=1e-5)


def test_drawn_images_follow_their_captions(host: tuple[Any, UnimmProcessor]) -> None:
    model, processor = host
    samples = drawings(7)
    padded, packed = (FlowCollator(processor, pack_length=length)(samples)["drawing"] for length in (None, 90))
    rows = []
    for batch in (padded, packed):
        ids = batch["input_ids"].masked_scatter(batch["drawn"], model.get_image_tokens(batch["drawn_pixel_values"]))
        places = batch.get("position_ids", batch["attention_mask"].cumsum(1) - 1 if "attention_mask" in batch else None)
        split = [
            tuple(part.tolist())
            for row, place in zip(ids, places, strict=True)
            for part in torch.tensor_split(row, (place == 0).nonzero()[1:, 0])
        ]
        rows.append(
            {
                part[: max(n for n, token in enumerate(part) if token >= 400) + 1]
                for part in split
                if any(token >= 400 for token in part)
            }
        )
    assert rows[0] == rows[1] and len(rows[0]) == 7


def test_what_cannot_be_packed_is_refused(host: tuple[Any, UnimmProcessor]) -> None:
    _, processor = host
    seen = Mixture(MixtureConfig({"talk": FlowConfig("conversation")}))
    with pytest.raises(UserError, match="'talk' has images to look at"):
        FlowCollator(processor, pack_length=CAPACITY)([seen[0]])
    with pytest.raises(UserError, match=r"has \d+ tokens and a packed row 20: raise train.pack_length"):
        FlowCollator(processor, pack_length=20)(drawings(2))
    model, _ = tiny.unified()
    check_packing(model)
    model.config.get_text_config()._attn_implementation = "flex_attention"
    with pytest.raises(UserError, match=r"'flex_attention' cannot be packed"):
        check_packing(model)
    model.config.get_text_config()._attn_implementation = "sdpa"
    type(model).positions_are_1d = False
    try:
        with pytest.raises(UserError, match="positions in one dimension"):
            check_packing(model)
    finally:
        del type(model).positions_are_1d
