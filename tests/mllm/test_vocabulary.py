"""Image ids as arithmetic, the markers, and what growing does to a matrix."""

import pytest
import torch
from transformers import LlavaConfig, Qwen3Config

from tests.mllm import tiny
from unimm.mllm.vocabulary import VisualVocabulary, add_markers, grow_rows, set_vocab_size, visual_base

VOCABULARY = VisualVocabulary(base=384, size=32)


def test_ids_and_token_ids_are_inverse() -> None:
    ids = torch.arange(32).view(2, 16)
    token_ids = VOCABULARY.token_ids(ids)
    assert torch.equal(token_ids, ids + 384)
    assert torch.equal(VOCABULARY.ids(token_ids), ids)
    assert VOCABULARY.contains(torch.tensor([383, 384, 415, 416])).tolist() == [False, True, True, False]
    assert VOCABULARY.end == 416


@pytest.mark.parametrize("values", [[-1], [0, 32]])
def test_ids_out_of_range_are_refused_with_both_numbers(values: list[int]) -> None:
    with pytest.raises(ValueError, match=rf"0\.\.31.*{values[-1]}"):
        VOCABULARY.token_ids(torch.tensor(values))
    with pytest.raises(ValueError, match=r"384\.\.415"):
        VOCABULARY.ids(torch.tensor(values))


@pytest.mark.parametrize(
    ("rows", "tokens", "base"),
    [(301, 294, 384), (320, 320, 384), (128, 104, 192), (104, 128, 192), (151936, 151665, 152000)],
)
def test_base_is_above_everything_with_spare_rows(rows: int, tokens: int, base: int) -> None:
    assert visual_base(rows, tokens) == base
    assert base % 64 == 0 and base - max(rows, tokens) >= 64


def test_markers_are_added_once_and_known_ones_are_reused() -> None:
    tokenizer = tiny.text_tokenizer()
    before = len(tokenizer)
    markers = add_markers(tokenizer)
    assert markers.begin == "<|vision_start|>" and len(tokenizer) == before + 3
    assert add_markers(tokenizer) == markers and len(tokenizer) == before + 3
    intern = tiny.text_tokenizer(("<img>", "<IMG_CONTEXT>", "</img>"))
    size = len(intern)
    assert add_markers(intern).image == "<IMG_CONTEXT>" and len(intern) == size
    assert len(intern.encode("<IMG_CONTEXT>")) == 1


@pytest.mark.parametrize("row_init", ["random", "mean", "codebook"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_old_rows_stay_bit_for_bit(row_init: str, dtype: torch.dtype) -> None:
    rows, codes = torch.randn(301, 24).to(dtype), torch.randn(32, 8)
    grown = grow_rows(rows, VOCABULARY, row_init=row_init, codes=codes)
    assert grown.shape == (416, 24) and grown.dtype == dtype
    assert torch.equal(grown[:301], rows) and grown.data_ptr() != rows.data_ptr()
    assert torch.equal(grown, grow_rows(rows, VOCABULARY, row_init=row_init, codes=codes))  # seeded


def test_row_init_mean_is_the_mean() -> None:
    rows = torch.randn(301, 24)
    torch.testing.assert_close(grow_rows(rows, VOCABULARY, row_init="mean")[384:], rows.mean(0).expand(32, -1))


def test_row_init_codebook_keeps_distances_and_takes_the_text_norm() -> None:
    rows, codes = 3 * torch.randn(301, 24), torch.randn(32, 8)
    new = grow_rows(rows, VOCABULARY, row_init="codebook", codes=codes)[384:]
    torch.testing.assert_close(new.norm(dim=1).mean(), rows.norm(dim=1).mean())
    ratio = torch.pdist(new) / torch.pdist(codes)
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio))


def test_growing_never_shrinks_and_says_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="500 rows.*384"):
        grow_rows(torch.zeros(500, 4), VOCABULARY)
    with pytest.raises(ValueError, match="'zeros'; known: random, mean, codebook"):
        grow_rows(torch.zeros(300, 4), VOCABULARY, row_init="zeros")
    with pytest.raises(ValueError, match="32 codes, got 31"):
        grow_rows(torch.zeros(300, 4), VOCABULARY, row_init="codebook", codes=torch.zeros(31, 4))


def test_every_nested_vocab_size_follows() -> None:
    config = LlavaConfig(text_config=Qwen3Config(vocab_size=301))
    set_vocab_size(config, old=301, new=416)
    assert config.text_config.vocab_size == 416
