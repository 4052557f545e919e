"""Sample ids from a class-conditional GPT with classifier-free guidance, a KV cache and noise seeded per image.

Conditional and unconditional rows share one cache and one forward per step (classifier-free guidance,
https://arxiv.org/abs/2207.12598), and both continue with the sampled id. Shapes: B images, G <= B guided images,
K codes.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from unimm.errors import UserError
from unimm.noise import Noise, image_seed
from unimm.sampling import ImageSampling


def draw_ids(
    model: Any,
    labels: Tensor,
    sampling: ImageSampling,
    seed: int,
    first_image: int,
    guidance_interval: tuple[int, int] | None,
) -> Tensor:
    """Sample ids [B, M] for class labels [B]; see `ClassConditionalGPT.generate`."""
    config, batch = model.config, len(labels)
    if guidance_interval is not None:
        interval = checked_interval(guidance_interval, config.num_image_tokens)
        sampling = replace(sampling, guidance_interval=interval)
    scales = sampling.scales(batch, config.num_image_tokens).to(labels.device)  # [M, B]
    guided = (scales > 0).any(0).nonzero().flatten()  # [G]
    last = int((scales > 0).any(1).nonzero().max()) if len(guided) else -1  # the last guided step
    noise = None
    if not sampling.greedy:
        seeds = [image_seed(seed, first_image + b) for b in range(batch)]
        noise = Noise(seeds, config.codebook_size, labels.device, config.num_image_tokens)
    warpers, chosen = sampling.warpers(), labels.new_empty(batch, 0)
    cache = DynamicCache(config=config)
    embedded = model.class_embedding(torch.cat([labels, labels.new_full((len(guided),), config.num_classes)]))
    for m in range(config.num_image_tokens):
        logits = model.logits(embedded[:, None], cache)[:, -1]  # [B + G, K]
        given, unconditional = logits[:batch], logits[batch:]
        if m <= last:
            scale = scales[m, guided, None]
            pull = torch.where(scale > 0, unconditional + scale * (given[guided] - unconditional), given[guided])
            given = given.index_copy(0, guided, pull)
        scores = warpers(chosen, given)
        # Gumbel-max: the argmax of scores plus noise is a sample of their softmax.
        ids = (scores if noise is None else scores + noise.step(m).to(scores)).argmax(-1)  # [B]
        chosen = torch.cat([chosen, ids[:, None]], dim=1)
        if m == last:  # later steps need no unconditional rows
            cache.batch_select_indices(torch.arange(batch, device=labels.device))
            guided = guided[:0]
        embedded = model.id_embedding(torch.cat([ids, ids[guided]]))
    return chosen


def checked_interval(interval: tuple[int, int], length: int) -> tuple[int, int]:
    """Return (start, stop) of the guided ids. Raises UserError unless 0 <= start <= stop."""
    start, stop = interval
    if not 0 <= start <= stop:
        raise UserError(f"The guidance interval runs from {start} to {stop}; give 0 <= start <= stop <= {length}.")
    return start, stop
