"""Classifier-free guidance (https://arxiv.org/abs/2207.12598) with one scale, or with one for images and one for text.

Two scales are those of InstructPix2Pix (https://arxiv.org/abs/2211.09800, eq. 3), on logits: e(0, 0)
+ image scale * (e(image, 0) - e(0, 0)) + scale * (e(image, text) - e(image, 0)).
B prompts, S sequences, G <= S guided ones, M image tokens, n of them at once, K codes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from unimm.mllm.prefill import Prompts
from unimm.sampling import ImageSampling


@dataclass
class Guidance:
    """The guidance scales of every token, [M, S], 0 for no guidance; `image_scales` is None with one scale."""

    scales: Tensor
    image_scales: Tensor | None = None

    def __post_init__(self) -> None:
        self.on = self.scales > 0  # [M, S]
        if self.image_scales is not None:
            self.on = self.on | (self.image_scales > 0)
            # one scale that is off is 1 in the formula
            self.scales = torch.where(self.on & (self.scales == 0), 1.0, self.scales)
            self.image_scales = torch.where(self.on & (self.image_scales == 0), 1.0, self.image_scales)
        self.sides = 1 if self.image_scales is None else 2
        self.rows = self.on.any(0).nonzero()[:, 0]  # [G]
        steps = self.on.any(1).nonzero()
        self.last = int(steps[-1]) if len(steps) else -1  # the last guided token
        self.uniform = bool(self.on[: self.last + 1].all())  # every row is guided at every token up to `last`

    def repeated(self, times: int) -> "Guidance":
        """Return the scales of `times` sequences for each prompt."""
        images = None if self.image_scales is None else self.image_scales.repeat_interleave(times, 1)
        return Guidance(self.scales.repeat_interleave(times, 1), images)

    def to(self, logits: Tensor) -> "Guidance":
        """Return the same on the device and in the type of `logits`."""
        return Guidance(self.scales.to(logits), None if self.image_scales is None else self.image_scales.to(logits))

    def at(self, start: int, stop: int) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return what `__call__` needs for the tokens start..stop-1: scale, image scale, and where guidance is on, each
        [G, n, 1] or None; all None after the last guided token."""
        if start > self.last:
            return None, None, None
        images = None if self.image_scales is None else self._of(self.image_scales, start, stop)
        return self._of(self.scales, start, stop), images, None if self.uniform else self._of(self.on, start, stop)

    def _of(self, values: Tensor, start: int, stop: int) -> Tensor:
        """Return the values of some tokens of the guided sequences, [G, n, 1]."""
        return values[start:stop, self.rows].t()[..., None]

    def __call__(self, logits: Tensor, scale: Tensor | None, image_scale: Tensor | None, on: Tensor | None) -> Tensor:
        """Return the guided logits [S, n, K], with what `at` returned for these tokens.

        Args:
            logits: [S + G * sides, n, K]: the sequences, the guided ones without prompt, with two scales also the
                guided ones with their images alone; [S, n, K] after the last guided token.
        """
        size = self.scales.shape[1]
        conditional = logits[:size]
        if scale is None:
            return conditional
        given = conditional if on is None else conditional[self.rows]  # [G, n, K]
        unconditional, *images = logits[size:].chunk(self.sides)
        if image_scale is None:
            pulled = unconditional + scale * (given - unconditional)
        else:
            pulled = unconditional + image_scale * (images[0] - unconditional) + scale * (given - images[0])
        if on is None:
            return pulled
        return conditional.index_copy(0, self.rows, torch.where(on, pulled, given))


def guidance_of(
    sampling: ImageSampling, tokens: int, batch_size: int, negative: Prompts | None, images: Prompts | None
) -> tuple[Guidance, list[Prompts]]:
    """Return the guidance of B prompts, and the prompts of its other sides, each [1 or G, L].

    Args:
        negative: the negative (null) prompts, [1 or B, L].
        images: the prompts with their images and without instructions, [B, L].

    Raises:
        ValueError: if guidance needs a null prompt, and there is none.
    """
    guidance = Guidance(sampling.scales(batch_size, tokens))
    sides = [negative]
    scales = None if images is None else sampling.image_scales(batch_size, tokens)
    if scales is not None and not scales.any():  # an image scale of 1: the images alone take the null prompt's place
        sides = [images]
    elif scales is not None:
        guidance, sides = Guidance(guidance.scales, scales), [negative, images]
    if not len(guidance.rows):
        return guidance, []
    rows = guidance.rows.tolist()
    found: list[Prompts] = []
    for side in sides:
        if side is None:
            raise ValueError("guidance needs a null prompt, this checkpoint has none: give negative_prompt_ids")
        found.append(side if len(side) == 1 else side.rows(rows))
    return guidance, found
