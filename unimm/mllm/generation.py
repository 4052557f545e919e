"""`generate(generation_mode="text" | "image")`: one verb for answers and for drawings.

Special here, in image mode: the length comes from the grid and only rows of image ids are computed; conditional and
unconditional rows share one cache and one forward per step (classifier-free guidance,
https://arxiv.org/abs/2207.12598); the noise of image k is a function of (seed, k) alone, so a picture does not
depend on who else is in the batch. B prompts, R = num_return_sequences, S = B * R sequences, G <= S guided ones, M
image tokens, K codebook size.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.streamers import BaseStreamer

from unimm.errors import UserError
from unimm.mllm.arguments import IMAGE_MODE_IGNORES, check_text_mode, image_mode_arguments
from unimm.mllm.text_mode import TextGenerationMixin
from unimm.sampling import (
    SAMPLING_NAMES,
    ImageSampling,
    Noise,
    per_image_seeds,
    per_prompt_scale,
    request_keys,
)


class ImageGenerationMixin(TextGenerationMixin):
    """Adds image mode to a Hugging Face model whose forward takes `vocabulary="image"` (see `unified.py`)."""

    output_modalities = ("image", "text")
    tiles = False
    """Whether the host cuts pictures into tiles, which it then wants to know the `image_sizes` of."""

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        generation_mode: Literal["text", "image"] | None = "text",
        seed: int | Sequence[int] | None = None,
        **kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """Write text, or draw.

        Args:
            inputs: token_ids of the prompts [B, L] (`input_ids=` is the same), padded on the left; with
                `attention_mask` [B, L] and, where prompts hold images, `pixel_values`.
            generation_mode: "text": the library's own `generate`; image ids are neither computed nor chosen.
                "image": the begin marker is appended where it is missing, then exactly M image ids are drawn;
                lengths given in `kwargs` or in the generation config do not matter.
            seed: image mode: one number, or one per prompt. Image k of a prompt depends on (seed, k) only; equal
                prompts of one batch count as further images of the first. None takes a fresh seed from torch's
                global generator.
            kwargs: text mode: as in transformers. Image mode: `guidance_scale`, `do_sample`, `temperature`, `top_k`,
                `top_p` (what is not given comes from the checkpoint; `guidance_scale=None` is off),
                `num_return_sequences`, `negative_prompt_ids` and `negative_prompt_attention_mask` [1 or B, L'] in
                place of the checkpoint's null prompt, `streamer`, `return_dict_in_generate`, `output_scores`,
                `output_logits`.

        Returns:
            Text mode: token_ids [B * R, L + new]. Image mode: token_ids [S, M], image ids only; with
            `return_dict_in_generate` an output whose `scores` (and `logits`) are M tensors [S, K], after guidance.

        Raises:
            ValueError: unknown mode or argument, right padding, a prompt that leaves no room, a scale that means
                nothing.
        """
        if generation_mode in (None, "text"):
            if seed is not None:
                raise ValueError("seed belongs to image mode; in text mode call torch.manual_seed")
            if self.tiles and kwargs.get("pixel_values") is not None and kwargs.get("image_sizes") is None:
                kwargs["mm_encoder_outputs"] = {"image": self.get_image_features(kwargs.pop("pixel_values"))}
            check_text_mode(generation_config or self.generation_config, kwargs)
            return super().generate(inputs, generation_config, vocabulary="answer", **kwargs)
        if generation_mode != "image":
            raise ValueError(f"generation_mode is {generation_mode!r}; known: text, image")
        kwargs = image_mode_arguments(self.generation_config, generation_config, kwargs)
        given = {name: kwargs.pop(name) for name in SAMPLING_NAMES if name in kwargs}
        sampling = ImageSampling.of(generation_config or self.generation_config, **given)
        prompts = inputs if inputs is not None else kwargs.pop("input_ids", None)
        if prompts is None:
            raise ValueError("image mode needs the prompts' token ids: give input_ids")
        kwargs["attention_mask"] = _prompt_mask(prompts, kwargs.get("attention_mask"), self.generation_config)
        return self._draw(prompts, seed=seed, sampling=sampling, **kwargs)

    def _draw(
        self,
        prompts: Tensor,
        *,
        attention_mask: Tensor,
        pixel_values: Tensor | None = None,
        sampling: ImageSampling,
        seed: int | Sequence[int] | None = None,
        num_return_sequences: int = 1,
        negative_prompt_ids: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        streamer: BaseStreamer | None = None,
        return_dict_in_generate: bool = False,
        output_scores: bool = False,
        output_logits: bool = False,
        **ignored: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        if unknown := sorted(name for name in ignored if name not in IMAGE_MODE_IGNORES):
            raise ValueError(f"image mode does not know the arguments {', '.join(unknown)}")
        if num_return_sequences > 1 and sampling.greedy:
            raise ValueError(
                f"{num_return_sequences} greedy pictures of a prompt would be equal: set do_sample=True and a "
                "temperature above 0"
            )
        prompts, mask = prompts.to(self.device), attention_mask.to(self.device)
        scale = per_prompt_scale(sampling.guidance_scale, len(prompts)).to(prompts.device)  # [B]
        counts = _images_per_prompt(prompts, pixel_values, self.config.image_token_id, self.config.image_seq_length)
        seeds = per_image_seeds(request_keys(prompts * mask, pixel_values, counts), seed, num_return_sequences)
        prompts, mask = _end_with(prompts, mask, self.config.boi_token_id)
        scale = scale.repeat_interleave(num_return_sequences)  # [S]
        negative = (negative_prompt_ids, negative_prompt_attention_mask)
        images = self._encoded_images(pixel_values, counts, num_return_sequences)
        rows, mask = self._prefill_rows(prompts, mask, num_return_sequences, scale > 0, negative)
        self._check_room(rows.shape[1])
        if streamer is not None:
            streamer.put(prompts.cpu())
        steps = _ImageSteps(self, rows, mask, scale, images)
        noise = None if sampling.greedy else Noise(seeds, self.visual_vocabulary.size)
        warpers = sampling.warpers()
        scores, logits = [], []
        for step in range(self.num_image_tokens):
            raw = steps.logits()  # [S, K]
            warped = warpers(steps.chosen, raw)
            choice = (warped if noise is None else warped + noise.next().to(warped)).argmax(-1)  # [S]
            steps.choose(self.visual_vocabulary.token_ids(choice))
            if streamer is not None:
                streamer.put(steps.chosen[:, step].cpu())
            if return_dict_in_generate and output_scores:
                scores.append(warped)
            if return_dict_in_generate and output_logits:
                logits.append(raw)
        if streamer is not None:
            streamer.end()
        if not return_dict_in_generate:
            return steps.chosen
        return GenerateDecoderOnlyOutput(
            sequences=steps.chosen,
            scores=tuple(scores) or None,
            logits=tuple(logits) or None,
            past_key_values=steps.cache,
        )

    def _unconditional_rows(self, ids: Tensor | None, mask: Tensor | None, batch_size: int) -> tuple[Tensor, Tensor]:
        """Token ids and mask [B, L'] of what guidance leads away from, ending with the begin marker."""
        if ids is None:
            if not self.config.null_prompt:
                raise ValueError("guidance needs a null prompt, this checkpoint has none: give negative_prompt_ids")
            ids = torch.tensor([self.config.null_prompt])
        mask = torch.ones_like(ids) if mask is None else mask
        if len(ids) not in (1, batch_size):
            raise ValueError(f"negative_prompt_ids has {len(ids)} rows, give 1 or one per prompt, {batch_size}")
        if (ids == self.config.image_token_id).any():
            raise ValueError("negative_prompt_ids holds image placeholders; a negative prompt is text")
        ids, mask = _end_with(ids.to(self.device), mask.to(self.device), self.config.boi_token_id)
        return ids.expand(batch_size, -1), mask.expand(batch_size, -1)

    def _prefill_rows(
        self, prompts: Tensor, mask: Tensor, repeats: int, guided: Tensor, negative: tuple[Tensor | None, Tensor | None]
    ) -> tuple[Tensor, Tensor]:
        """[S + G, L] token ids and mask: the sequences, then the unconditional side of the guided ones."""
        unconditional = self._unconditional_rows(*negative, len(prompts)) if guided.any() else None
        prompts, mask = prompts.repeat_interleave(repeats, 0), mask.repeat_interleave(repeats, 0)
        if unconditional is None:
            return prompts, mask
        other, other_mask = (each.repeat_interleave(repeats, 0)[guided] for each in unconditional)
        length = max(prompts.shape[1], other.shape[1])
        pad = self.config.boi_token_id  # masked: any id that is no image placeholder
        rows = torch.cat([_left_pad(prompts, length, pad), _left_pad(other, length, pad)])
        return rows, torch.cat([_left_pad(mask, length, 0), _left_pad(other_mask, length, 0)])

    def _encoded_images(self, pixel_values: Tensor | None, counts: list[int], repeats: int) -> dict[str, Any]:
        """The images' projected features, encoded once and listed once for every sequence that sees them."""
        if pixel_values is None:
            return {}
        features = self.get_image_features(pixel_values.to(self.device, self.dtype), return_dict=True)
        groups = torch.arange(len(pixel_values)).split(counts)
        projected = [features.pooler_output[i] for group in groups for _ in range(repeats) for i in group]
        as_tensor = isinstance(features.pooler_output, Tensor)  # hosts differ: one tensor, or one per image
        features.pooler_output = torch.stack(projected) if as_tensor else projected
        return {"mm_encoder_outputs": {"image": features}}

    def _check_room(self, length: int) -> None:
        context = self.config.get_text_config().max_position_embeddings
        if length + self.num_image_tokens > context:
            raise UserError(
                f"The prompt has {length} tokens and a picture {self.num_image_tokens}, together more than the "
                f"{context} that the model reads: give a shorter prompt."
            )


class _ImageSteps:
    """The rows on their way through the model: one cache, one forward per step."""

    def __init__(self, model: Any, rows: Tensor, mask: Tensor, scale: Tensor, images: dict[str, Any]) -> None:
        self.model, self.scale, self.guided = model, scale[:, None], scale > 0
        self.cache = DynamicCache(config=model.config.get_text_config())
        self.chosen = rows.new_empty(len(scale), 0)
        self.next_ids, self.mask = rows, mask
        self.rows = rows
        self.first = images

    def logits(self) -> Tensor:
        """Guided logits of the next image id, [S, K] in float32."""
        output = self.model(
            input_ids=self.next_ids,
            attention_mask=self.mask,
            position_ids=self.model.token_positions(self.rows, self.mask)[..., -self.next_ids.shape[1] :],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
            vocabulary="image",
            **self.first,
        )
        self.first = {}
        logits = output.logits[:, -1].float()
        conditional, unconditional = logits[: len(self.scale)], logits[len(self.scale) :]
        if not len(unconditional):
            return conditional
        guided = unconditional + self.scale[self.guided] * (conditional[self.guided] - unconditional)
        return conditional.index_put((self.guided.nonzero()[:, 0],), guided)

    def choose(self, token_ids: Tensor) -> None:
        """Append token_ids [S] to the sequences and to the unconditional side of the guided ones."""
        self.chosen = torch.cat([self.chosen, token_ids[:, None]], dim=1)
        self.next_ids = torch.cat([token_ids, token_ids[self.guided]])[:, None]
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        self.rows = torch.cat([self.rows, self.next_ids], dim=1)


def _prompt_mask(prompts: Tensor, mask: Tensor | None, config: GenerationConfig) -> Tensor:
    """The mask [B, L] of prompts; without one, padding tokens before a prompt count as padding.

    Raises:
        UserError: prompts that are no ids [B, L], a mask of another shape, or padding that cannot be told from text.
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


def _images_per_prompt(
    prompts: Tensor, pixel_values: Tensor | None, image_token_id: int, tokens_per_image: int
) -> list[int]:
    """Images that each prompt [B, L] sees, by its placeholders."""
    placeholders = (prompts == image_token_id).sum(1)
    images = 0 if pixel_values is None else len(pixel_values)
    if (placeholders % tokens_per_image).any() or placeholders.sum() != images * tokens_per_image:
        raise ValueError(
            f"the prompts hold {int(placeholders.sum())} image placeholders, {images} images were given, each of "
            f"{tokens_per_image} placeholders"
        )
    return (placeholders // tokens_per_image).tolist()


def _left_pad(rows: Tensor, length: int, value: int) -> Tensor:
    return torch.nn.functional.pad(rows, (length - rows.shape[1], 0), value=value)


def _end_with(rows: Tensor, mask: Tensor, token_id: int) -> tuple[Tensor, Tensor]:
    """Rows [B, L] and their mask, every row ending with `token_id`; those that did already get one pad more."""
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
