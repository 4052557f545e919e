"""How image ids are chosen: settings, guidance scales, seeds and noise.

Special here: a sample is `argmax(scores + Gumbel noise)`, and the noise of image k is a function of (seed, k) alone, so
a picture does not depend on who else is in the batch.
"""

import hashlib
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from unimm.errors import UserError

GuidanceScale: TypeAlias = float | Sequence[float] | Tensor | None


@dataclass(frozen=True)
class ImageSampling:
    """How image ids are chosen. A checkpoint stores its own defaults in `generation_config.image_generation`.

    `guidance_scale`: None or 0 off, 1 no guidance either, above 1 guided; one number or one per prompt.
    `temperature` 0 is greedy, as is `do_sample=False`.
    `top_k` 0, `top_p` 1 and `min_p` 0 keep every id; `min_p` drops those less probable than this share of the
    likeliest one's probability.
    """

    do_sample: bool = True
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    guidance_scale: GuidanceScale = None

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and self.top_k >= 0 and 0 < self.top_p <= 1 and 0 <= self.min_p < 1):
            raise UserError(
                f"temperature={self.temperature}, top_k={self.top_k}, top_p={self.top_p}, min_p={self.min_p}: "
                "temperature and top_k must be at least 0, top_p above 0 and at most 1, min_p at least 0 and below 1"
            )

    @property
    def greedy(self) -> bool:
        return not self.do_sample or self.temperature == 0

    @classmethod
    def of(cls, generation_config: GenerationConfig, **given: Any) -> "ImageSampling":
        """What the config says of pictures, else what it says at all, overruled by `given`."""
        stored = getattr(generation_config, "image_generation", None)
        if stored is None:
            said = {name: getattr(generation_config, name) for name in SAMPLING_NAMES}
            stored = {name: value for name, value in said.items() if value is not None}
        return replace(cls(), **{**stored, **given})

    def warpers(self) -> LogitsProcessorList:
        """The processors from guided logits to the scores that are sampled; none without sampling."""
        warpers = LogitsProcessorList()
        if self.greedy:
            return warpers
        if self.temperature != 1.0:
            warpers.append(TemperatureLogitsWarper(float(self.temperature)))
        if self.top_k:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1.0:
            warpers.append(TopPLogitsWarper(self.top_p))
        if self.min_p:
            warpers.append(MinPLogitsWarper(self.min_p))
        return warpers


SAMPLED = ImageSampling()
"""Every id by its probability, without guidance."""

SAMPLING_NAMES = tuple(field.name for field in fields(ImageSampling))


class Noise:
    """Gumbel noise, one generator per image; `argmax(scores + noise)` is a sample of softmax(scores)."""

    def __init__(self, seeds: list[int], size: int) -> None:
        # on the CPU, so that every device draws from the same noise
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.size = size

    def next(self) -> Tensor:
        """[S, K]."""
        exponential = [torch.empty(self.size).exponential_(generator=generator) for generator in self.generators]
        return -torch.stack(exponential).clamp_min(torch.finfo(torch.float32).tiny).log()


def per_prompt_scale(scale: GuidanceScale, batch_size: int) -> Tensor:
    """[B] scales, 0 where guidance is off (None, 0, less than 0, exactly 1)."""
    values = torch.as_tensor(0.0 if scale is None else scale, dtype=torch.float32).flatten().cpu()
    if len(values) not in (1, batch_size):
        raise UserError(f"guidance_scale has {len(values)} values, give 1 or one per prompt, {batch_size}")
    meaningless = ~torch.isfinite(values) | ((values > 0) & (values < 1))
    if meaningless.any():
        raise UserError(
            f"guidance_scale is {float(values[meaningless][0]):g}; give 0 or 1 for no guidance, or a number above 1"
        )
    values = values.expand(batch_size)
    return torch.where(values > 1, values, 0.0)


def image_seed(seed: int, k: int) -> int:
    """The seed of image k of a request that was given `seed`."""
    digest = hashlib.sha256(f"{seed}/{k}".encode()).digest()
    return int.from_bytes(digest[:8]) >> 1


def per_image_seeds(requests: list[Hashable], seed: int | Sequence[int] | None, repeats: int) -> list[int]:
    """One seed per sequence, from (seed, k): k counts the images of one request, wherever its rows stand."""
    if seed is None:
        seed = int(torch.randint(2**62, (1,)))
    seeds = [seed] * len(requests) if isinstance(seed, int) else list(seed)
    if len(seeds) != len(requests):
        raise UserError(f"seed has {len(seeds)} values, give 1 or one per prompt, {len(requests)}")
    drawn: Counter[Hashable] = Counter()
    result = []
    for request in zip(seeds, requests, strict=True):
        for _ in range(repeats):
            result.append(image_seed(request[0], drawn[request]))
            drawn[request] += 1
    return result


def request_keys(prompts: Tensor, pixel_values: Tensor | None, counts: list[int]) -> list[Hashable]:
    """One key per prompt [B, L]; prompts with equal text and equal images share it."""
    digests = [b""] * len(prompts)
    if pixel_values is not None:
        images = pixel_values.detach().float().cpu().split(counts)
        digests = [hashlib.sha256(each.numpy().tobytes()).digest() for each in images]
    return list(zip(map(tuple, prompts.tolist()), digests, strict=True))
