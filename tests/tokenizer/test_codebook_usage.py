"""Codebook statistics against closed forms and numpy."""

import numpy as np
import pytest
import torch

from unimm.tokenizer.codebook_usage import CodebookUsage


def test_uniform_use() -> None:
    usage = CodebookUsage(8)
    usage.update(torch.arange(4).repeat(5).view(2, 10))
    assert (usage.use, usage.dead) == (0.5, 4)
    assert usage.entropy == pytest.approx(2.0)
    assert usage.perplexity == pytest.approx(4.0)


def test_one_code_only() -> None:
    usage = CodebookUsage(8)
    usage.update(torch.full((3, 4), 7))
    assert (usage.use, usage.dead, usage.entropy, usage.perplexity) == (1 / 8, 7, 0.0, 1.0)


def test_nothing_counted() -> None:
    usage = CodebookUsage(8)
    assert (usage.use, usage.dead, usage.entropy) == (0.0, 8, 0.0)


def test_batches_and_merges_count_as_one_pass() -> None:
    ids = torch.randint(0, 50, (40, 16)) // torch.randint(1, 4, (40, 16))
    parts = [CodebookUsage(64) for _ in range(2)]
    for index, batch in enumerate(ids.split(7)):
        parts[index % 2].update(batch)
    parts[0].merge(parts[1])
    counts = np.bincount(ids.numpy().ravel(), minlength=64)
    shares = counts[counts > 0] / counts.sum()
    assert parts[0].counts.tolist() == counts.tolist()
    assert parts[0].entropy == pytest.approx(-(shares * np.log2(shares)).sum())
    assert parts[0].perplexity == pytest.approx(2 ** -(shares * np.log2(shares)).sum())


@pytest.mark.parametrize("wrong", [-1, 8])
def test_ids_outside_the_codebook_are_refused(wrong: int) -> None:
    with pytest.raises(ValueError, match="the codebook from 0 to 7"):
        CodebookUsage(8).update(torch.tensor([3, wrong]))


def test_codebooks_of_other_sizes_do_not_merge() -> None:
    with pytest.raises(ValueError, match="counts of 9 codes cannot join counts of 8"):
        CodebookUsage(8).merge(CodebookUsage(9))
