"""Interleaved generation: text, images and text again in one answer.

An answer is a sequence of phases. In a text phase all rows write text until each has written the begin marker of an
image, an end token, or as much as it may; `ImageOpening` hides image ids, and hides the begin marker where an image
would not fit. In an image phase all rows that opened an image draw it together, as image mode does, and the end marker
closes it. Each phase starts with one forward over the sequences so far, in which drawn images are image ids, as in
training: the token ids of an answer are those that the training collator makes of the same turn. B rows, L prompt
tokens, M image tokens, V rows of the vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from unimm.errors import UserError
from unimm.noise import image_seed
from unimm.sampling import ImageSampling, per_prompt_scale

_TEXT_ARGUMENTS = frozenset(
    (
        *("do_sample", "temperature", "top_k", "top_p", "top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"),
        *("repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "sequence_bias"),
        *("renormalize_logits", "remove_invalid_values", "use_cache", "eos_token_id", "pad_token_id"),
    )
)
"""Arguments of text phases, as in transformers."""
_ONE_SEQUENCE = {"num_return_sequences": 1, "num_beams": 1, "min_new_tokens": 0, "return_dict_in_generate": False}


@dataclass
class _Row:
    """One answer: its prompt [L'] without padding, its token ids so far, and how many it may have."""

    prompt: Tensor
    room: int
    seed: int
    answer: list[int] = field(default_factory=list)
    images: int = 0
    done: bool = False


class ImageOpening(LogitsProcessor):
    """Hide what text may not contain: image ids, the placeholder and the end marker, and the begin marker after the
    last token from which a whole image fits.

    Args:
        allowed: rows of the vocabulary that text may contain, [V] bool, with the begin marker.
        begin: id of the begin marker.
        length: tokens of the padded batch before the first new one.
        latest: for each row the number of new tokens after which an image still fits.
    """

    def __init__(self, allowed: Tensor, begin: int, length: int, latest: Sequence[int]) -> None:
        self.hidden, self.begin, self.length = ~allowed, begin, length
        self.latest = torch.tensor(latest, device=allowed.device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores [B, V] with -inf for what is hidden."""
        scores = scores.masked_fill(self.hidden, -torch.inf)
        late = input_ids.shape[1] - self.length > self.latest  # [B]
        scores[:, self.begin] = scores[:, self.begin].masked_fill(late, -torch.inf)
        return scores


class Interleaving:
    """The answers of a batch of prompts [B, L], padded on the left; see `ImageGenerationMixin.generate`.

    Args:
        write: text generation, `generate` of transformers.
        draw: image generation of prompts that end with the begin marker, one seed for each.
        images: how image ids are sampled.
        shown: pixel_values [I, 3, H, W] of the images in the prompts; `counts` of them are in each prompt.
        text: arguments of text phases.
    """

    def __init__(
        self,
        model: Any,
        write: Callable[..., Tensor],
        draw: Callable[..., Tensor],
        prompts: Tensor,
        mask: Tensor,
        *,
        images: ImageSampling,
        seed: int | Sequence[int] | None = None,
        max_new_tokens: int | None = None,
        shown: Tensor | None = None,
        counts: list[int],
        text: dict[str, Any],
        generation_config: GenerationConfig | None = None,
    ) -> None:
        self.model, self.config, self.write, self.draw = model, model.config, write, draw
        self.prompts, self.shown, self.counts = prompts, shown, counts
        self.begin, self.end = self.config.boi_token_id, self.config.eoi_token_id
        self.image_length = model.num_image_tokens + 2
        self._check(max_new_tokens, text)
        self.images, self.scales = images, per_prompt_scale(images.guidance_scale, len(prompts))
        self.text, self.generation_config = dict(text), generation_config
        stored = generation_config or model.generation_config
        ends = self.text.pop("eos_token_id", stored.eos_token_id)
        self.ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        pads = (self.text.pop("pad_token_id", None), stored.pad_token_id, *self.ends, 0)
        self.pad = next(each for each in pads if each is not None)
        context = self.config.get_text_config().max_position_embeddings
        self.rows: list[_Row] = []
        for prompt, seen, own in zip(prompts, mask.bool(), _seeds(seed, len(prompts)), strict=True):
            room = context - int(seen.sum())
            self.rows.append(_Row(prompt[seen], min(room, max_new_tokens or room), own, done=room <= 0))
        self.allowed = torch.zeros(model.visual_vocabulary.end, dtype=torch.bool, device=prompts.device)
        self.allowed[: self.config.text_vocab_size] = True
        self.allowed[[self.end, self.config.image_token_id]] = False
        self.allowed[self.begin] = True  # an added marker lies above the rows of text

    def _check(self, max_new_tokens: int | None, text: dict[str, Any]) -> None:
        if self.begin is None or self.end is None:
            raise UserError(
                "This model has no tokens that begin and end an image, so it cannot write images between text: attach "
                "its image tokenizer again, or use generation_mode 'text' or 'image'."
            )
        if (self.prompts[:, -1] == self.begin).any():
            raise UserError("A prompt ends with the begin marker of an image: use generation_mode='image'.")
        if unknown := sorted(text.keys() - _TEXT_ARGUMENTS):
            raise UserError(f"interleaved mode does not take {', '.join(unknown)}")
        if max_new_tokens is not None and max_new_tokens < self.image_length:
            raise UserError(
                f"max_new_tokens is {max_new_tokens} and an image takes {self.image_length} tokens with its markers: "
                "raise it, or use generation_mode='text'."
            )

    def run(self) -> Tensor:
        """Return the prompts with their answers, token_ids [B, L + new], padded on the right."""
        while writing := [n for n, row in enumerate(self.rows) if not row.done]:
            self._write(writing)
            if opened := [n for n in writing if not self.rows[n].done]:
                self._draw(opened)
        answers = [row.prompt.new_tensor(row.answer) for row in self.rows]
        return torch.cat([self.prompts, pad_sequence(answers, batch_first=True, padding_value=self.pad)], dim=1)

    def _write(self, numbers: list[int]) -> None:
        """Write text in these rows, up to and including the begin marker of an image; the others are done then."""
        rows = [self.rows[n] for n in numbers]
        token_ids, mask = self._sequences(rows)
        left = [row.room - len(row.answer) for row in rows]
        latest = [room - self.image_length for room in left]
        opening = ImageOpening(self.allowed, self.begin, token_ids.shape[1], latest)
        shown, features = self._pixel_values(numbers), {}
        if shown is not None:
            features = {"mm_encoder_outputs": {"image": self.model.get_image_features(shown, return_dict=True)}}
        written = self.write(
            token_ids,
            self.generation_config,
            attention_mask=mask,
            vocabulary="all",  # processors may look up the image ids of a sequence
            logits_processor=LogitsProcessorList([opening]),
            max_new_tokens=max(left),
            eos_token_id=[*self.ends, self.begin],
            pad_token_id=self.pad,
            **features,
            **_ONE_SEQUENCE,
            **self.text,
        )
        for row, room, new in zip(rows, left, written[:, token_ids.shape[1] :].tolist(), strict=True):
            stops = (n for n, token in enumerate(new[:room], 1) if token == self.begin or token in self.ends)
            new = new[: next(stops, room)]
            row.answer += new
            row.done = new[-1] != self.begin

    def _draw(self, numbers: list[int]) -> None:
        """Draw the image that each of these rows has opened, and close it."""
        rows = [self.rows[n] for n in numbers]
        token_ids, mask = self._sequences(rows)
        drawn = self.draw(
            token_ids,
            attention_mask=mask,
            pixel_values=self._pixel_values(numbers),
            sampling=replace(self.images, guidance_scale=self.scales[numbers]),
            seeds=[image_seed(row.seed, row.images) for row in rows],
        )
        for row, ids in zip(rows, drawn.tolist(), strict=True):
            row.answer += [*ids, self.end]
            row.images += 1
            row.done = len(row.answer) >= row.room

    def _sequences(self, rows: Sequence[_Row]) -> tuple[Tensor, Tensor]:
        """Return token ids and mask [R, T] of prompts and answers so far, padded on the left."""
        sequences = [torch.cat([row.prompt, row.prompt.new_tensor(row.answer)]) for row in rows]
        mask = [torch.ones_like(each) for each in sequences]
        how: dict[str, Any] = {"batch_first": True, "padding_side": "left"}
        return pad_sequence(sequences, padding_value=self.begin, **how), pad_sequence(mask, padding_value=0, **how)

    def _pixel_values(self, numbers: Sequence[int]) -> Tensor | None:
        """Return the images in the prompts of these rows, None if there are none."""
        if self.shown is None or not any(self.counts[n] for n in numbers):
            return None
        groups = self.shown.split(self.counts)
        return torch.cat([groups[n] for n in numbers]).to(self.model.device, self.model.dtype)


def _seeds(seed: int | Sequence[int] | None, rows: int) -> list[int]:
    """Return one seed for each row; without a seed every row has a fresh one."""
    if seed is None:
        return torch.randint(2**62, (rows,)).tolist()
    seeds = [seed] * rows if isinstance(seed, int) else list(seed)
    if len(seeds) != rows:
        raise UserError(f"seed has {len(seeds)} values, give 1 or one per prompt, {rows}")
    return seeds
