"""The memory of a drawing, before it starts."""

from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from tests.mllm import tiny
from unimm.errors import UserError
from unimm.mllm import memory
from unimm.mllm.answering import chat_inputs


@pytest.fixture
def inputs() -> tuple[Any, dict[str, Any]]:
    model, processor = tiny.unified()
    return model, dict(chat_inputs(model, processor, [[tiny.user("two")]]))


def free(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=count))


def test_the_cache_is_part_of_the_estimate(inputs: tuple[Any, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """The estimate is at least the bytes of the cache that a drawing returns, and not many times as much."""
    model, prompts = inputs
    asked: list[tuple[int, ...]] = []
    original = memory.drawing_bytes
    monkeypatch.setattr(memory, "drawing_bytes", lambda *given: asked.append(given[1:]) or original(*given))
    output = model.generate(
        **prompts, generation_mode="image", num_return_sequences=8, guidance_scale=2.0, return_dict_in_generate=True
    )
    layers = output.past_key_values.layers
    held = sum(each.nbytes for layer in layers for each in (layer.all_keys, layer.all_values))
    estimate = original(model, *asked[0])
    length = prompts["input_ids"].shape[1] + 1 + 16
    assert asked[0][0] == 16 and asked[0][2] == length
    assert held == 2 * 2 * 16 * length * 16 * 4 and held < estimate < 3 * held


def test_more_images_than_memory_are_refused_before_the_start(
    inputs: tuple[Any, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompts = inputs
    reads: list[int] = []
    model.model.register_forward_pre_hook(lambda module, args: reads.append(1))
    free(monkeypatch, 1_000_000)
    with pytest.raises(
        UserError, match=r"64 images at once take about 0\.\d+ GB .* 0\.001 GB are free: draw \d+ at"
    ) as error:
        model.generate(**prompts, generation_mode="image", num_return_sequences=64, guidance_scale=2.0)
    assert not reads
    fit = int(str(error.value).split("draw ")[1].split()[0])
    assert 1 <= fit < 64
    model.generate(**prompts, generation_mode="image", num_return_sequences=fit, guidance_scale=2.0)
    free(monkeypatch, 1000)
    with pytest.raises(UserError, match="use a smaller model or dtype"):
        model.generate(**prompts, generation_mode="image")


def test_rows_without_guidance_take_half(inputs: tuple[Any, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = inputs
    free(monkeypatch, memory.drawing_bytes(model, 20, 40, 40))
    model.generate(**prompts, generation_mode="image", num_return_sequences=16)
    with pytest.raises(UserError, match="16 images at once"):
        model.generate(**prompts, generation_mode="image", num_return_sequences=16, guidance_scale=3.0)


def test_free_memory_of_a_gpu_counts_the_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [SimpleNamespace(device=torch.device("cuda", n)) for n in (0, 1, 1)]
    model = SimpleNamespace(model=SimpleNamespace(language_model=SimpleNamespace(parameters=lambda: gpus)))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100 + device.index, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 50)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 20)
    assert memory.free_bytes(model) == 100 + 101 + 2 * 30
