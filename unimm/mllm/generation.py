"""`generate(generation_mode="text" | "image" | "interleaved")`: text and image generation in one method.

In image mode the length is given by the image grid and only the logits of image ids are computed. Conditional and
unconditional rows share one cache and one forward per step (classifier-free guidance, https://arxiv.org/abs/2207.12598),
and equal prompts are prefilled once. The noise of image k is a function of (seed, k) alone, so an image does not depend
on the rest of the batch. B prompts, P distinct ones, R = num_return_sequences, S = B * R sequences, G <= S guided ones,
M image tokens, K codebook size.
"""

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.streamers import BaseStreamer

from unimm.errors import UserError
from unimm.mllm.arguments import IMAGE_MODE_IGNORES, check_text_mode, image_mode_arguments
from unimm.mllm.conditions import forced_rows
from unimm.mllm.decoding import Steps, expand_cache, steps_after
from unimm.mllm.drawing import Drawing, check_parallel_tokens, warn
from unimm.mllm.guidance import guidance_of
from unimm.mllm.interleaving import Interleaving
from unimm.mllm.memory import check_memory
from unimm.mllm.prefill import Prompts, read_prompts
from unimm.mllm.prompt_rows import (
    given_prompts,
    image_prompts,
    images_per_prompt,
    negative_prompts,
    prompt_mask,
    with_sides,
)
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
                `negative_prompt_attention_mask` [1 or B, L'] instead of the checkpoint's null prompt,
                `image_guidance_scale` with `image_prompt_ids` and `image_prompt_attention_mask` [B, L'], the prompts
                with their images and without instructions, `streamer`,
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
        if given.get("image_guidance_scale") is not None and kwargs.get("image_prompt_ids") is None:
            raise UserError(
                "image_guidance_scale compares with the images without an instruction: give image_prompt_ids, or call "
                "ChatSession.edit."
            )
        editing = kwargs.get("pixel_values") is not None
        sampling = ImageSampling.of(generation_config or self.generation_config, editing=editing, **given)
        prompts, kwargs["attention_mask"] = self._prompts(inputs, kwargs)
        return self._draw(prompts, seed=seed, sampling=sampling, **kwargs)

    def _prompts(self, inputs: Tensor | None, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return token ids and mask [B, L] of the prompts; they are removed from `kwargs`."""
        prompts = inputs if inputs is not None else kwargs.pop("input_ids", None)
        if prompts is None:
            raise ValueError("drawing needs the prompts' token ids: give input_ids")
        return prompts, prompt_mask(prompts, kwargs.pop("attention_mask", None), self.generation_config)

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
        counts = images_per_prompt(prompts, pixel_values, self.config.image_token_id, self.config.image_seq_length)
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
        image_prompt_ids: Tensor | None = None,
        image_prompt_attention_mask: Tensor | None = None,
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
        _check(ignored, parallel_tokens, compile, num_return_sequences, sampling)
        prompts, mask = prompts.to(self.device), attention_mask.to(self.device)
        counts = images_per_prompt(prompts, pixel_values, self.config.image_token_id, self.config.image_seq_length)
        # masked: prompts that differ only in what lies under the mask are equal
        keys = request_keys(prompts * mask, pixel_values, counts)
        forced = forced_rows(
            forced_token_ids, len(prompts), num_return_sequences, self.num_image_tokens, self.visual_vocabulary
        )
        seeds = seeds or _seeds(keys, forced, seed, num_return_sequences)
        given = given_prompts(self.config, prompts, mask, counts)
        if streamer is not None:
            streamer.put(given.token_ids.cpu())
        negative = negative_prompts(self.config, negative_prompt_ids, negative_prompt_attention_mask, given)
        images = image_prompts(
            self.config, self.generation_config, image_prompt_ids, image_prompt_attention_mask, given
        )
        guidance, sides = guidance_of(sampling, self.num_image_tokens, len(prompts), negative, images)
        rows, sources = with_sides(given, keys, sides, guidance, num_return_sequences, self.config.boi_token_id)
        self._check_room(rows, len(sources), len(forced))
        logits, steps = self._read_prompts(rows, pixel_values, sources, compile)
        size, length = self.visual_vocabulary.size, self.num_image_tokens
        noise = None if sampling.greedy else Noise(seeds, size, logits.device, length)
        base, guidance = self.visual_vocabulary.base, guidance.repeated(num_return_sequences)
        drawing = Drawing(logits, steps, guidance, noise, sampling, base, forced, every_step=return_dict_in_generate)
        asked = {"logits": output_logits, "scores": output_scores} if return_dict_in_generate else {}
        kept = _run(drawing, parallel_tokens, streamer, asked)
        chosen = drawing.chosen.to(prompts)
        if not return_dict_in_generate:
            return chosen
        return GenerateDecoderOnlyOutput(sequences=chosen, past_key_values=steps.cache, **kept)

    def _read_prompts(
        self, prompts: Prompts, pixel_values: Tensor | None, sources: Tensor, compiled: bool
    ) -> tuple[Tensor, Steps]:
        """Read the prompts; return the logits [S + G, K] of the first image token, and the decoder of the next ones."""
        logits, cache, read = read_prompts(self, prompts, pixel_values)
        first = read.token_ids.new_full((len(read), self.num_image_tokens), self.visual_vocabulary.base)
        whole = self.token_positions(
            torch.cat([read.token_ids, first], 1), torch.cat([read.mask, torch.ones_like(first)], 1)
        )
        positions = whole[..., read.token_ids.shape[1] :].index_select(-2, sources)
        expand_cache(cache, sources, self.num_image_tokens)
        steps = steps_after(self, cache, read.mask[sources], positions, compiled, warn)
        return logits[sources.to(logits.device)], steps

    def _check_room(self, rows: Prompts, step_rows: int, sequences: int) -> None:
        """Raise UserError if prompt and image exceed the context, or a step of `step_rows` the memory."""
        context = self.config.get_text_config().max_position_embeddings
        length = rows.token_ids.shape[1]
        if length + self.num_image_tokens > context:
            raise UserError(
                f"The prompt has {length} tokens and an image {self.num_image_tokens}, together more than the "
                f"{context} that the model reads: give a shorter prompt."
            )
        check_memory(self, step_rows, sequences, len(rows) * length, length + self.num_image_tokens)


def _check(
    ignored: dict[str, Any],
    parallel_tokens: int | Literal["auto"],
    compiled: bool,
    repeats: int,
    sampling: ImageSampling,
) -> None:
    """Raise ValueError for arguments that image mode does not know, or that contradict each other."""
    if unknown := sorted(name for name in ignored if name not in IMAGE_MODE_IGNORES):
        raise ValueError(f"image mode does not know the arguments {', '.join(unknown)}")
    check_parallel_tokens(parallel_tokens, compiled)
    if repeats > 1 and sampling.greedy:
        raise ValueError(
            f"{repeats} greedy images of a prompt would be equal: set do_sample=True and a temperature above 0"
        )


def _seeds(keys: Sequence[Hashable], forced: Tensor, seed: int | Sequence[int] | None, repeats: int) -> list[int]:
    """Return the seed of every sequence; prompts with equal keys but other forced tokens are other requests."""
    kept_ids = forced[::repeats].tolist()
    requests: list[Hashable] = [(key, tuple(row)) for key, row in zip(keys, kept_ids, strict=True)]
    return per_image_seeds(requests, seed, repeats)


def _run(
    drawing: Drawing, parallel_tokens: int | Literal["auto"], streamer: BaseStreamer | None, asked: dict[str, bool]
) -> dict[str, tuple[Tensor, ...] | None]:
    """Draw all tokens, and hand them to the streamer; return what is asked for of "logits" and "scores", M tensors
    [S, K] of each."""
    if parallel_tokens != 1 and not drawing.can_forget:
        warn("one token at a time: this host's cache cannot take back tokens that were guessed wrong")
        parallel_tokens = 1
    kept: dict[str, list[Tensor]] = {"logits": [], "scores": []}
    for raw, warped, token_ids in drawing.run(parallel_tokens):
        if streamer is not None:
            streamer.put(token_ids.cpu())
        for name, values in (("logits", raw), ("scores", warped)):
            if values is not None and asked.get(name):
                kept[name].append(values)
    if streamer is not None:
        streamer.end()
    return {name: tuple(values) or None for name, values in kept.items()}
