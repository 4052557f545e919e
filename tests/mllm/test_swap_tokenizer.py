"""A fine-tuned image tokenizer inside a unified model."""

import pytest
import torch

from tests.mllm import tiny
from unimm.errors import UserError
from unimm.mllm import load
from unimm.mllm.loading import DEFAULT, default_model_path
from unimm.mllm.swap_tokenizer import swap_image_tokenizer
from unimm.tokenizer import VQRAE, VQRAEConfig


def test_ids_and_images_are_the_new_tokenizers_and_nothing_else_moves(tmp_path):
    model, processor = tiny.unified()
    other = tiny.image_tokenizer(seed=5)
    other.save_pretrained(tmp_path / "tokenizer")
    before = {name: value.clone() for name, value in model.state_dict().items() if "vision_tower" not in name}
    swap_image_tokenizer(model, tmp_path / "tokenizer")
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    model, _ = load(tmp_path / "model")
    pixel_values = torch.randn(3, 3, 16, 16)
    ids = other.encode(pixel_values).ids
    token_ids = model.get_image_tokens(pixel_values)
    assert torch.equal(token_ids, model.visual_vocabulary.token_ids(ids))
    assert torch.equal(model.decode_image_tokens(token_ids), other.decode(ids))
    assert not torch.equal(ids, tiny.image_tokenizer().encode(pixel_values).ids)


def test_a_tokenizer_of_another_build_is_refused(tmp_path):
    encoder = tiny.image_tokenizer().config.encoder_config.to_dict()
    VQRAE(VQRAEConfig(encoder_config=encoder, codebook_size=64, codebook_dim=8)).save_pretrained(tmp_path / "wide")
    VQRAE(
        VQRAEConfig(encoder_config=encoder | {"num_hidden_layers": 1}, codebook_size=32, codebook_dim=8)
    ).save_pretrained(tmp_path / "shallow")
    model, _ = tiny.unified()
    with pytest.raises(UserError, match="codebook_size is 64, not 32"):
        swap_image_tokenizer(model, tmp_path / "wide")
    with pytest.raises(UserError, match="encoder_config.num_hidden_layers is 1, not 2"):
        swap_image_tokenizer(model, tmp_path / "shallow")


def test_the_default_has_a_name():
    named, by_path = load(DEFAULT)[0], load(default_model_path())[0]
    assert all(map(torch.equal, named.state_dict().values(), by_path.state_dict().values()))
