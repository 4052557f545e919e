"""The quantizers that VQRAE is compared with, against vector-quantize-pytorch and closed forms."""

import pytest
import torch
from vector_quantize_pytorch import SimVQ as TheirSimVQ
from vector_quantize_pytorch import VectorQuantize

from tests.tokenizer.conftest import tiny
from unimm.errors import UserError
from unimm.tokenizer.quantizers import QUANTIZERS, AveragedVQ, PlainVQ, SimVQ

SIZE, WIDTH = 12, 6


def latents(seed: int) -> torch.Tensor:
    return torch.randn(3, 8, WIDTH, generator=torch.Generator().manual_seed(seed))


def test_moving_averages_are_those_of_another_library() -> None:
    ours, theirs = AveragedVQ(SIZE, WIDTH).train(), VectorQuantize(WIDTH, SIZE, decay=AveragedVQ.decay).train()
    theirs._codebook.embed.data.copy_(ours.codebook[None])
    theirs._codebook.embed_avg.data.copy_(ours.codebook[None])
    for step in range(4):
        ids = ours(latents(step)).ids
        assert torch.equal(ids, theirs(latents(step))[1])
    assert torch.allclose(ours.codebook, theirs._codebook.embed[0], atol=1e-6)
    assert torch.allclose(ours.counts, theirs._codebook.cluster_size[0], atol=1e-6)
    assert len(ids.unique()) < SIZE and torch.isfinite(ours.codebook).all()


def test_simvq_is_that_of_another_library() -> None:
    ours, theirs = SimVQ(SIZE, WIDTH), TheirSimVQ(WIDTH, SIZE, rotation_trick=False)
    theirs.frozen_codebook.copy_(ours.codebook)
    theirs.code_transform.load_state_dict(ours.projection.state_dict())
    rows = latents(3).requires_grad_()
    found, (codes, ids, loss) = ours(rows), theirs(rows)
    assert torch.equal(found.ids, ids) and torch.allclose(found.codes, codes, atol=1e-6)
    assert torch.allclose(found.codebook_loss + 0.25 * found.commitment_loss, loss, atol=1e-6)


def test_averages_move_in_training_only_and_restart_with_their_codes() -> None:
    quantizer = AveragedVQ(SIZE, WIDTH)
    before = quantizer.codebook.clone()
    quantizer.eval()(latents(0))
    with torch.no_grad():
        quantizer.train()(latents(0))
    assert torch.equal(quantizer.codebook, before)
    quantizer(latents(0))
    quantizer.move(torch.tensor([3]), torch.full((1, WIDTH), 2.0))
    assert quantizer.codebook[3].tolist() == quantizer.sums[3].tolist() == [2.0] * WIDTH and quantizer.counts[3] == 1


def test_only_chosen_rows_of_the_plain_codebook_learn() -> None:
    quantizer, rows = PlainVQ(SIZE, WIDTH), latents(1)
    found = quantizer(rows)
    found.codebook_loss.backward()
    expected = torch.zeros_like(quantizer.codebook)
    for row, code in zip(rows.flatten(0, 1), found.ids.flatten(), strict=True):
        expected[code] += 2 * (quantizer.codebook[code].detach() - row) / rows.numel()
    assert torch.allclose(quantizer.codebook.grad, expected, atol=1e-6)
    assert int((expected.abs().sum(1) > 0).sum()) == len(found.ids.unique()) < SIZE


@pytest.mark.parametrize("name", QUANTIZERS)
def test_vqrae_is_built_with_each(name: str) -> None:
    tokenizer = tiny("vqrae", quantizer=name)
    assert type(tokenizer.quantizer) is QUANTIZERS[name]
    pixel_values = torch.randn(2, 3, 32, 32)
    quantizer, target = tokenizer.quantizer, latents(2).new_ones(2, tokenizer.config.codebook_dim)
    with torch.no_grad():
        output = tokenizer.reconstruct(pixel_values)
        assert torch.equal(output.pixels.clamp(0, 1), tokenizer.decode(output.ids))
        quantizer.move(torch.tensor([1, 4]), target)
        assert torch.allclose(quantizer.effective_codebook[[1, 4]], quantizer.comparable(target), atol=1e-4)
        quantizer.adopt(codes := quantizer.comparable(torch.randn_like(quantizer.codebook)))
        assert torch.allclose(quantizer.effective_codebook, codes, atol=1e-6)


def test_settings_of_simvq_belong_to_simvq() -> None:
    with pytest.raises(UserError, match="belong to simvq, and the quantizer is vq"):
        tiny("vqrae", quantizer="vq", codebook_bias=True)
