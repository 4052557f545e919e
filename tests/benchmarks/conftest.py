"""Tiny models on disk, for what is run by path."""

from pathlib import Path

import pytest

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
