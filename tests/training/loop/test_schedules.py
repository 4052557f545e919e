"""Warm-up and cosine at their fixed points, for one rate and for parameter groups."""

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from unimm.errors import UserError
from unimm.training.loop.schedules import warmup_cosine, warmup_cosine_scheduler


def test_fixed_points() -> None:
    def rate(step: int) -> float:
        return warmup_cosine(step, 100, 20, 4e-4, 1e-4)

    assert rate(0) == 0.0
    assert rate(10) == pytest.approx(2e-4)
    assert rate(20) == pytest.approx(4e-4)
    assert rate(60) == pytest.approx(2.5e-4)  # half way down
    assert rate(40) == pytest.approx(1e-4 + 3e-4 * (2 + 2**0.5) / 4)
    assert rate(100) == rate(1000) == 1e-4
    rates = [rate(step) for step in range(20, 101)]
    assert rates == sorted(rates, reverse=True)


def test_edges() -> None:
    assert warmup_cosine(0, 10, 0, 1.0, 0.0) == 1.0
    assert warmup_cosine(5, 10, 10, 1.0, 0.0) == 0.5
    assert warmup_cosine(10, 10, 10, 1.0, 0.0) == 0.0
    with pytest.raises(UserError, match="11 steps does not fit into 10 steps: set train.warmup_steps"):
        warmup_cosine(0, 10, 11, 1.0, 0.0)


def rates_over_time(shared: bool) -> list[tuple[float, ...]]:
    """VQRAE's stage 2 (Table 7): encoder 1e-5, decoder 1e-4 -> 1e-5."""
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (1e-5, 1e-4)]
    optimizer = torch.optim.AdamW(groups)
    scheduler = warmup_cosine_scheduler(optimizer, total=50, warmup=10, end_lr=1e-5, shared_lr_multiplier=shared)
    assert isinstance(scheduler, LambdaLR)
    rates = []
    for _ in range(51):
        rates.append(tuple(group["lr"] for group in optimizer.param_groups))
        optimizer.step()
        scheduler.step()
    return rates


def test_groups_end_at_their_own_value() -> None:
    rates = rates_over_time(shared=False)
    assert rates[0] == (0.0, 0.0)
    assert rates[10] == pytest.approx((1e-5, 1e-4))
    assert all(encoder == pytest.approx(1e-5) for encoder, _ in rates[10:])
    assert rates[50] == pytest.approx((1e-5, 1e-5))


def test_shared_multiplier_keeps_the_ratio() -> None:
    rates = rates_over_time(shared=True)
    assert rates[10] == pytest.approx((1e-5, 1e-4))
    assert rates[50] == pytest.approx((1e-6, 1e-5))


def test_a_bad_span_is_refused_when_built() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(ValueError, match="5 steps does not fit into 4"):
        warmup_cosine_scheduler(optimizer, total=4, warmup=5, end_lr=0.0)
