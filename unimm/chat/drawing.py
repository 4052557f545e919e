"""A drawing of a conversation, ready to run: its prompt, its settings, and the image tokens that it keeps.

S images, M image tokens.
"""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image
from torch import Tensor

from unimm.chat.history import Exchange
from unimm.chat.turns import check_whole
from unimm.mllm.conditions import image_token_ids, keep_outside, redrawn_cells, redrawn_share
from unimm.mllm.drawing import user_errors
from unimm.mllm.previews import DrawingStreamer, OnImage, OnToken
from unimm.noise import image_seed


@dataclass(frozen=True)
class DrawingPlan:
    """Images to generate; see `ChatSession.draw`.

    Args:
        exchange: the question that they answer.
        inputs: of the model: the prompt.
        forced: token ids [S, M] of a source image that are kept, -1 for those to draw; None draws all.
        sampling: settings of `ImageSampling`.
    """

    exchange: Exchange
    inputs: Mapping[str, Any]
    num_images: int
    seed: int | None
    parallel_tokens: int | Literal["auto"]
    forced: Tensor | None
    sampling: Mapping[str, Any]

    def run(
        self, model: Any, processor: Any, on_token: OnToken | None, on_image: OnImage | None, preview_rows: int | None
    ) -> list[Image.Image]:
        """Generate the images.

        Raises:
            UserError: if a setting is invalid.
        """
        streamer = DrawingStreamer(model, processor, on_token=on_token, on_image=on_image, rows=preview_rows)
        watched = on_token is not None or on_image is not None  # on a GPU reports make every token wait
        with user_errors():
            token_ids = model.generate(
                **self.inputs,
                generation_mode="image",
                num_return_sequences=self.num_images,
                seed=self.seed,
                parallel_tokens=self.parallel_tokens,
                forced_token_ids=self.forced,
                streamer=streamer if watched else None,
                **self.sampling,
            )
        if streamer.images:
            return streamer.images
        images: list[Image.Image] = processor.postprocess(model.decode_image_tokens(token_ids))
        return images


def checked_seed(seed: Any) -> int | None:
    """Return a seed as an int.

    Raises:
        UserError: if it is not a whole number.
    """
    if seed is None:
        return None
    check_whole("seed", seed, "give a whole number")
    return int(seed)


def check_count(num_images: Any) -> None:
    """Raise UserError for an invalid number of images."""
    check_whole("num_images", num_images, "ask for at least 1 image, in whole numbers", least=1)


def kept_share(
    model: Any, processor: Any, image: Image.Image, strength: Any, seed: int | None, num_images: int
) -> tuple[Tensor, int]:
    """Return the forced token ids [S, M] of an image of which a share `strength` is redrawn, chosen by the seed, and
    the seed, a fresh one for None."""
    seed = secrets.randbelow(2**62) if seed is None else seed
    token_ids = image_token_ids(model, processor, image)
    seeds = [image_seed(seed, k) for k in range(num_images)]
    return keep_outside(token_ids, redrawn_share(strength, seeds, token_ids.shape[1])), seed


def kept_outside_mask(model: Any, processor: Any, image: Image.Image, mask: Any) -> Tensor:
    """Return the forced token ids [1, M] of an image that is redrawn where a mask says so."""
    return keep_outside(image_token_ids(model, processor, image), redrawn_cells(model, processor, mask))
