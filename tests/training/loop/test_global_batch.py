"""What processes share, by hand: two of them are played one after the other."""

from typing import Any

import pytest
import torch

from unimm.data.shuffling import OwnBatches
from unimm.errors import UserError
from unimm.training.loop import global_batch
from unimm.training.loop.arguments import HostTrainingArguments, accumulation_steps


def test_batches_are_dealt_in_turn_and_together_are_the_stream() -> None:
    dealt = [list(OwnBatches(10, 30, size=3, index=index, count=2)) for index in range(2)]
    assert dealt == [[10, 11, 12, 16, 17, 18, 22, 23, 24], [13, 14, 15, 19, 20, 21, 25, 26, 27]]
    assert list(OwnBatches(4, 12, size=4)) == list(range(4, 12))


def test_alone_everything_is_itself() -> None:
    rows = torch.randn(4, 3, requires_grad=True)
    for function in (global_batch.all_rows, global_batch.own_rows, global_batch.mean_over_processes):
        assert torch.equal(function(rows), rows)
    assert torch.equal(global_batch.rows_before([rows]), rows.roll(1, dims=0))


@pytest.mark.parametrize("processes", [1, 2])
def test_micro_batches_of_processes_are_the_rows_of_one_batch(processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Micro-batch j of process r holds the part j * P + r: the parts in turn are the batch."""
    batch, parts = torch.arange(24.0).view(12, 2), {}
    monkeypatch.setattr(global_batch, "process_count", lambda: processes)
    for rank in range(processes):
        monkeypatch.setattr(global_batch, "process_index", lambda rank=rank: rank)
        for index in range(3):
            with global_batch.micro_batch(index, 3):
                own = global_batch.own_rows(batch)
                parts[index, rank] = own
                assert global_batch.global_size(len(own)) == 12
    assert torch.equal(torch.cat([parts[key] for key in sorted(parts)]), batch)
    if processes == 1:
        window = [parts[index, 0] for index in range(3)]
        before = []
        for index in range(3):
            with global_batch.micro_batch(index, 3):
                before.append(global_batch.rows_before(window))
        assert torch.equal(torch.cat(before), batch.roll(1, dims=0))
    assert global_batch.global_size(5) == 5 * processes  # outside, the batch is the micro-batch


def test_a_summand_weighs_as_much_as_the_whole() -> None:
    """Of (a + b)^2 every micro-batch computes all: the mean of k gradients, each its own part's, is the whole one."""
    a, b = (torch.tensor(value, requires_grad=True) for value in (1.0, 3.0))
    for index, own, other in ((0, a, b), (1, b, a)):
        with global_batch.micro_batch(index, 2):
            loss = (global_batch.as_summand(own) + other.detach()).square()
        assert loss.item() == 16.0
        (loss / 2).backward()
    assert a.grad is not None and b.grad is not None
    assert (a.grad.item(), b.grad.item()) == (8.0, 8.0)


@pytest.mark.parametrize("index", [0, 1])
def test_a_mean_over_processes_has_the_gradient_of_its_own_part(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """DDP averages what the processes find: the mean of both slopes is the slope of (a + b)^2 / 4 at a = 1, b = 3."""

    def all_reduce(value: torch.Tensor) -> None:
        value.fill_(1.0 + 3.0)

    monkeypatch.setattr(global_batch, "process_count", lambda: 2)
    monkeypatch.setattr(global_batch.dist, "all_reduce", all_reduce)
    own = torch.tensor((1.0, 3.0)[index], requires_grad=True)
    loss = global_batch.mean_over_processes(own).square()
    loss.backward()
    assert loss.item() == 4.0 and own.grad is not None
    assert own.grad.item() / 2 == 2.0  # d/da (a + b)^2 / 4 = (a + b) / 2


def test_a_global_batch_gives_the_accumulation_or_is_refused(tmp_path: Any) -> None:
    assert accumulation_steps(1024, 64, 8) == 2
    options = {"max_steps": 1, "per_device_train_batch_size": 4, "use_cpu": True}
    arguments = HostTrainingArguments(str(tmp_path), global_batch_size=12, **options)
    assert (arguments.gradient_accumulation_steps, arguments.samples_per_step) == (3, 12)
    for wrong in ((130, 16, 8), (64, 16, 8)):
        with pytest.raises(UserError, match=rf"is {wrong[0]}, and 8 processes with a batch of 16 take 128"):
            accumulation_steps(*wrong)
