"""What a tokenizer's training runs forward: pictures to everything that the objective's terms need."""

from torch import Tensor, nn

from unimm.errors import UserError
from unimm.tokenizer import ImageTokenizer, ImageTokenizerOutput
from unimm.training.global_batch import mean_over_processes
from unimm.training.objective import Collage, make_collage


class Reconstruct(nn.Module):
    """`reconstruct` as a forward, so that DDP sees it, with the entropy of the codes where a temperature is given, and
    the latents of a collage where a seed for one is."""

    def __init__(self, tokenizer: ImageTokenizer, entropy_temperature: float | None = None) -> None:
        super().__init__()
        self.tokenizer, self.entropy_temperature = tokenizer, entropy_temperature

    def forward(
        self, pixel_values: Tensor, collage_seed: int | None = None
    ) -> tuple[ImageTokenizerOutput, Collage | None]:
        tokenizer = self.tokenizer
        output = tokenizer.reconstruct(pixel_values)
        if self.entropy_temperature is not None:
            output.entropy_loss = tokenizer.quantizer.entropy(
                output.latents, self.entropy_temperature, share=mean_over_processes
            )
        if collage_seed is None:
            return output, None
        mixed, kept = make_collage(pixel_values, cell_size(tokenizer), collage_seed)
        latents = tokenizer.latents(*tokenizer.sources(tokenizer.hidden_states(mixed)))
        return output, Collage(kept, latents)


def cell_size(tokenizer: ImageTokenizer) -> int:
    """Pixels a side of the field that one image token stands in. Raises UserError where it is no whole number."""
    side, rows = tokenizer.config.image_size, tokenizer.config.grid[0]
    if side % rows:
        raise UserError(f"loss.context_weight needs whole fields, and {side} pixels are no multiple of {rows} tokens.")
    return side // rows
