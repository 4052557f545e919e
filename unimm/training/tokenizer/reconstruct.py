"""What a tokenizer's training runs forward: images to everything that the objective's terms need."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unimm.errors import UserError
from unimm.tokenizer import ImageTokenizer, ImageTokenizerOutput
from unimm.training.loop.global_batch import as_mean, mean_over_processes, micro_batch
from unimm.training.loop.rng import preserve_rng_state
from unimm.training.tokenizer.objective import PatchMix, mix_patches


@dataclass
class Window:
    """The micro-batches of one optimizer step: their pixel_values, each [B, 3, H, W], and, where there are several and
    a term needs it, the codes [B, M, C] of each and the mean `shares` [K] of the codes over the global batch."""

    pixel_values: Sequence[Tensor]
    codes: Sequence[Tensor] = ()
    shares: Tensor | None = None


class Reconstruct(nn.Module):
    """`reconstruct` as a forward, so that DDP sees it, with the entropy of the codes where a temperature is given, and
    the latents of a collage where a seed for one is."""

    def __init__(self, tokenizer: ImageTokenizer, entropy_temperature: float | None = None) -> None:
        super().__init__()
        self.tokenizer, self.entropy_temperature = tokenizer, entropy_temperature

    def forward(
        self, pixel_values: Tensor, patch_mix_seed: int | None = None, window: Window | None = None
    ) -> tuple[ImageTokenizerOutput, PatchMix | None]:
        """`window` where the step has more micro-batches than this one."""
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
        """The window with what the terms need of its other micro-batches, by a first pass that draws no random number
        of the run; unchanged where there is one micro-batch, or no such term."""
        count = len(window.pixel_values)
        if count == 1 or not (patch_mixes or self.entropy_temperature is not None):
            return window
        codes, shares = list[Tensor](), list[Tensor]()

        def keep(own: Tensor) -> Tensor:
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
    """Pixels a side of the field that one image token stands in. Raises UserError where it is no whole number."""
    side, rows = tokenizer.config.image_size, tokenizer.config.grid[0]
    if side % rows:
        raise UserError(f"loss.context_weight needs whole fields, and {side} pixels are no multiple of {rows} tokens.")
    return side // rows
