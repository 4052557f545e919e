"""The ways of drawing that are timed draw the same: image ids, and equal ones where nothing is left to chance."""

import json
import runpy
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from eval.bench_generation import bandwidth, first_token_seconds, peak_bytes
from eval.generation_neighbours import Neighbours
from eval.generation_rivals import Rivals, cache_bytes_per_step, random_model, weight_bytes

BENCH = Path(__file__).resolve().parents[2] / "eval/bench_generation.py"


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_every_way_draws_from_the_same_distribution(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the choice made greedy everywhere, all ways draw the same ids."""
    torch.manual_seed(0)
    model, processor = random_model(128, 2, 64, 16, torch.float32)
    rivals = Rivals.of(model, processor, 2, scale)
    greedy = type(rivals.model).generate
    monkeypatch.setattr(
        type(model), "generate", lambda self, *a, **k: greedy(self, *a, **{**k, "temperature": 1e-6, "seed": 1})
    )
    stock = type(rivals.alone).generate
    monkeypatch.setattr(
        type(rivals.alone),
        "generate",
        lambda self, *a, **k: stock(self, *a, **{**k, "do_sample": False, "top_k": None}),
    )
    monkeypatch.setattr(torch.Tensor, "multinomial", lambda self, count: self.argmax(-1, keepdim=True))
    drawn = {name: way(None) for name, way in rivals.ways.items()}
    for name, ids in drawn.items():
        assert torch.equal(ids, drawn["unimm"]), name
    assert len(drawn) == 7


def test_bytes_of_a_step_are_counted() -> None:
    model, _ = random_model(128, 2, 64, 16, torch.float32)
    layer = 128 * (128 + 64 + 64 + 128) + 3 * 128 * 384 + 2 * 128 + 2 * 64
    cache = 2 * 2 * 64 * (10 + 8)  # keys and values of two layers
    assert weight_bytes(model) == 4 * (2 * layer + 128 + 64 * 128)
    assert cache_bytes_per_step(model, 3, True, 10) == 4 * 6 * cache


@pytest.mark.parametrize(("name", "rows"), [("transformers Janus", [4] * 16), ("transformers Emu3", [2] * 32)])
def test_the_neighbours_loops_are_of_like_size_and_guided(
    name: str, rows: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many layers, heads and codes as the model; rows of a forward as each of them does guidance."""
    model, _ = random_model(128, 2, 64, 16, torch.float32)
    like = Neighbours.like(model, 9)
    text = like.janus.model.language_model if "Janus" in name else like.emu3.model.text_model
    seen: list[int] = []
    text.register_forward_hook(lambda module, args, output: seen.append(len(output.last_hidden_state)))
    drawn = like.ways(2, 3.0)[name](None)
    assert drawn.shape == (2, 16) and drawn.min() >= 0 and drawn.max() < 64 and seen == rows
    ours = sum(p.numel() for layer in model.model.language_model.layers for p in layer.parameters())
    layers = sum(p.numel() for layer in text.layers for p in layer.parameters())
    assert abs(layers / ours - 1) < 0.01, "only the norms of queries and keys are missing"
    assert like.weights(name) > 4 * (layers + 64 * 128)


def test_first_tokens_and_peaks_are_measured() -> None:
    """Against a way that takes a known memory and chooses its token after a known time."""

    def way(streamer: Any) -> torch.Tensor:
        held = torch.ones(64 << 18)  # 64 MiB
        if streamer is not None:
            time.sleep(0.05)
            streamer.put(held[:1])
            streamer.put(held[:1])
            raise AssertionError("it goes on behind the first token")
        return held

    torch.set_num_threads(1)
    assert 0.05 <= first_token_seconds(way) < 5
    assert 0.9 * (64 << 20) < peak_bytes(way) < 1.5 * (64 << 20)
    assert 1e8 < bandwidth(torch.device("cpu")) < 1e13


@pytest.mark.slow
def test_the_quick_form_writes_every_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", [str(BENCH), "--quick", "--json", str(tmp_path / "found.json")])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(BENCH), run_name="__main__")
    assert ended.value.code in (0, None)
    rows = json.loads((tmp_path / "found.json").read_text())["generation"]
    cases = [(row["scale"], row["batch"]) for row in rows]
    assert {case: cases.count(case) for case in cases} == {(1, 1): 8, (1, 2): 8, (3, 1): 9, (3, 2): 9}
    for name in ("tokens_per_second", "images_per_second", "first_token_seconds", "bound"):
        assert all(row[name] > 0 for row in rows), name
    assert all(row["first_token_seconds"] < row["seconds"] + 1 and row["peak_bytes"] >= 0 for row in rows)
