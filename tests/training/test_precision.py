"""Precision `auto`: bfloat16 where the device multiplies it fast, float32 elsewhere, said once; else a warning."""

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.conftest import ROOT
from tests.training.language_model.test_trainer import build
from tests.training.loop.test_run import recipe
from tests.training.tokenizer.test_trainer import trainer as tokenizer_trainer
from unimm import bfloat16
from unimm.bfloat16 import automatic_dtype, slowdown, training_device
from unimm.config.loading import load_config
from unimm.data.mixture import FlowConfig
from unimm.training.language_model.adapters import LoraSettings
from unimm.training.loop.arguments import HostTrainingArguments, TokenizerTrainingConfig
from unimm.training.loop.run import open_run

pytestmark = pytest.mark.usefixtures("fresh_accelerator")
CPU = torch.device("cpu")
VERB = {True: "multiplies", False: "does not multiply"}
REAL = bfloat16.multiplies_bfloat16  # before any test patches it


@pytest.fixture(params=[True, False], ids=["fast", "slow"])
def fast(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(bfloat16, "multiplies_bfloat16", lambda device: request.param)
    return request.param


def test_auto_is_the_default_and_follows_the_device(tmp_path: Path, fast: bool) -> None:
    host = HostTrainingArguments(str(tmp_path), max_steps=1)
    tokenizer = TokenizerTrainingConfig(str(tmp_path))
    assert host.bf16 is fast and tokenizer.mixed_precision == ("bf16" if fast else "no")
    assert LoraSettings().dtype == ("bfloat16" if fast else "float32")
    assert host.precision == tokenizer.precision
    assert host.precision.automatic and host.precision.name == ("bfloat16" if fast else "float32")


@pytest.mark.parametrize("given", [True, False])
def test_what_is_asked_for_is_done(given: bool, tmp_path: Path, fast: bool) -> None:
    assert HostTrainingArguments(str(tmp_path), max_steps=1, bf16=given).bf16 is given
    precision = "bf16" if given else "no"
    assert TokenizerTrainingConfig(str(tmp_path), mixed_precision=precision).mixed_precision == precision
    assert LoraSettings(dtype="bfloat16").dtype == "bfloat16"


def test_float16_leaves_nothing_to_choose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bfloat16, "multiplies_bfloat16", lambda device: True)
    monkeypatch.setattr("transformers.TrainingArguments.__post_init__", lambda self: None)  # which wants a GPU for it
    arguments = HostTrainingArguments(str(tmp_path), max_steps=1, fp16=True)
    assert arguments.bf16 is False and arguments.precision.name == "float16"


def test_the_cpu_is_asked_for_its_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bfloat16, "multiplies_bfloat16", REAL)
    for fast in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda fast=fast: fast)
        assert automatic_dtype(CPU) == (torch.bfloat16 if fast else torch.float32)
    for capability, dtype in {(7, 5): torch.float32, (8, 0): torch.bfloat16, (9, 0): torch.bfloat16}.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert automatic_dtype(torch.device("cuda")) == dtype
    assert automatic_dtype(torch.device("meta")) == torch.float32


def test_the_device_is_the_one_that_accelerate_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    assert training_device().type == "cuda" and training_device(use_cpu=True).type == "cpu"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert training_device().type == "cpu"


def test_a_run_says_its_precision_once(
    tmp_path: Path, fast: bool, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with open_run(recipe(tmp_path), samples_per_step=4):
        pass
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("precision")]
    assert said == [f"precision {'bfloat16' if fast else 'float32'} (auto: this CPU {VERB[fast]} bfloat16 fast)"]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_bfloat16_on_a_slow_device_warns_with_the_measured_ratio(
    tmp_path: Path, fast: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bfloat16, "slowdown", lambda device: 70.04)
    with open_run(recipe(tmp_path, mixed_precision="bf16"), samples_per_step=4):
        pass
    found = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(found) == (0 if fast else 1)
    if not fast:
        assert re.search(r"a product takes 70\.0 times as long as in float32.*auto", found[0])


def test_the_ratio_is_of_two_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that moves by 5 for a product in bfloat16 and by 2 for one in float32."""
    now, original = [0.0], torch.Tensor.__matmul__

    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        now[0] += 5.0 if a.dtype == torch.bfloat16 else 2.0
        return original(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", product)
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    assert slowdown(CPU) == 2.5


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("**/*.yaml")), ids=lambda p: "/".join(p.parts[-2:]))
def test_no_configuration_asks_for_bfloat16_on_every_device(path: Path) -> None:
    if path.parent.name != "accelerate":  # these are for eight GPUs
        assert not re.search(r"bf16: true|mixed_precision: bf16|dtype: bfloat16", path.read_text(encoding="utf-8"))


def test_a_yaml_may_say_auto(tmp_path: Path, fast: bool) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("output_dir: out\nmax_steps: 1\nbf16: auto\n", encoding="utf-8")
    assert load_config(HostTrainingArguments, path).bf16 is fast


@pytest.mark.parametrize("loop", ["tokenizer", "host"])
def test_both_loops_train_in_bfloat16_when_asked(loop: str, tmp_path: Path) -> None:
    """Products are bfloat16, weights stay float32."""
    if loop == "tokenizer":
        trainer: Any = tokenizer_trainer(tmp_path, 1, steps=1, mixed_precision="bf16")
        network = trainer.tokenizer
    else:
        flows = {"talk": FlowConfig("conversation")}
        trainer = build(tmp_path, flows, max_steps=1, bf16=True, report_to=[])
        network = trainer.model
    seen: set[torch.dtype] = set()

    def watch(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(module, nn.Linear) and torch.is_grad_enabled():
            seen.add(output.dtype)

    with nn.modules.module.register_module_forward_hook(watch):
        trainer.train()
    assert torch.bfloat16 in seen
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
