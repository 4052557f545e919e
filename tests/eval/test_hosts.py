"""The table of hosts and encoders: two pairs here, all of them by `python eval/hosts.py`."""

import pytest

from eval.hosts import try_pairs
from unimm.testing.hosts import ENCODER_FAMILIES, HOST_FAMILIES

HOSTS = ("qwen3", "llava_next")


@pytest.mark.slow
def test_every_promise_of_a_pair(tmp_path):
    rows = list(try_pairs(HOSTS, ("clip_vision_model",), tmp_path))
    assert [(row.pop("host"), row.pop("own_encoder")) for row in rows] == [("qwen3", False), ("llava_next", True)]
    for row in rows:
        assert row.pop("encoder") == "clip_vision_model"
        assert row.pop("any_to_any") in (True, "needs torchvision")
        assert len(row) == 11 and all(value is True for value in row.values()), row


def test_all_families_are_there():
    assert len(HOST_FAMILIES) == 24 and len(ENCODER_FAMILIES) == 6
