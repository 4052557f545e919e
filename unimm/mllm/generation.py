"""`generate(generation_mode="text" | "image" | "interleaved")`: text and image generation in one method.

In image mode the length is given by the image grid and only the logits of image ids are computed. Conditional and
unconditional rows share one cache and one forward per step (classifier-free guidance, https://arxiv.org/abs/2207.12598),
and equal prompts are prefilled once. The noise of image k is a function of (seed, k) alone, so an image does not depend
on the rest of the batch. B prompts, P distinct ones, R = num_return_sequences, S = B * R sequences, G <= S guided ones,
M image tokens, K codebook size.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.streamers import BaseStreamer

from unimm.errors import UserError
from unimm.mllm.arguments import IMAGE_MODE_IGNORES, check_text_mode, image_mode_arguments
from unimm.mllm.conditions import forced_rows
from unimm.mllm.decoding import Steps, expand_cache, steps_after
from unimm.mllm.drawing import Drawing, check_parallel_tokens, warn
from unimm.mllm.interleaving import Interleaving
from unimm.mllm.text_mode import TextGenerationMixin
from unimm.noise import Noise, per_image_seeds, request_keys
from unimm.sampling import SAMPLING_NAMES, GuidanceScale, ImageSampling


class ImageGenerationMixin(TextGenerationMixin):
    """Mixin that adds image mode to a Hugging Face model whose forward takes `vocabulary="image"` (`unified.py`)."""

    output_modalities = ("image", "text")
    tiles = False
    """Whether the host (the model that the image tokenizer is attached to) tiles images and so needs `image_sizes`."""

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        generation_mode: Literal["text", "image", "interleaved"] | None = "text",
        seed: int | Sequence[int] | None = None,
        **kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """Generate text or images.

        Args:
            inputs: token_ids of the prompts [B, L] (or `input_ids=`), padded on the left; with `attention_mask` [B, L]
                and, if prompts contain images, `pixel_values`.
            generation_mode: "text": transformers' own `generate`; image ids are neither computed nor sampled.
                "image": append the begin marker if it is missing, then generate exactly M image ids; lengths in
                `kwargs` or in the generation config are ignored. "interleaved": text in which the model may open
                images, each of M image ids between the two markers, if it fits into `max_new_tokens` and the context.
            seed: image mode: one number, or one per prompt. Image k of a prompt depends on (seed, k) only; equal
                prompts of one batch count as further images of the first. None takes a fresh seed from torch's
                global generator. Interleaved mode: image k of a row depends on (seed of the row, k) only; text is
                sampled with torch's global generator.
            kwargs: text mode: as in transformers. Image mode: `guidance_scale`, `do_sample`, `temperature`, `top_k`,
                `top_p`, `min_p`, `guidance_interval`, `guidance_schedule` (see `ImageSampling`; defaults come from the
                checkpoint; `guidance_scale=None` is off), `num_return_sequences`, `negative_prompt_ids` and
                `negative_prompt_attention_mask` [1 or B, L'] instead of the checkpoint's null prompt, `streamer`,
                `return_dict_in_generate`, `output_scores`, `output_logits`. `compile=True` compiles a step (a CUDA
                graph on GPUs); the first call includes compilation. `parallel_tokens`: guess this many tokens ahead,
                or "auto", and keep those that one forward confirms; the ids are the same as with 1.
                `forced_token_ids` [B or S, M]: token ids of the image that are kept as they are (`get_image_tokens`,
                or an earlier result), -1 for those to draw: inpainting, outpainting, variations. Tokens are drawn in
                raster order, so a forced one conditions only those after it; runs forced in all rows are read at once.
                Interleaved mode: `max_new_tokens` (None: as many as the context has room for), `image_generation`, a
                dict of `ImageSampling`'s fields, `guidance_scale`, `parallel_tokens`, `pixel_values`, and for text the
                sampling arguments of transformers.

        Returns:
            Text mode: token_ids [B * R, L + new]. Interleaved mode: token_ids [B, L + new], see
            `processor.split_parts`. Image mode: token_ids [S, M], image ids only; with
            `return_dict_in_generate` an output whose `scores` (and `logits`) are M tensors [S, K], after guidance.

        Raises:
            ValueError: if the mode or an argument is unknown, prompts are padded on the right, a prompt leaves no room
                for an image, or a guidance scale is invalid.
        """
        if generation_mode in (None, "text"):
            if seed is not None:
                raise ValueError("seed belongs to image mode; in text mode call torch.manual_seed")
            if self.tiles and kwargs.get("pixel_values") is not None and kwargs.get("image_sizes") is None:
                kwargs["mm_encoder_outputs"] = {"image": self.get_image_features(kwargs.pop("pixel_values"))}
            check_text_mode(generation_config or self.generation_config, kwargs)
            return super().generate(inputs, generation_config, vocabulary="answer", **kwargs)
        if generation_mode == "interleaved":
            return self._interleaved(super().generate, inputs, generation_config, seed=seed, **kwargs)
        if generation_mode != "image":
            raise ValueError(f"generation_mode is {generation_mode!r}; known: text, image, interleaved")
        kwargs = image_mode_arguments(self.generation_config, generation_config, kwargs)
        given = {name: kwargs.pop(name) for name in SAMPLING_NAMES if name in kwargs}
        sampling = ImageSampling.of(generation_config or self.generation_config, **given)
        prompts, kwargs["attention_mask"] = self._prompts(inputs, kwargs)
        return self._draw(prompts, seed=seed, sampling=sampling, **kwargs)

    def _prompts(self, inputs: Tensor | None, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return token ids and mask [B, L] of the prompts; they are removed from `kwargs`."""
        prompts = inputs if inputs is not None else kwargs.pop("input_ids", None)
        if prompts is None:
            raise ValueError("drawing needs the prompts' token ids: give input_ids")
        return prompts, _prompt_mask(prompts, kwargs.pop("attention_mask", None), self.generation_config)

    def _interleaved(
        self,
        write: Callable[..., Any],
        inputs: Tensor | None,
        generation_config: GenerationConfig | None,
        *,
        image_generation: dict[str, Any] | None = None,
        guidance_scale: GuidanceScale = None,
        parallel_tokens: int | Literal["auto"] = 1,
        pixel_values: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Return token_ids [B, L + new] of answers with text and images; see `generate`."""
        check_parallel_tokens(parallel_tokens, compiled=False)
        prompts, mask = (each.to(self.device) for each in self._prompts(inputs, kwargs))
        settings = {**(image_generation or {})} | ({} if guidance_scale is None else {"guidance_scale": guidance_scale})
        if unknown := sorted(settings.keys() - set(SAMPLING_NAMES)):
            raise UserError(f"image_generation holds {', '.join(unknown)}; known: {', '.join(SAMPLING_NAMES)}")
        counts = _images_per_prompt(prompts, pixel_values, self.config.image_token_id, self.config.image_seq_length)
        own = ("seed", "max_new_tokens")
        return Interleaving(
            self,
            write,
            partial(self._draw, parallel_tokens=parallel_tokens),
            prompts,
            mask,
            images=ImageSampling.of(generation_config or self.generation_config, **settings),
            shown=pixel_values,
            counts=counts,
            text={name: value for name, value in kwargs.items() if name not in own},
            generation_config=generation_config,
            **{name: kwargs[name] for name in own if name in kwargs},
        ).run()

    def _draw(
        self,
        prompts: Tensor,
        *,
        attention_mask: Tensor,
        pixel_values: Tensor | None = None,
        sampling: ImageSampling,
        seed: int | Sequence[int] | None = None,
        seeds: list[int] | None = None,
        num_return_sequences: int = 1,
        negative_prompt_ids: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        streamer: BaseStreamer | None = None,
        return_dict_in_generate: bool = False,
        output_scores: bool = False,
        output_logits: bool = False,
        compile: bool = False,
        parallel_tokens: int | Literal["auto"] = 1,
        forced_token_ids: Tensor | None = None,
        **ignored: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """Generate images: prefill the distinct prompts, then sample M image ids per sequence; see `generate`.

        `seeds` are those of the noise, one per sequence, instead of `seed`.
        """
        if unknown := sorted(name for name in ignored if name not in IMAGE_MODE_IGNORES):
            raise ValueError(f"image mode does not know the arguments {', '.join(unknown)}")
        check_parallel_tokens(parallel_tokens, compile)
        if num_return_sequences > 1 and sampling.greedy:
            raise ValueError(
                f"{num_return_sequences} greedy images of a prompt would be equal: set do_sample=True and a "
                "temperature above 0"
            )
        prompts, mask = prompts.to(self.device), attention_mask.to(self.device)
        scales = sampling.scales(len(prompts), self.num_image_tokens)  # [M, B]
        counts = _images_per_prompt(prompts, pixel_values, self.config.image_token_id, self.config.image_seq_length)
        # masked: prompts that differ only in what lies under the mask are equal
        keys = request_keys(prompts * mask, pixel_values, counts)
        forced = forced_rows(
            forced_token_ids, len(prompts), num_return_sequences, self.num_image_tokens, self.visual_vocabulary
        )
        requests = [(key, tuple(row)) for key, row in zip(keys, forced[::num_return_sequences].tolist(), strict=True)]
        seeds = seeds or per_image_seeds(requests, seed, num_return_sequences)
        prompts, mask = _end_with(prompts, mask, self.config.boi_token_id)
        if streamer is not None:
            streamer.put(prompts.cpu())
        # the first row of each distinct prompt
        distinct = list({key: n for n, key in reversed(list(enumerate(keys)))}.values())[::-1]
        places = {keys[n]: place for place, n in enumerate(distinct)}
        sources = torch.tensor([places[key] for key in keys], device=self.device)  # [B], its prefilled row
        rows, row_mask = prompts[distinct], mask[distinct]
        guided = (scales > 0).any(0).nonzero()[:, 0].to(self.device)
        if len(guided):
            negative = self._unconditional_rows(negative_prompt_ids, negative_prompt_attention_mask, len(prompts))
            if len(negative[0]) > 1:
                negative = negative[0][guided], negative[1][guided]
            others = torch.arange(len(guided), device=self.device) % len(negative[0]) + len(rows)
            rows, row_mask = _stacked(rows, row_mask, *negative, self.config.boi_token_id)
            sources = torch.cat([sources, others])
        sources = sources.repeat_interleave(num_return_sequences)  # [S + G]
        self._check_room(rows.shape[1])
        images = self._encoded_images(pixel_values, counts, distinct)
        logits, steps = self._read_prompts(rows, row_mask, sources, images, compile)
        noise = None if sampling.greedy else Noise(seeds, self.visual_vocabulary.size, logits.device)
        scales = scales.repeat_interleave(num_return_sequences, 1)  # [M, S]
        base = self.visual_vocabulary.base
        drawing = Drawing(logits, steps, scales, noise, sampling, base, forced, every_step=return_dict_in_generate)
        if parallel_tokens != 1 and not drawing.can_forget:
            warn("one token at a time: this host's cache cannot take back tokens that were guessed wrong")
            parallel_tokens = 1
        kept: dict[str, list[Tensor]] = {"logits": [], "scores": []}
        for raw, warped, token_ids in drawing.run(parallel_tokens):
            if streamer is not None:
                streamer.put(token_ids.cpu())
            if raw is not None and warped is not None and return_dict_in_generate:
                kept["logits"] += [raw] if output_logits else []
                kept["scores"] += [warped] if output_scores else []
        if streamer is not None:
            streamer.end()
        chosen = drawing.chosen.to(prompts)
        if not return_dict_in_generate:
            return chosen
        outputs = {name: tuple(values) or None for name, values in kept.items()}
        return GenerateDecoderOnlyOutput(sequences=chosen, past_key_values=steps.cache, **outputs)

    def _unconditional_rows(self, ids: Tensor | None, mask: Tensor | None, batch_size: int) -> tuple[Tensor, Tensor]:
        """Return token ids and mask [1 or B, L'] of the negative prompt, ending with the begin marker."""
        if ids is None:
            if not self.config.null_prompt:
                raise ValueError("guidance needs a null prompt, this checkpoint has none: give negative_prompt_ids")
            ids = torch.tensor([self.config.null_prompt])
        mask = torch.ones_like(ids) if mask is None else mask
        if len(ids) not in (1, batch_size):
            raise ValueError(f"negative_prompt_ids has {len(ids)} rows, give 1 or one per prompt, {batch_size}")
        if (ids == self.config.image_token_id).any():
            raise ValueError("negative_prompt_ids holds image placeholders; a negative prompt is text")
        return _end_with(ids.to(self.device), mask.to(self.device), self.config.boi_token_id)

    def _read_prompts(
        self, rows: Tensor, mask: Tensor, sources: Tensor, images: dict[str, Any], compiled: bool
    ) -> tuple[Tensor, Steps]:
        """Prefill every distinct prompt [P, L] once; return logits [S + G, K] of the first image token, and the
        decoder of the next ones."""
        cache = DynamicCache(config=self.config.get_text_config())
        first = rows.new_full((len(rows), self.num_image_tokens), self.visual_vocabulary.base)
        whole = self.token_positions(torch.cat([rows, first], 1), torch.cat([mask, torch.ones_like(first)], 1))
        output = self(
            input_ids=rows,
            attention_mask=mask,
            position_ids=whole[..., : rows.shape[1]],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            vocabulary="image",
            **images,
        )
        expand_cache(cache, sources, self.num_image_tokens)
        positions = whole[..., rows.shape[1] :].index_select(-2, sources)
        steps = steps_after(self, cache, mask[sources], positions, compiled, warn)
        return output.logits[sources.to(output.logits.device), -1], steps

    def _encoded_images(self, pixel_values: Tensor | None, counts: list[int], distinct: list[int]) -> dict[str, Any]:
        """Return the projected features of the images in the distinct prompts, in their order."""
        if pixel_values is None:
            return {}
        groups = torch.arange(len(pixel_values)).split(counts)
        shown = pixel_values[torch.cat([groups[n] for n in distinct])]
        features = self.get_image_features(shown.to(self.device, self.dtype), return_dict=True)
        return {"mm_encoder_outputs": {"image": features}}

    def _check_room(self, length: int) -> None:
        context = self.config.get_text_config().max_position_embeddings
        if length + self.num_image_tokens > context:
            raise UserError(
                f"The prompt has {length} tokens and an image {self.num_image_tokens}, together more than the "
                f"{context} that the model reads: give a shorter prompt."
            )


def _stacked(rows: Tensor, mask: Tensor, others: Tensor, other_mask: Tensor, pad: int) -> tuple[Tensor, Tensor]:
    """Concatenate two batches, padded on the left with a masked id `pad`, which must not be the image placeholder."""
    length = max(rows.shape[1], others.shape[1])
    whole = torch.cat([_left_pad(rows, length, pad), _left_pad(others, length, pad)])
    return whole, torch.cat([_left_pad(mask, length, 0), _left_pad(other_mask, length, 0)])


def _prompt_mask(prompts: Tensor, mask: Tensor | None, config: GenerationConfig) -> Tensor:
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


def _images_per_prompt(
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


def _left_pad(rows: Tensor, length: int, value: int) -> Tensor:
    return torch.nn.functional.pad(rows, (length - rows.shape[1], 0), value=value)


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
