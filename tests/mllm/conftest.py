"""For tests of drawing."""

import pytest

from unimm.mllm import decoding


@pytest.fixture
def rows_fed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of every step after the prompts."""
    rows: list[int] = []
    for kind in (decoding.PlainSteps, decoding.HostSteps):
        original = kind.logits
        monkeypatch.setattr(
            kind, "logits", lambda self, ids, n, original=original: (rows.append(len(ids)), original(self, ids, n))[1]
        )
    return rows
