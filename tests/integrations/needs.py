"""What these tests need, and how programs are started in them."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT


def require_lmms_eval() -> None:
    """Skip the whole module where lmms-eval is not installed."""
    _require("lmms_eval", "lmms-eval")


def require_torch_fidelity() -> None:
    """Skip the whole module where torch-fidelity is not installed."""
    _require("torch_fidelity", "torch-fidelity")


def _require(module: str, name: str) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"needs {name}, which has an environment of its own: make test-lmms", allow_module_level=True)


def run(*arguments: str, cache: Path, ranks: int = 1) -> str:
    """Run a program through the shim, on one thread and offline; its standard output."""
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", "0"]
        command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **offline, "LMMS_EVAL_DATASETS_CACHE": str(cache), "PYTHONPATH": str(ROOT)}
    command += [str(ROOT / "tests/integrations/shim.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cache, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
