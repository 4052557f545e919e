"""FLOPs by formula against torch's count of the operators; the meter against a clock that we set."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch.utils.flop_counter import FlopCounterMode

from tests.class_conditional.tiny import FIELDS
from tests.tokenizer.conftest import tiny_vqrae
from tests.training.language_model.test_class_conditional_trainer import trainer_in
from tests.training.language_model.test_trainer import BOTH, TALK, build
from tests.training.tokenizer.test_trainer import NO_JUDGE
from unimm.training.loop import throughput
from unimm.training.loop.throughput import Meter, TokenizerCost, Work, peak_flops
from unimm.training.tokenizer.objective import ObjectiveConfig, TokenizerObjective
from unimm.training.tokenizer.parameters import set_trainable, train_projector_only

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


def counted(loss_of: object) -> int:
    """Operators of a forward and a backward pass."""
    with FlopCounterMode(display=False) as counter:
        loss_of().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("trains", ["all", "projector"])
def test_a_unified_models_flops_are_those_that_torch_counts(trains: str, tmp_path: Path) -> None:
    trainer = build(tmp_path, BOTH)
    if trains == "projector":
        train_projector_only(trainer.model)
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(8)])
    work = trainer.work_of(batch)
    model = trainer.model.train()
    assert float(work.flops) == pytest.approx(counted(lambda: trainer.compute_loss(model, batch)), rel=0.02)
    texts, drawings = batch["conversation"], batch["drawing"]
    assert int(work.tokens) == int(texts["attention_mask"].sum() + drawings["attention_mask"].sum())
    assert work.images == len(texts["pixel_values"]) + len(drawings["drawn_pixel_values"]) == 8


def test_the_class_conditional_models_flops_are_those_that_torch_counts(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path)
    trainer.model.set_attn_implementation("eager")
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
    expected = counted(lambda: trainer.model.train()(batch["class_labels"], batch["ids"]).loss)
    work = trainer.work_of(batch)
    assert work.flops == pytest.approx(expected, rel=0.02)
    assert (work.images, work.tokens) == (4, 4 * FIELDS["grid"][0] * FIELDS["grid"][1])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_tokenizers_flops_are_those_that_torch_counts(stage: int) -> None:
    model = tiny_vqrae(attn_implementation="eager").train()
    set_trainable(model, stage)
    teacher = torch.zeros(3, 16, 32) if stage == 2 else None
    objective = TokenizerObjective(ObjectiveConfig(perceptual=NO_JUDGE))
    images = torch.randn(3, 3, 32, 32)

    def loss() -> torch.Tensor:
        if stage == 2:
            with torch.no_grad():
                model.hidden_states(images)
        return objective.total(objective.terms(model.reconstruct(images), model.denormalize(images), teacher))

    cost = TokenizerCost.of(model, stage)
    assert cost.training(3) == pytest.approx(counted(loss), rel=0.035)  # the first layer has no gradient to pass on
    assert cost.batch == 2 * 64 * 48 * 48 * (1 if stage == 3 else 2)  # SimVQ's projection of 64 codes of width 48


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", None),
        ("NVIDIA GeForce RTX 4090", 165),
        ("Tesla T4", None),
    ],
)
def test_peaks_are_looked_up_by_the_devices_name(name: str, teraflops: int | None) -> None:
    peak = peak_flops(torch.device("cuda"), name)
    assert peak == (None if teraflops is None else teraflops * 1e12)
    assert peak_flops(torch.device("cpu")) is None


def test_the_meter_divides_by_the_time_of_the_steps_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])
    meter = Meter(Accelerator(cpu=True))
    meter.peak = 1000.0
    for _ in range(2):
        meter.add(Work(images=3, tokens=torch.tensor(50), flops=torch.tensor(400.0)))
        now[0] += 2
    with meter.paused():
        now[0] += 50
    logs = meter.read(samples_seen=6)
    assert (logs["images_per_second"], logs["tokens_per_second"], logs["mfu"]) == pytest.approx((1.5, 25.0, 0.2))
    assert logs["samples_seen"] == 6 and 0.05 < logs["peak_memory_gib"] < 100
    assert set(meter.read(6)) == {"samples_seen", "peak_memory_gib"}


def test_a_run_logs_its_throughput(tmp_path: Path) -> None:
    trainer = build(tmp_path, TALK, max_steps=2, save_strategy="no", logging_steps=1)
    trainer.train()
    first, second = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert (first["samples_seen"], second["samples_seen"]) == (4, 8)
    assert all(entry[name] > 0 for entry in (first, second) for name in ("tokens_per_second", "images_per_second"))
