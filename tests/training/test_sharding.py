"""FSDP2 in two gloo processes against one process, for a unified model and a tokenizer: training, checkpoints between
different numbers of processes, and the ordinary folder at the end."""

from pathlib import Path

import pytest
import torch

import unimm
from tests.benchmarks.ranks import on_two_ranks
from tests.training.sharded_runs import KINDS, STEPS, Run, host_trainer, in_two
from unimm.errors import UserError
from unimm.training.sharding import check_strategy, load_sharded, refuse_average

slow = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process and two have left."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("sharded")
    for kind in KINDS:
        run = Run(kind).train(0, STEPS)
        run.save(folder / f"{kind}-trained-by-one")
        run.checkpoint(folder / f"{kind}-by-one")
        run.train(STEPS, STEPS + 1).save(folder / f"{kind}-went-on-by-one")
    host_trainer(folder / "trainer-by-one").run()
    on_two_ranks(in_two, folder)
    return folder


def load(path: Path) -> torch.nn.Module:
    return unimm.load(path)[0] if "host" in path.name else unimm.VQRAE.from_pretrained(path)


def assert_equal(one: Path, two: Path) -> None:
    states = [load(path).state_dict() for path in (one, two)]
    averages = [torch.load(path / "ema.pt", weights_only=True) for path in (one, two)]
    assert averages[0]["num_updates"] == averages[1]["num_updates"] > 0
    for a, b in (states, [average["shadow"] for average in averages]):
        assert a.keys() == b.keys() and len(a) > 20
        for name in a:
            torch.testing.assert_close(a[name], b[name], atol=1e-5, rtol=0, msg=lambda text, name=name: name + text)


@slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_sharded_processes_train_as_one(folder: Path, kind: str) -> None:
    assert_equal(folder / f"{kind}-trained-by-one", folder / f"{kind}-trained-by-two")
    moved = load(folder / f"{kind}-trained-by-one").state_dict()
    start = Run(kind).model.state_dict()
    assert max(float((moved[name] - start[name]).abs().max()) for name in start) > 1e-2


@slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_go_on_from_the_checkpoint_of_one(folder: Path, kind: str) -> None:
    one, two = (load(folder / f"{kind}-went-on-by-{count}").state_dict() for count in ("one", "two"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-5, rtol=0)


@slow
@pytest.mark.parametrize("kind", KINDS)
def test_one_process_goes_on_from_the_checkpoint_of_two(folder: Path, kind: str, tmp_path: Path) -> None:
    Run(kind).resume(folder / f"{kind}-by-two").train(STEPS, STEPS + 1).save(tmp_path / f"{kind}-on")
    one, two = (load(path).state_dict() for path in (folder / f"{kind}-went-on-by-one", tmp_path / f"{kind}-on"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-5, rtol=0)


@slow
@pytest.mark.parametrize("run", ["trainer-by-two", "trainer-stopped-by-two"])
def test_accelerates_fsdp2_trains_and_resumes_as_one_process(folder: Path, run: str) -> None:
    """By configs/accelerate/fsdp2.yaml: the saved model, and the average in the checkpoint."""
    one, two = (unimm.load(folder / name)[0].state_dict() for name in ("trainer-by-one", run))
    averages = [
        torch.load(folder / name / "checkpoint-4/ema.pt", weights_only=True)["shadow"]
        for name in ("trainer-by-one", run)
    ]
    for a, b in ((one, two), averages):
        assert a.keys() == b.keys() and len(a) > 20
        for name in a:
            torch.testing.assert_close(a[name], b[name], atol=1e-5, rtol=0)
    assert (folder / run / "checkpoint-4/pytorch_model_fsdp_0").is_dir()
    assert (folder / run / "model.safetensors").stat().st_size == (
        folder / "trainer-by-one/model.safetensors"
    ).stat().st_size


def test_a_broken_sharded_checkpoint_is_refused(tmp_path: Path) -> None:
    run = Run("host")
    with pytest.raises(UserError, match="cannot be read"):
        load_sharded(tmp_path / "absent", run.model, run.optimizer)


def test_what_cannot_be_sharded_is_said_before_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    check_strategy(True, False, sharded_by_trainer=True)
    with pytest.raises(UserError, match=r"trains by DDP: launch recipes/tokenizer\.py"):
        check_strategy(False, True, sharded_by_trainer=False)
    with pytest.raises(UserError, match="^lora needs whole tensors"):
        check_strategy(True, False, sharded_by_trainer=True, whole_only="lora")
    refuse_average(2)
    with pytest.raises(UserError, match="ZeRO-3 takes them apart"):
        refuse_average(3)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(UserError, match="a machine without a GPU, where accelerate would train by DDP instead"):
        check_strategy(False, False, sharded_by_trainer=True)
