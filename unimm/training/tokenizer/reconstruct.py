"""The forward pass of tokenizer training: from images to everything that the loss terms need."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unimm.errors import UserError
from unimm.tokenizer import ImageTokenizer, ImageTokenizerOutput
from unimm.training.loop.global_batch import as_mean, mean_over_processes, micro_batch
from unimm.training.loop.rng import preserve_rng_state
from unimm.training.tokenizer.objective import PatchMix, mix_patches


@dataclass
class Window:
    """The micro-batches of one optimizer step.

    Attributes:
        pixel_values: of each micro-batch, [B, 3, H, W].
        codes: of each micro-batch, [B, M, C], if there are several and the patch mix needs them.
        shares: [K], mean usage of the codes over the global batch, if there are several and the entropy loss needs it.
    """

    pixel_values: Sequence[Tensor]
    codes: Sequence[Tensor] = ()
    shares: Tensor | None = None


class Reconstruct(nn.Module):
    """A tokenizer's `reconstruct` as a module's forward, which DDP needs.

    It adds the entropy loss of the codes if a temperature is set, and the latents of a patch mix (CutMix on patches)
    if `forward` receives a seed for it.
    """

    def __init__(self, tokenizer: ImageTokenizer, entropy_temperature: float | None = None) -> None:
        super().__init__()
        self.tokenizer, self.entropy_temperature = tokenizer, entropy_temperature

    def forward(
        self, pixel_values: Tensor, patch_mix_seed: int | None = None, window: Window | None = None
    ) -> tuple[ImageTokenizerOutput, PatchMix | None]:
        """Reconstruct pixel_values [B, 3, H, W]; pass `window` if the step has several micro-batches."""
        tokenizer, window = self.tokenizer, window or Window([pixel_values])
        output = tokenizer.reconstruct(pixel_values)
        if self.entropy_temperature is not None:
            output.entropy_loss = tokenizer.quantizer.entropy(
                output.latents,
                self.entropy_temperature,
                share=lambda own: mean_over_processes(own) if window.shares is None else as_mean(own, window.shares),
            )
        if patch_mix_seed is None:
            return output, None
        mixed, kept = mix_patches(window.pixel_values, cell_size(tokenizer), patch_mix_seed)
        latents = tokenizer.latents(*tokenizer.sources(tokenizer.hidden_states(mixed)))
        return output, PatchMix(kept, latents, window.codes or [output.codes.detach()])

    @torch.no_grad()
    def look_ahead(self, window: Window, *, patch_mixes: bool) -> Window:
        """Return the window with the codes and shares that the loss terms need of all its micro-batches.

        A first pass without gradients computes them and leaves the run's random numbers untouched. The window is
        returned unchanged if it has one micro-batch, or if no term needs the others.
        """
        count = len(window.pixel_values)
        if count == 1 or not (patch_mixes or self.entropy_temperature is not None):
            return window
        codes, shares = list[Tensor](), list[Tensor]()

        def keep(own: Tensor) -> Tensor:  # a hook into the quantizer's entropy, which returns a loss only
            shares.append(mean_over_processes(own))
            return own

        with preserve_rng_state(window.pixel_values[0].device):
            for index, pixel_values in enumerate(window.pixel_values):
                with micro_batch(index, count):
                    output = self.tokenizer.encode(pixel_values)
                    codes.append(output.codes)
                    if self.entropy_temperature is not None:
                        self.tokenizer.quantizer.entropy(output.latents, self.entropy_temperature, share=keep)
        mean = torch.stack(shares).mean(0) if shares else None
        return Window(window.pixel_values, codes if patch_mixes else (), mean)


def cell_size(tokenizer: ImageTokenizer) -> int:
    """Return the side in pixels of the patch that one image token covers. Raises UserError if it is not an integer."""
    side, rows = tokenizer.config.image_size, tokenizer.config.grid[0]
    if side % rows:
        raise UserError(f"loss.context_weight needs whole fields, and {side} pixels are no multiple of {rows} tokens.")
    return side // rows


def target_pixels(tokenizer: ImageTokenizer, pixel_values: Tensor) -> Tensor:
    """Return the target pixels [B, 3, H, W] in [0, 1], resized if the output size differs from the input size."""
    pixels = tokenizer.denormalize(pixel_values)
    q, p = tokenizer.config.output_size, tokenizer.config.image_size
    if q == p:
        return pixels
    size = [side * q // p for side in pixels.shape[-2:]]
    return F.interpolate(pixels, size=size, mode="bicubic", antialias=True).clamp(0, 1)
