"""Batched image generation for benchmarks, with one seed per prompt or conversation."""

from collections.abc import Mapping, Sequence
from typing import Any, Unpack, cast

import torch
from PIL import Image

from unimm.mllm.answering import Conversation, chat_inputs
from unimm.sampling import SamplingOptions, sampling_options


@torch.inference_mode()
def draw_prompts(
    model: Any,
    processor: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    images_per_prompt: int = 1,
    **sampling: Unpack[SamplingOptions],
) -> list[Image.Image]:
    """Generate `images_per_prompt` images of each prompt, in the order of the prompts.

    Args:
        seeds: one per prompt. The noise depends on nothing else, but the last bit of a matrix product, and now and then
            an image id with it, also depends on the batch: only equal batches return equal images.
        sampling: settings of `ImageSampling` that override the checkpoint's defaults.
    """
    messages: list[Conversation] = [
        [{"role": "user", "content": [{"type": "text", "text": prompt}]}] for prompt in prompts
    ]
    return draw_conversations(model, processor, messages, seeds, images_per_prompt, **sampling)


@torch.inference_mode()
def draw_conversations(
    model: Any,
    processor: Any,
    messages: Sequence[Conversation],
    seeds: Sequence[int],
    images_per_prompt: int = 1,
    **sampling: Any,
) -> list[Image.Image]:
    """Generate images as answers to conversations, which may show images; see `draw_prompts`."""
    token_ids = model.generate(
        **chat_inputs(model, processor, messages),
        generation_mode="image",
        num_return_sequences=images_per_prompt,
        seed=list(seeds),
        **sampling_options(cast(Mapping[str, Any], sampling)),
    )
    return list(processor.post_process_multimodal_output(model.decode_image_tokens(token_ids), generation_mode="image"))
