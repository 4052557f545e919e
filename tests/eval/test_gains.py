"""eval/gains.py on rows whose gains are known."""

import json
from pathlib import Path

import pytest

from eval.gains import compare, main, read_rows
from unimm.errors import UserError


def write(path: Path, right: int, strict: int) -> Path:
    """Two tags of ten prompts with two images each, of which the first so many are right, and ten answers."""
    rows = [
        {"item": f"generation/{tag}/{n:03}", "sample": k, "group": tag, "correct": n < right, "strict": n < strict}
        for tag in ("colors", "counting", "withheld")
        for n in range(10)
        for k in range(2)
    ]
    rows += [{"item": f"chat/color/{n:04}", "sample": 0, "kind": "color", "correct": n < 9} for n in range(10)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_gains_of_known_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = write(tmp_path / "a", 6, 2), write(tmp_path / "b", 7, 8)
    found = compare(read_rows(before), read_rows(after))
    assert [each.value for each in found["drawings: overall"]] == pytest.approx([0.6, 0.7, 0.1])
    gain = found["drawings: overall, strict"][2]
    assert gain.value == pytest.approx(0.6) and gain.low is not None and 0.3 < gain.low < 0.6 < gain.high
    assert found["drawings: overall, strict"][0].clusters == 20  # prompts, not images
    same = found["answers"][2]
    assert (same.value, same.low, same.high) == (0, 0, 0)
    main([str(before), str(after)])
    assert "drawings: overall, strict" in capsys.readouterr().out


def test_rows_of_other_samples_are_refused(tmp_path: Path) -> None:
    rows = read_rows(write(tmp_path / "a", 6, 2))
    with pytest.raises(UserError, match="scored 70 and 69 samples"):
        compare(rows, dict(list(rows.items())[1:]))
    (tmp_path / "b").write_text('{"prompt": 1}', encoding="utf-8")
    with pytest.raises(UserError, match="holds no rows of eval/shapes.py"):
        read_rows(tmp_path / "b")
