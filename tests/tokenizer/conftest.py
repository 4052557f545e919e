"""Tiny tokenizers from the real configuration classes: 32 px, patch 8, 16 patches, 64 codes of width 48.

VFMTok has 9 anchors, so that nothing can take its ids for patches, and pixel tokens of 4 px on a grid of 8 x 8.
"""

from typing import Any

import pytest
import torch

from unimm.tokenizer import TOKENIZERS, VQRAE, ImageTokenizer, VQRAEConfig

ENCODERS: dict[str, dict[str, Any]] = {
    "siglip": {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
    },
    "internvl": {
        "model_type": "internvl_vision",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": [32, 32],
        "patch_size": [8, 8],
        "attention_bias": True,
    },
}
_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
ENCODERS |= {
    "clip": {"model_type": "clip_vision_model", "intermediate_size": 64, **_SIZES},
    "dinov2": {"model_type": "dinov2", "mlp_ratio": 2, **_SIZES},
    "dinov2_with_registers": {
        "model_type": "dinov2_with_registers",
        "mlp_ratio": 2,
        "num_register_tokens": 4,
        **_SIZES,
    },
    "dinov3": {"model_type": "dinov3_vit", "intermediate_size": 64, "num_register_tokens": 4, **_SIZES},
}


def tiny_vqrae(family: str = "siglip", **fields: Any) -> VQRAE:
    torch.manual_seed(0)
    fields = {"codebook_size": 64, "codebook_dim": 48} | fields
    return VQRAE(VQRAEConfig(encoder_config=dict(ENCODERS[family]), **fields)).eval()


SIBLINGS: dict[str, dict[str, Any]] = {
    "vqrae": {},
    "vfmtok": {
        "levels": [1, 2],
        "anchor_grid": 3,
        "width": 32,
        "num_heads": 4,
        "sampler_num_layers": 2,
        "sampler_points": 2,
        "sampler_inner_size": 48,
        "decoder_num_layers": 2,
        "decoder_inner_size": 48,
        "head_channels": 32,
        "head_multipliers": [1, 1, 1],
    },
    "ideal": {
        "shallow_level": 1,
        "deep_level": 2,
        "num_heads": 4,
        "decoder_num_layers": 2,
        "head_channels": 32,
        "head_multipliers": [1, 1, 1, 1],
    },
}


def tiny(kind: str, family: str = "siglip", **fields: Any) -> ImageTokenizer:
    torch.manual_seed(0)
    fields = {"codebook_size": 64, "codebook_dim": 48} | SIBLINGS[kind] | fields
    return TOKENIZERS[kind](TOKENIZERS[kind].config_class(encoder_config=dict(ENCODERS[family]), **fields)).eval()


PAIRS = [("vqrae", family) for family in ENCODERS]
PAIRS += [(kind, family) for kind in ("vfmtok", "ideal") for family in ("siglip", "dinov2_with_registers")]


@pytest.fixture(params=PAIRS, ids="-".join)
def tokenizer(request: pytest.FixtureRequest) -> ImageTokenizer:
    return tiny(*request.param)


@pytest.fixture(params=ENCODERS)
def vqrae(request: pytest.FixtureRequest) -> VQRAE:
    return tiny_vqrae(request.param)


@pytest.fixture
def pixel_values() -> torch.Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
