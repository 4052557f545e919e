"""Pretraining of a small vision foundation model with SigLIP's sigmoid loss and masked denoising.

A stand-in for a downloaded SigLIP2 if nothing can be downloaded. Captions teach semantics; predicting every patch's
clean pixels from a masked and noisy image keeps position and size in the features, which an image tokenizer needs.
SigLIP: arXiv 2303.15343; masked prediction with one linear layer: SimMIM, arXiv 2111.09886.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import SiglipConfig, SiglipModel

from unimm.config.schema import Decay, NonNegative
from unimm.training.loop.global_batch import (
    all_rows,
    as_summand,
    global_size,
    micro_batch,
    micro_batch_index,
    own_rows,
    process_count,
    process_index,
)
from unimm.training.loop.rng import preserve_rng_state
from unimm.training.loop.stream_trainer import StreamTrainer


@dataclass
class VisionPretrainingConfig:
    """Settings of the losses: `mask_ratio` is the share of masked patches, `noise` the standard deviation of the noise
    on normalized pixels."""

    mask_ratio: Decay = 0.25
    noise: NonNegative = 0.1
    caption_weight: NonNegative = 1.0
    pixel_weight: NonNegative = 1.0


def patchify(pixel_values: Tensor, patch_size: int) -> Tensor:
    """Split images [B, 3, H, W] into patches [B, N, p*p*3] in raster order, layout (row, column, channel)."""
    batch, channels, height, width = pixel_values.shape
    rows, columns = height // patch_size, width // patch_size
    x = pixel_values.reshape(batch, channels, rows, patch_size, columns, patch_size)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, patch_size * patch_size * channels)


@dataclass
class Embeddings:
    """Unit vectors of images and captions of one micro-batch, each [B, D]."""

    images: Tensor
    texts: Tensor


def sigmoid_loss(own: Embeddings, scale: Tensor, bias: Tensor, window: Sequence[Embeddings] | None = None) -> Tensor:
    """Compute SigLIP's loss (algorithm 1) of every image against every caption of the global batch.

    `window` holds the embeddings of all micro-batches of this process, if there are several. Each micro-batch computes
    the loss over all of them, with gradients to its own rows only.
    """
    known = list(window or [own])
    index = micro_batch_index()
    known[index] = Embeddings(as_summand(own.images), as_summand(own.texts))
    images = torch.cat([part.images for part in known])
    texts = torch.cat([all_rows(part.texts) for part in known])
    logits = images @ texts.t() * scale.exp() + bias  # [k * B, k * P * B]
    rows = torch.arange(len(texts), device=logits.device).chunk(len(known) * process_count())
    matching = torch.cat(rows[process_index() :: process_count()])  # the caption of each image
    sign = 2 * F.one_hot(matching, len(texts)) - 1
    return -F.logsigmoid(sign * logits).sum() / len(logits)


class VisionPretraining(nn.Module):
    """SigLIP (`self.siglip`, which a run saves) with a linear pixel head that is discarded after pretraining."""

    def __init__(self, siglip_config: SiglipConfig, config: VisionPretrainingConfig, attn_implementation: str) -> None:
        super().__init__()
        self.settings = config
        self.siglip = SiglipModel._from_config(siglip_config, attn_implementation=attn_implementation)
        nn.init.constant_(self.siglip.logit_scale, math.log(10.0))  # SigLIP, section 3.2
        nn.init.constant_(self.siglip.logit_bias, -10.0)
        vision = siglip_config.vision_config
        self.patch_size = vision.patch_size
        self.pixel_head = nn.Linear(vision.hidden_size, 3 * vision.patch_size**2)

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, seed: int, window: Sequence[Embeddings] | None = None
    ) -> dict[str, Tensor]:
        """Compute the losses of pixel_values [B, 3, H, W] and input_ids [B, L], padded to one length; `seed` is for the
        step's masks and noise, `window` as in `sigmoid_loss`."""
        own, hidden_states = self._embed(pixel_values, input_ids, seed)
        caption = sigmoid_loss(own, self.siglip.logit_scale, self.siglip.logit_bias, window)
        predicted = self.pixel_head(hidden_states).float()
        pixel = F.mse_loss(predicted, patchify(pixel_values, self.patch_size))
        loss = self.settings.caption_weight * caption + self.settings.pixel_weight * pixel
        return {"loss": loss, "caption_loss": caption.detach(), "pixel_loss": pixel.detach()}

    def embed(self, pixel_values: Tensor, input_ids: Tensor, seed: int) -> Embeddings:
        """Return the embeddings of a micro-batch, corrupted as in `forward`."""
        return self._embed(pixel_values, input_ids, seed)[0]

    def _embed(self, pixel_values: Tensor, input_ids: Tensor, seed: int) -> tuple[Embeddings, Tensor]:
        vision = self.siglip.vision_model(self.corrupt(pixel_values, seed), output_hidden_states=True)
        text = self.siglip.text_model(input_ids=input_ids)
        images, texts = (F.normalize(half.pooler_output.float(), dim=-1) for half in (vision, text))
        return Embeddings(images, texts), vision.hidden_states[-1]

    def corrupt(self, pixel_values: Tensor, seed: int) -> Tensor:
        """Add noise to pixel_values [B, 3, H, W] and set `mask_ratio` of the patches to zero (normalized mid-gray)."""
        batch, _, height, width = pixel_values.shape
        rows, columns = height // self.patch_size, width // self.patch_size
        every, device = global_size(batch), pixel_values.device  # all processes and micro-batches sample alike
        generator = torch.Generator(device).manual_seed(seed)
        hidden = own_rows(torch.rand(every, 1, rows, columns, device=device, generator=generator))
        noise = own_rows(torch.randn(every, *pixel_values.shape[1:], device=device, generator=generator))
        kept = (hidden >= self.settings.mask_ratio).float()
        kept = kept.repeat_interleave(self.patch_size, -1).repeat_interleave(self.patch_size, -2)
        return (pixel_values + self.settings.noise * noise) * kept


class VisionPretrainingTrainer(StreamTrainer):
    """A `StreamTrainer` whose micro-batches contrast with the embeddings of the whole step."""

    _embeddings: list[Embeddings] | None = None

    def get_batch_samples(self, *args: Any) -> tuple[list[Any], Any]:
        """Return StreamTrainer's micro-batches, and drop the embeddings of the previous step."""
        self._embeddings = None
        return super().get_batch_samples(*args)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **options: Any) -> Any:
        """Compute Trainer's loss, with every image against the captions of the whole step."""
        seed = (self.args.seed << 32) + self.state.global_step
        if self._embeddings is None and len(self.window) > 1:
            self._embeddings = self._look_ahead(seed)
        return super().compute_loss(model, {**inputs, "seed": seed, "window": self._embeddings}, *args, **options)

    @torch.no_grad()
    def _look_ahead(self, seed: int) -> list[Embeddings]:
        """Compute the embeddings of every micro-batch in a first pass that leaves the run's random state untouched."""
        found, model = [], self.accelerator.unwrap_model(self.model)
        with preserve_rng_state(self.args.device):
            for index, inputs in enumerate(self.window):
                with micro_batch(index, len(self.window)):
                    found.append(model.embed(**self._prepare_inputs(inputs), seed=seed))
        return found
