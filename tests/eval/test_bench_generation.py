"""The ways of drawing that are timed draw the same: image ids, and equal ones where nothing is left to chance."""

import json
import runpy
from pathlib import Path

import pytest
import torch

from eval.bench_generation import Rivals, bytes_per_step, random_model

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
    drawn = {name: way() for name, way in rivals.ways.items()}
    for name, ids in drawn.items():
        assert torch.equal(ids, drawn["unimm"]), name
    assert len(drawn) == 7


def test_bytes_of_a_step_are_counted() -> None:
    model, _ = random_model(128, 2, 64, 16, torch.float32)
    layer = 128 * (128 + 64 + 64 + 128) + 3 * 128 * 384 + 2 * 128 + 2 * 64
    cache = 2 * 2 * 64 * (10 + 8)  # keys and values of two layers
    assert bytes_per_step(model, 3, True, 10) == 4 * (2 * layer + 128 + 64 * 128 + 6 * cache)


def test_the_driver_writes_its_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = "--width 128 --layers 1 --codes 32 --image-tokens 4 --batches 1 --scales 2 --repeats 1 --threads 1"
    monkeypatch.setattr("sys.argv", [str(BENCH), *arguments.split(), "--json", str(tmp_path / "found.json")])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(BENCH), run_name="__main__")
    assert ended.value.code in (0, None)
    rows = json.loads((tmp_path / "found.json").read_text())["generation"]
    assert len(rows) == 7 and all(row["tokens_per_second"] > 0 and row["bound"] > 0 for row in rows)
