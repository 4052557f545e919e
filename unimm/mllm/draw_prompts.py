"""Images of prompts, for a benchmark: as many prompts in a forward as asked for, one seed each."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from unimm.mllm.answering import chat_inputs


@torch.inference_mode()
def draw_prompts(
    model: Any,
    processor: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    images_per_prompt: int = 1,
    **sampling: Any,
) -> list[Image.Image]:
    """`images_per_prompt` images of each prompt, one after the other.

    Args:
        seeds: one per prompt. The noise depends on nothing else; the last bit of a product, and with it now and then
            an image id, depends on the batch too, so equal batches give equal images.
        sampling: `guidance_scale`, `temperature`, `top_k`, `top_p` in place of the checkpoint's own.
    """
    messages = [[{"role": "user", "content": [{"type": "text", "text": prompt}]}] for prompt in prompts]
    token_ids = model.generate(
        **chat_inputs(model, processor, messages),
        generation_mode="image",
        num_return_sequences=images_per_prompt,
        seed=list(seeds),
        **sampling,
    )
    return list(processor.post_process_multimodal_output(model.decode_image_tokens(token_ids), generation_mode="image"))
