"""The stand-in vision model: SigLIP's loss against the library's, and the corruption of its input."""

import torch
from transformers import SiglipConfig, SiglipModel

from unimm.training.vision_pretraining import VisionPretraining, VisionPretrainingConfig, patchify

VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 50}
TEXT |= {"max_position_embeddings": 8, "projection_size": 32, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}


def build(**settings: float) -> VisionPretraining:
    torch.manual_seed(0)
    return VisionPretraining(
        SiglipConfig(vision_config=VISION, text_config=TEXT), VisionPretrainingConfig(**settings), "eager"
    )


def test_the_caption_loss_is_the_librarys():
    model = build(mask_ratio=0.0, noise=0.0)
    pixel_values, input_ids = torch.randn(5, 3, 32, 32), torch.randint(0, 50, (5, 8))
    ours = model(pixel_values, input_ids, seed=0)
    theirs = model.siglip(pixel_values=pixel_values, input_ids=input_ids, return_loss=True).loss
    torch.testing.assert_close(ours["caption_loss"], theirs.detach())
    assert isinstance(model.siglip, SiglipModel)


def test_corruption_hides_whole_patches():
    model = build(mask_ratio=0.5, noise=0.0)
    pixel_values = torch.randn(8, 3, 32, 32)
    corrupt = patchify(model.corrupt(pixel_values, seed=0), 8)
    hidden = (corrupt == 0).all(-1)
    assert 0.3 < hidden.float().mean() < 0.7
    assert torch.equal(corrupt[~hidden], patchify(pixel_values, 8)[~hidden])


def test_patchify_is_row_column_channel():
    image = torch.arange(3 * 4 * 4, dtype=torch.float32).view(1, 3, 4, 4)
    assert torch.equal(patchify(image, 2)[0, 1], image[0, :, 0:2, 2:4].permute(1, 2, 0).flatten())
