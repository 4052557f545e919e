"""The nearest codes against float64 brute force, where codes lie far apart, next to each other and on one another."""

import pytest
import torch

from unimm.tokenizer.search import nearest_codes

PRECISIONS = pytest.mark.parametrize("low_precision", [False, True], ids=["float32", "bfloat16"])


def brute_force(latents: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """In float64, the differences themselves: no product that could round away what tells two codes apart."""
    distances = (latents.double()[:, None] - codebook.double()[None]).square().sum(dim=2)
    return distances.argmin(dim=1)


@PRECISIONS
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("width", [3, 64, 700])
def test_random_codes(width, scale, low_precision):
    generator = torch.Generator().manual_seed(width)
    latents = torch.randn(60, width, generator=generator) * scale
    codebook = torch.randn(200, width, generator=generator) * scale * width**-0.5
    found = nearest_codes(latents, codebook, low_precision=low_precision)
    assert torch.equal(found, brute_force(latents, codebook))


@PRECISIONS
@pytest.mark.parametrize("gap", [1e-2, 1e-4, 1e-6])
def test_codes_that_nearly_tie(gap, low_precision):
    """Eight copies of every code, each moved a little: bfloat16 and often float32 cannot tell them apart."""
    generator = torch.Generator().manual_seed(1)
    codebook = torch.randn(16, 32, generator=generator).repeat(8, 1)
    codebook += gap * torch.randn(codebook.shape, generator=generator)
    latents = codebook[torch.randint(len(codebook), (100,), generator=generator)] + 0.3 * torch.randn(
        100, 32, generator=generator
    )
    found = nearest_codes(latents, codebook, low_precision=low_precision)
    assert torch.equal(found, brute_force(latents, codebook))


@PRECISIONS
def test_far_from_the_origin(low_precision):
    """Everything lies around one far point: scores are large and their differences tiny."""
    generator = torch.Generator().manual_seed(2)
    centre = 100 * torch.randn(48, generator=generator)
    codebook, latents = (centre + torch.randn(n, 48, generator=generator) for n in (120, 80))
    found = nearest_codes(latents, codebook, low_precision=low_precision)
    assert torch.equal(found, brute_force(latents, codebook))


@PRECISIONS
def test_equal_codes_give_the_lowest_index(low_precision):
    codebook = torch.randn(8, 16, generator=torch.Generator().manual_seed(3)).repeat(3, 1)
    found = nearest_codes(codebook + 1e-3, codebook, low_precision=low_precision)
    assert torch.equal(found, torch.arange(8).repeat(3))
    assert torch.equal(
        nearest_codes(torch.zeros(4, 16), torch.zeros(9, 16), low_precision=low_precision), torch.zeros(4).long()
    )


def test_the_bound_is_what_makes_bfloat16_exact():
    """Without the second look the same search is wrong."""
    generator = torch.Generator().manual_seed(4)
    latents, codebook = torch.randn(200, 64, generator=generator), torch.randn(500, 64, generator=generator)
    scores = codebook.square().sum(1) / 2 - (latents.bfloat16() @ codebook.bfloat16().t()).float()
    right = brute_force(latents, codebook)
    assert (scores.argmin(dim=1) != right).any()
    assert torch.equal(nearest_codes(latents, codebook, low_precision=True), right)


@PRECISIONS
def test_what_is_not_finite_gets_an_id_and_harms_nobody(low_precision):
    generator = torch.Generator().manual_seed(5)
    latents, codebook = torch.randn(6, 16, generator=generator), torch.randn(20, 16, generator=generator)
    expected = brute_force(latents, codebook)
    latents[2], latents[4, 3] = float("nan"), float("inf")
    found = nearest_codes(latents, codebook, low_precision=low_precision)
    assert found.min() >= 0 and found.max() < 20
    assert torch.equal(found[[0, 1, 3, 5]], expected[[0, 1, 3, 5]])


@PRECISIONS
@pytest.mark.parametrize("block", [1, 4 * 50 * 3, 2**26])
def test_blocks_of_any_size_give_the_same(block, low_precision, monkeypatch):
    monkeypatch.setattr("unimm.tokenizer.search.SEARCH_BYTES", block)
    monkeypatch.setattr("unimm.tokenizer.search.PAIR_BYTES", block)
    latents, codebook = torch.randn(4, 25, 24), torch.randn(50, 24)
    found = nearest_codes(latents, codebook, low_precision=low_precision)
    assert torch.equal(found.flatten(), brute_force(latents.flatten(0, 1), codebook))


def test_tf32_is_off_during_a_search(monkeypatch):
    """On a GPU it would round what the bound takes as exact; elsewhere it is as it was."""
    seen, original = [], torch.addmm
    monkeypatch.setattr(
        torch, "addmm", lambda *a, **k: (seen.append(torch.get_float32_matmul_precision()), original(*a, **k))[1]
    )
    torch.set_float32_matmul_precision("high")
    try:
        nearest_codes(torch.randn(5, 8), torch.randn(16, 8))
        assert set(seen) == {"highest"} and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
