"""Prompts of image mode as rows of token ids: their mask, their images, the begin marker, the other sides of guidance.

B prompts, P distinct ones, L tokens, R = num_return_sequences, S = B * R sequences, G <= S guided ones.
"""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from unimm.errors import UserError
from unimm.mllm.guidance import Guidance
from unimm.mllm.prefill import Prompts, stacked


def prompt_mask(prompts: Tensor, mask: Tensor | None, config: GenerationConfig) -> Tensor:
    """Return the mask [B, L] of prompts; if None is given, leading padding tokens are masked.

    Raises:
        UserError: if prompts are not ids [B, L], the mask has another shape, or padding cannot be told from text.
    """
    if prompts.ndim != 2 or not prompts.numel() or prompts.is_floating_point():
        kind = "numbers with a fraction" if prompts.is_floating_point() else "ids"
        raise UserError(
            f"input_ids has the shape {list(prompts.shape)} and holds {kind}: give ids as [prompts, tokens], at least "
            "1 of each."
        )
    if mask is not None:
        if mask.shape != prompts.shape:
            raise UserError(
                f"attention_mask has the shape {list(mask.shape)} and input_ids {list(prompts.shape)}: give one number "
                "per token."
            )
        return mask.bool().to(prompts)
    pad = config.pad_token_id
    padding = torch.zeros_like(prompts, dtype=torch.bool) if pad is None else prompts == pad
    leading = padding.long().cumprod(1)  # [B, L], 1 in the run of padding tokens before a prompt
    counts = leading.sum(1)
    if len(prompts) > 1 and padding[:, -1].any():
        raise UserError("Prompts seem to be padded on the right: pad on the left, or give attention_mask.")
    if pad is not None and pad == config.bos_token_id and counts.any():
        if (counts > 1).any() or not counts.all():
            raise UserError(f"The padding token {pad} also begins prompts: give attention_mask to tell them apart.")
        return torch.ones_like(prompts)
    return 1 - leading


def images_per_prompt(
    prompts: Tensor, pixel_values: Tensor | None, image_token_id: int, tokens_per_image: int
) -> list[int]:
    """Count the images of each prompt [B, L] by its placeholders."""
    placeholders = (prompts == image_token_id).sum(1)
    images = 0 if pixel_values is None else len(pixel_values)
    if (placeholders % tokens_per_image).any() or placeholders.sum() != images * tokens_per_image:
        raise ValueError(
            f"the prompts hold {int(placeholders.sum())} image placeholders, {images} images were given, each of "
            f"{tokens_per_image} placeholders"
        )
    return (placeholders // tokens_per_image).tolist()


def given_prompts(config: Any, token_ids: Tensor, mask: Tensor, counts: Sequence[int]) -> Prompts:
    """Return the prompts [B, L], ending with the begin marker, each with as many images as `counts` says."""
    numbers = [each.tolist() for each in torch.arange(sum(counts)).split(list(counts))]
    return Prompts(*_end_with(token_ids, mask, config.boi_token_id), numbers)


def negative_prompts(config: Any, ids: Tensor | None, mask: Tensor | None, prompts: Prompts) -> Prompts | None:
    """Return the negative prompts [1 or B, L'], or else the null prompt, ending with the begin marker; None if there
    is neither.

    Raises:
        ValueError: if their number is another, or they hold images.
    """
    if ids is None:
        if not config.null_prompt:
            return None
        ids = torch.tensor([config.null_prompt])
    mask = torch.ones_like(ids) if mask is None else mask
    if len(ids) not in (1, len(prompts)):
        raise ValueError(f"negative_prompt_ids has {len(ids)} rows, give 1 or one per prompt, {len(prompts)}")
    if (ids == config.image_token_id).any():
        raise ValueError("negative_prompt_ids holds image placeholders; a negative prompt is text")
    device = prompts.token_ids.device
    return Prompts(*_end_with(ids.to(device), mask.to(device), config.boi_token_id), [[] for _ in ids])


def image_prompts(
    config: Any, generation_config: GenerationConfig, ids: Tensor | None, mask: Tensor | None, prompts: Prompts
) -> Prompts | None:
    """Return the prompts without instructions [B, L'], with the images of `prompts`; None if none are given.

    Raises:
        UserError: if a prompt has another number of images.
    """
    if ids is None:
        return None
    ids = ids.to(prompts.token_ids.device)
    mask = prompt_mask(ids, mask, generation_config).to(ids.device)
    found = [int(n) / config.image_seq_length for n in (ids == config.image_token_id).sum(1)]
    wanted = [len(row) for row in prompts.images]
    if found != wanted:
        raise UserError(
            f"image_prompt_ids holds {', '.join(f'{n:g}' for n in found)} images and the prompts "
            f"{', '.join(map(str, wanted))}: give every prompt with its images, without its instruction."
        )
    return Prompts(*_end_with(ids, mask, config.boi_token_id), prompts.images)


def with_sides(
    prompts: Prompts, keys: Sequence[Hashable], sides: Sequence[Prompts], guidance: Guidance, repeats: int, pad: int
) -> tuple[Prompts, Tensor]:
    """Return the rows to read: the distinct prompts, then the other sides of guidance; and for each row of a step,
    [S + G * sides], which of those it continues.

    Args:
        keys: equal for equal prompts, [B].
        sides: each [1 or as many as there are guided prompts, L'].
        guidance: of the B prompts.
        pad: token id of padding, which must not be the image placeholder.
    """
    own, sources = prompts.distinct(keys)
    places, first = [sources], len(own)
    for side in sides:
        places.append(torch.arange(len(guidance.rows), device=sources.device) % len(side) + first)
        first += len(side)
    return stacked([own, *sides], pad), torch.cat(places).repeat_interleave(repeats)


def _end_with(rows: Tensor, mask: Tensor, token_id: int) -> tuple[Tensor, Tensor]:
    """Append `token_id` to the rows [B, L] that do not end with it, and pad the others on the left by one."""
    if not mask[:, -1].all():
        raise ValueError("prompts must be padded on the left: set padding_side='left'")
    done = rows[:, -1] == token_id
    if done.all():
        return rows, mask
    column = rows.new_full((len(rows), 1), token_id)
    longer = torch.where(done[:, None], torch.cat([column, rows], 1), torch.cat([rows, column], 1))
    one = torch.ones_like(mask[:, :1])
    longer_mask = torch.where(done[:, None], torch.cat([one * 0, mask], 1), torch.cat([mask, one], 1))
    return longer, longer_mask
