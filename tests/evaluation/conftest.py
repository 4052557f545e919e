"""Tiny models on disk, for what is run by path."""

from pathlib import Path

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model

from tests.mllm.tiny import image_tokenizer, unified
from unimm.tokenizer import ImageTokenizerProcessor


@pytest.fixture(scope="package")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    for part in unified():
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="package")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = image_tokenizer()
    tokenizer.save_pretrained(folder)
    ImageTokenizerProcessor.for_tokenizer(tokenizer.config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="package")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vision encoder that reads 16 pixels a side."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    Dinov2Model(Dinov2Config(**sizes, mlp_ratio=2)).eval().save_pretrained(folder)
    return folder
