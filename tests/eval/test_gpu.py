"""The run that checks and measures a GPU: every part at debug size, what a failure leaves, what time does not cover."""

import json
from pathlib import Path
from typing import Any

import pytest

from eval import gpu
from unimm.errors import UserError


@pytest.mark.slow
def test_every_part_runs_at_debug_size(tmp_path: Path) -> None:
    assert gpu.main(["--size", "debug", "--limit-seconds", "1500", "--output", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert list(found["parts"]) == list(gpu.PARTS)
    assert all(part["ok"] for part in found["parts"].values())
    assert set(found["parts"]["correctness"]["result"]) >= {"ids", "drawings", "packing", "compiled"}
    stage = found["parts"]["training stage 2"]["result"]["stage2 plain"]
    assert stage["images_per_second"] > 0 and len(stage["slowest"]) == 15 and stage["waits"]["aten::nonzero"] > 0
    table = (tmp_path / "table.md").read_text().splitlines()
    assert len(table) > len(gpu.PARTS) + 2 and all(line.count(" | ") >= 2 for line in table[2:])


def commands(*lines: str) -> Any:
    """Return the commands of a part that runs these lines of Python, with FILE for the report."""
    return lambda size, report: (["-c", line.replace("FILE", str(report))] for line in lines)


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, parts: dict[str, gpu.Part], *arguments: str) -> Any:
    monkeypatch.setattr(gpu, "PARTS", parts)
    code = gpu.main(["--size", "debug", "--output", str(folder), *arguments])
    return code, json.loads((folder / "gpu.json").read_text())["parts"]


def test_a_part_that_fails_says_why_and_the_others_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = "open('FILE', 'w').write('{\"generation\": []}')"
    parts = {
        "broken": gpu.Part(commands(written, "raise ValueError('no such kernel')"), 60, 0),
        "whole": gpu.Part(commands(written), 60, 0),
    }
    code, found = run(tmp_path, monkeypatch, parts)
    assert code == 1 and found["whole"]["ok"] and found["whole"]["result"] == {"generation": []}
    assert not found["broken"]["ok"] and found["broken"]["reason"] == "exit code 1: ValueError: no such kernel"
    assert found["broken"]["result"] == {"generation": []}  # what it had written
    assert "no such kernel" in (tmp_path / "table.md").read_text()


def test_what_the_time_does_not_cover_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {"long": gpu.Part(commands("pass"), 60, 900)}
    code, found = run(tmp_path, monkeypatch, parts, "--limit-seconds", "30")
    assert code == 1 and "left out: 30 s are left, it takes at least 900" in found["long"]["reason"]


@pytest.mark.parametrize("stoppable", [False, True])
def test_a_part_ends_at_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stoppable: bool) -> None:
    """One that writes checkpoints has then done what it could."""
    monkeypatch.setattr(gpu, "GRACE", 1)
    parts = {"endless": gpu.Part(commands("import time; time.sleep(600)"), None, 0, stoppable)}
    code, found = run(tmp_path, monkeypatch, parts, "--limit-seconds", "2")
    assert found["endless"]["ok"] is stoppable and code == (0 if stoppable else 1)
    assert "stopped at its limit" in found["endless"]["reason"] and found["endless"]["seconds"] < 60


def test_the_chain_is_what_make_would_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    (tmp_path / "Makefile").write_text((Path(gpu.__file__).parents[1] / "Makefile").read_text())
    (tmp_path / "runs/shapes/vfm").mkdir(parents=True)
    (tmp_path / "runs/shapes/vfm/.done").touch()
    for name in ("stage1", "stage2", "sft"):
        (tmp_path / f"runs/shapes/{name}").mkdir()
    steps = gpu.PARTS["chain"].commands("paper", tmp_path / "chain.json")
    first, second = next(steps), next(steps)
    assert first[:3] == ["recipes/tokenizer.py", "--config", "configs/shapes/stage1.yaml"]
    assert first[3].startswith("train.num_workers=") and second[2] == "configs/shapes/stage2.yaml"
    assert (tmp_path / "runs/shapes/stage1/.done").is_file() and not (tmp_path / "runs/shapes/stage2/.done").exists()


def test_paper_size_needs_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="finds none: give --size debug"):
        gpu.main(["--size", "paper", "--output", str(tmp_path)])
    assert not any(tmp_path.iterdir())
