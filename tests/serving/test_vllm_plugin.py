"""The plug-in for vLLM with vLLM's own batch updates; runs in vLLM's environment (docs/export.md)."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

from unimm.serving.vllm_plugin import ImageIds

VOCABULARY = {"text_vocab_size": 3, "image_vocab_start": 5}
TEXT, DRAWING = SamplingParams(), SamplingParams(extra_args={"draw": True})


def plugin(folder: Path) -> ImageIds:
    config: Any = SimpleNamespace(model_config=SimpleNamespace(model=str(folder)))
    return ImageIds(config, torch.device("cpu"), False)


def chosen(processor: ImageIds, rows: int) -> list[list[int]]:
    """The columns of 8 that each row may choose from."""
    return [row.isfinite().nonzero().flatten().tolist() for row in processor.apply(torch.zeros(rows, 8))]


def test_each_request_has_the_rows_of_its_kind_wherever_it_moves(tmp_path: Path) -> None:
    (tmp_path / "image_vocabulary.json").write_text(json.dumps(VOCABULARY))
    processor, text, image = plugin(tmp_path), [0, 1, 2], [5, 6, 7]
    added = [(0, TEXT, None, []), (1, DRAWING, None, []), (2, TEXT, None, [])]
    processor.update_state(BatchUpdate(3, removed=[], added=added, moved=[]))
    assert chosen(processor, 3) == [text, image, text]
    processor.update_state(None)
    assert chosen(processor, 3) == [text, image, text]
    processor.update_state(BatchUpdate(3, removed=[], added=[], moved=[(0, 1, MoveDirectionality.SWAP)]))
    assert chosen(processor, 3) == [image, text, text]
    processor.update_state(BatchUpdate(1, removed=[0], added=[], moved=[(2, 0, MoveDirectionality.UNIDIRECTIONAL)]))
    assert chosen(processor, 1) == [text]


def test_another_model_is_left_alone(tmp_path: Path) -> None:
    processor = plugin(tmp_path)
    processor.update_state(BatchUpdate(1, removed=[], added=[(0, DRAWING, None, [])], moved=[]))
    assert chosen(processor, 1) == [list(range(8))]


def test_guidance_is_refused() -> None:
    ImageIds.validate_params(SamplingParams(extra_args={"draw": True, "guidance_scale": 1}))
    with pytest.raises(ValueError, match="guidance_scale is 3.0, and vLLM draws without guidance"):
        ImageIds.validate_params(SamplingParams(extra_args={"draw": True, "guidance_scale": 3.0}))
