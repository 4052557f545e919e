"""FSDP2 in two gloo processes against one process, for a unified model: training, resuming, and the ordinary folder at
the end."""

from pathlib import Path

import pytest
import torch

import unimm
from tests.evaluation.ranks import on_two_ranks
from tests.training.sharded_runs import host_trainer, in_two
from unimm.errors import UserError
from unimm.training.loop.sharding import check_strategy, refuse_average

slow = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process and two have left."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("sharded")
    host_trainer(folder / "trainer-by-one").run()
    on_two_ranks(in_two, folder)
    return folder


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
