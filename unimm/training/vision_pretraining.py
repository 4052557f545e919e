"""Pretraining of a small vision foundation model: SigLIP's sigmoid loss beside masked denoising.

The stand-in for a downloaded SigLIP2 where nothing may be downloaded. Captions teach what is there; predicting every
patch's clean pixels from a picture with hidden patches and noise keeps where and how large it is, which a tokenizer
over the features will need.
SigLIP: arXiv 2303.15343; masked prediction with one linear layer: SimMIM, arXiv 2111.09886.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import SiglipConfig, SiglipModel

from unimm.training.global_batch import all_rows, own_rows, process_count
from unimm.typed import Decay, NonNegative


@dataclass
class VisionPretrainingConfig:
    """`mask_ratio` of the patches are hidden; `noise` is the standard deviation on normalised pixels."""

    mask_ratio: Decay = 0.25
    noise: NonNegative = 0.1
    caption_weight: NonNegative = 1.0
    pixel_weight: NonNegative = 1.0


def patchify(pixel_values: Tensor, patch_size: int) -> Tensor:
    """[B, 3, H, W] -> [B, N, p*p*3] in raster order, layout (row, column, channel)."""
    batch, channels, height, width = pixel_values.shape
    rows, columns = height // patch_size, width // patch_size
    x = pixel_values.reshape(batch, channels, rows, patch_size, columns, patch_size)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, patch_size * patch_size * channels)


def sigmoid_loss(image_embeds: Tensor, text_embeds: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Every picture against every caption of the global batch, both [B, D] of this process (SigLIP, algorithm 1)."""
    image_embeds, text_embeds = F.normalize(image_embeds, dim=-1), all_rows(F.normalize(text_embeds, dim=-1))
    logits = image_embeds @ text_embeds.t() * scale.exp() + bias  # [B, P * B]
    sign = 2 * own_rows(torch.eye(len(text_embeds), device=logits.device)) - 1
    return -F.logsigmoid(sign * logits).sum() / len(logits)


class VisionPretraining(nn.Module):
    """SigLIP with a linear pixel head that is thrown away afterwards; `self.siglip` is what a run keeps."""

    def __init__(self, siglip_config: SiglipConfig, config: VisionPretrainingConfig, attn_implementation: str) -> None:
        super().__init__()
        self.settings = config
        self.siglip = SiglipModel._from_config(siglip_config, attn_implementation=attn_implementation)
        nn.init.constant_(self.siglip.logit_scale, math.log(10.0))  # SigLIP, section 3.2
        nn.init.constant_(self.siglip.logit_bias, -10.0)
        vision = siglip_config.vision_config
        self.patch_size = vision.patch_size
        self.pixel_head = nn.Linear(vision.hidden_size, 3 * vision.patch_size**2)

    def forward(self, pixel_values: Tensor, input_ids: Tensor) -> dict[str, Tensor]:
        """pixel_values [B, 3, H, W], input_ids [B, L] padded to one length -> the losses."""
        vision = self.siglip.vision_model(self.corrupt(pixel_values), output_hidden_states=True)
        text = self.siglip.text_model(input_ids=input_ids)
        caption = sigmoid_loss(
            vision.pooler_output.float(), text.pooler_output.float(), self.siglip.logit_scale, self.siglip.logit_bias
        )
        predicted = self.pixel_head(vision.hidden_states[-1]).float()
        pixel = F.mse_loss(predicted, patchify(pixel_values, self.patch_size))
        loss = self.settings.caption_weight * caption + self.settings.pixel_weight * pixel
        return {"loss": loss, "caption_loss": caption.detach(), "pixel_loss": pixel.detach()}

    def corrupt(self, pixel_values: Tensor) -> Tensor:
        """Noise everywhere, and `mask_ratio` of the patches replaced by zero (the normalised middle grey)."""
        batch, _, height, width = pixel_values.shape
        rows, columns = height // self.patch_size, width // self.patch_size
        every = batch * process_count()  # all processes draw the same
        hidden = own_rows(torch.rand(every, 1, rows, columns, device=pixel_values.device))
        noise = own_rows(torch.randn(every, *pixel_values.shape[1:], device=pixel_values.device))
        kept = (hidden >= self.settings.mask_ratio).float()
        kept = kept.repeat_interleave(self.patch_size, -1).repeat_interleave(self.patch_size, -2)
        return (pixel_values + self.settings.noise * noise) * kept
