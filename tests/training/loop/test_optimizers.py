"""Muon against torch's own, AdamW untouched beside it, and a state that survives saving."""

import copy

import pytest
import torch
from torch import nn

from unimm.training.loop.optimizers import MuonAdamW, muon_groups, orthogonalized


def test_singular_values_come_near_one():
    torch.manual_seed(0)
    for shape in ((3, 16, 48), (2, 48, 16), (1, 32, 128)):
        values = torch.linalg.svdvals(orthogonalized(torch.randn(shape)).float())
        assert values.min() > 0.4 and values.max() < 1.4


def model() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(16, 48), nn.GELU(), nn.Linear(48, 16), nn.LayerNorm(16))


def run(network: nn.Module, optimizers: list[torch.optim.Optimizer], steps: int, start: int = 0) -> None:
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(step)
        network(torch.randn(256, 16, generator=generator)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def test_it_is_torchs_muon_and_torchs_adamw():
    ours, theirs = model(), model()
    options = {"lr": 1e-2, "weight_decay": 0.1}
    optimizer = MuonAdamW(muon_groups([ours[0], ours[2]], [{"params": ours.parameters()}]), **options)
    matrices = [p for p in theirs.parameters() if p.ndim == 2]
    rest = [p for p in theirs.parameters() if p.ndim != 2]
    reference = [
        torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **options),
        torch.optim.AdamW(rest, **options),
    ]
    run(ours, [optimizer], 1)
    run(theirs, reference, 1)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        # the same polynomial in bfloat16; gradients of full rank, because it blows up the rounding of a null space
        torch.testing.assert_close(mine, other, atol=1e-2 * 0.2 * 48**0.5 * 0.05 if mine.ndim == 2 else 1e-7, rtol=0)


def test_saved_and_loaded_it_goes_on_to_the_bit():
    whole, cut = model(), model()

    def optimizer_of(network: nn.Module) -> MuonAdamW:
        return MuonAdamW(muon_groups(network, [{"params": network.parameters()}]), lr=1e-2)

    run(whole, [optimizer_of(whole)], 6)
    first = optimizer_of(cut)
    run(cut, [first], 3)
    second = optimizer_of(cut)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    run(cut, [second], 3, start=3)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), cut.parameters(), strict=True))


def test_vectors_are_refused():
    with pytest.raises(ValueError, match="matrices only"):
        MuonAdamW([{"params": model().parameters(), "muon": True}])
