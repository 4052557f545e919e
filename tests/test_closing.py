"""A launched program leaves no process group behind, whose threads could abort it while the interpreter shuts down."""

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.conftest import ROOT

NOTHING = {"group": False, "threads": []}
Ended = dict[str, Any]


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """How two ranks ended, for each way to end."""
    script = [sys.executable, "-m", "tests.closing_ranks", str(tmp_path_factory.mktemp("ranks"))]
    done = subprocess.run(script, capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stderr
    found: Ended = json.loads(done.stdout.splitlines()[-1])
    return found


def test_ranks_that_finish_leave_no_group_and_no_thread(ended: Ended) -> None:
    assert ended["finish"]["codes"] == [0, 0]
    assert ended["finish"]["left"] == [NOTHING, NOTHING]


def test_nor_do_ranks_that_refuse_together(ended: Ended) -> None:
    assert ended["refuse"]["codes"] == [2, 2]
    assert ended["refuse"]["left"] == [NOTHING, NOTHING]


def test_an_error_on_one_rank_ends_the_other(ended: Ended) -> None:
    assert ended["refuse_on_one"]["codes"] == [1, 2]  # the other is told that its peer has gone: a traceback
    assert ended["refuse_on_one"]["left"] == [NOTHING]


def test_an_error_with_a_collective_pending_ends_its_rank(ended: Ended) -> None:
    other, code = ended["refuse_while_pending"]["codes"]
    assert (other, code) == (-15, 2)  # the other works until the launcher stops it
    (left,) = ended["refuse_while_pending"]["left"]
    assert "pt_gloo_runloop" in left["threads"]  # the case is what it says


def test_nor_does_a_crash_wait_for_it(ended: Ended) -> None:
    assert ended["break_while_pending"]["codes"] == [-15, 1]


def test_a_group_that_was_open_before_stays(ended: Ended) -> None:
    (left,) = ended["opened_before"]["left"]
    assert left["group"] and "pt_gloo_runloop" in left["threads"]
