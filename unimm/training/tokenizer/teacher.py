"""Self-distillation teacher of stage 2: the encoder as it was before the stage."""

import copy

import torch
from torch import Tensor, nn

from unimm.tokenizer import ImageTokenizer
from unimm.tokenizer.encoders import encode_features, feature_states


class Teacher(nn.Module):
    """A frozen copy of the tokenizer's encoder, which returns its feature layer."""

    def __init__(self, tokenizer: ImageTokenizer) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(tokenizer.encoder)
        self.feature_layer, self.post_norm = tokenizer.config.feature_layer, tokenizer.config.apply_post_norm
        self.layers = tokenizer.config.feature_layers
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> Tensor:
        """Encode pixel_values [B, 3, H, W] to features [B, N, D]."""
        states = encode_features(self.encoder, pixel_values)
        return feature_states(self.encoder, states, self.feature_layer, post_norm=self.post_norm, layers=self.layers)[
            -1
        ]
