"""The face of the package: chosen, sorted, importable, and light."""

import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

import pytest

import unimm

HEAVY = (
    "bitsandbytes",
    "datasets",
    "fastapi",
    "gradio",
    "lmms_eval",
    "peft",
    "tensorboard",
    "torch",
    "torchvision",
    "transformers",
    "trl",
    "unimm.training",
)


FRESH = """
import json, sys
import unimm
loaded = {"unimm": sorted(sys.modules)}
import unimm.cli
loaded["unimm.cli"] = sorted(sys.modules)
print(json.dumps({"loaded": loaded}))
"""


@pytest.fixture(scope="module")
def fresh() -> dict[str, Any]:
    """What a fresh interpreter finds: modules loaded by `import unimm` and `import unimm.cli`."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True, check=True, env=environment)
    return json.loads(run.stdout.splitlines()[-1])


def test_public_names_are_sorted_and_importable() -> None:
    assert unimm.__all__ == sorted(unimm.__all__)
    for name in unimm.__all__:
        assert getattr(unimm, name) is not None
    assert set(unimm.__all__) <= set(dir(unimm))


def test_unknown_name_says_what_is_public() -> None:
    with pytest.raises(AttributeError, match="no attribute 'lode'.*attach, load"):
        unimm.lode  # noqa: B018


@pytest.mark.slow
@pytest.mark.parametrize("module", ["unimm", "unimm.cli"])
def test_import_is_light(module: str, fresh: dict[str, Any]) -> None:
    assert not set(HEAVY) & set(fresh["loaded"][module])


def test_heavy_names_are_spelt_right() -> None:
    """A misspelt name in HEAVY would never be found in sys.modules."""
    for name in ("datasets", "peft", "tensorboard", "torch", "transformers", "trl", "unimm.training"):
        assert importlib.util.find_spec(name) is not None, name
