"""A batch of conversations, drawings or reconstructions on the model. An answer does not depend on the rest of it.

Conversations: each row has its own sampling settings, noise, stop texts and length. Drawings: one row per image, with
the noise of (seed, k). B rows, padded on the left, V text tokens, M image tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer, TextStreamer

from unimm.chat.turns import image_turn
from unimm.evaluation.reconstruction.one_image import reconstruct_image
from unimm.mllm.answering import chat_inputs, edit_inputs, end_tokens
from unimm.mllm.conditions import image_token_ids, keep_outside
from unimm.mllm.drawing import user_errors
from unimm.mllm.previews import images_so_far
from unimm.noise import Noise, image_seed
from unimm.serving.jobs import (
    DrawRequest,
    Finished,
    Job,
    Piece,
    Preview,
    ReconstructRequest,
    TextRequest,
    Written,
)


class Abandoned(Exception):
    """Nobody waits for this batch any more."""


# ---- conversations ---------------------------------------------------------------------------------------------------


def run_texts(model: Any, processor: Any, jobs: Sequence[Job[TextRequest]]) -> None:
    """Answer conversations in one batch; a job is finished as soon as its own answers are complete."""
    answers: list[_Answer] = []
    for job in jobs:
        siblings: list[_Answer] = []
        siblings += [_Answer(model, processor, job, k, siblings) for k in range(job.request.n)]
        answers += siblings
    model.generate(
        **chat_inputs(model, processor, [answer.request.messages for answer in answers]),
        generation_mode="text",
        do_sample=False,  # `_RowSampling` adds noise, with which the most likely token is a sample
        max_new_tokens=max(answer.request.max_new_tokens for answer in answers),
        logits_processor=LogitsProcessorList([_RowSampling(answers)]),
        stopping_criteria=StoppingCriteriaList([_RowEnds(answers)]),
    )


class _Answer(TextStreamer):
    """Answer k of a job: its tokens, its text so far, and whether it has ended."""

    def __init__(
        self, model: Any, processor: Any, job: Job[TextRequest], k: int, siblings: "Sequence[_Answer]"
    ) -> None:
        super().__init__(processor.tokenizer, skip_special_tokens=True)
        self.job, self.k, self.siblings, self.request = job, k, siblings, job.request
        self.processor, self.ends = processor, end_tokens(model)
        self.follows = self.request.stream or bool(self.request.stop)  # else the text is decoded at the end
        self.new_ids: list[int] = []
        self.text, self.sent, self.stopped = "", 0, False
        self.written: Written | None = None

    def receive(self, token: int) -> None:
        """Take the next token, unless the answer has ended."""
        if self.written is not None:
            return
        if token in self.ends or not self.job.live:
            self.finish("stop")
            return
        self.new_ids.append(token)
        if self.follows:
            self.put(torch.tensor([token]))  # calls `on_finalized_text`
        if self.stopped:
            self.finish("stop")
        elif len(self.new_ids) == self.request.max_new_tokens:
            self.finish("length")

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Take the next part of the text, up to the first stop text; send what cannot be the start of one."""
        if self.stopped:
            return
        self.text += text
        places = [place for stop in self.request.stop if (place := self.text.find(stop)) >= 0]
        if places:
            self.text, self.stopped = self.text[: min(places)], True
        whole = self.stopped or stream_end
        held = 0 if whole else max((_overlap(self.text, stop) for stop in self.request.stop), default=0)
        end = len(self.text) - held
        if self.request.stream and end > self.sent:
            self.job.send(Piece(self.k, self.text[self.sent : end]))
            self.sent = end

    def finish(self, reason: str) -> None:
        """End the answer; the last one of a job delivers all of them."""
        if self.follows:
            self.end()
        else:
            self.text = self.processor.decode(self.new_ids, skip_special_tokens=True)
        self.written = Written(self.text, len(self.new_ids), "stop" if self.stopped else reason)
        results = [sibling.written for sibling in self.siblings]
        if all(result is not None for result in results):
            self.job.send(Finished(results))


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class _RowEnds(StoppingCriteria):
    """Hand each row its new token, and say which rows have ended."""

    def __init__(self, answers: Sequence[_Answer]) -> None:
        self.answers = answers

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Return [B], True for the rows that have ended."""
        for answer, token in zip(self.answers, input_ids[:, -1].tolist(), strict=True):
            answer.receive(token)
        return torch.tensor([answer.written is not None for answer in self.answers], device=input_ids.device)


class _RowSampling(LogitsProcessor):
    """Turn the scores [B, V] of sampled rows into scores whose argmax is a sample; greedy rows are left alone."""

    def __init__(self, answers: Sequence[_Answer]) -> None:
        requests = [(row, answer.request, answer.k) for row, answer in enumerate(answers)]
        self.sampled = [
            (row, request.sampling.warpers()) for row, request, _ in requests if not request.sampling.greedy
        ]
        self.seeds = [image_seed(request.seed, k) for _, request, k in requests if not request.sampling.greedy]
        self.length = max(request.max_new_tokens for _, request, _ in requests)
        self.noise: Noise | None = None
        self.position = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Apply each row's own warpers and noise."""
        if not self.sampled:
            return scores
        if self.noise is None:
            self.noise = Noise(self.seeds, scores.shape[-1], scores.device, self.length)
        noise = self.noise.step(self.position)
        self.position += 1
        for place, (row, warpers) in enumerate(self.sampled):
            warped = warpers(input_ids[row : row + 1], scores[row : row + 1].float())
            scores[row] = (warped[0] + noise[place]).to(scores.dtype)
        return scores


# ---- drawings --------------------------------------------------------------------------------------------------------


def run_drawings(model: Any, processor: Any, jobs: Sequence[Job[DrawRequest]]) -> None:
    """Draw the images of several requests in one batch."""
    owners = [job for job in jobs for _ in range(job.request.n)]
    first = jobs[0].request
    negative = {}
    if first.negative_prompt is not None:
        rows = processor.encode([processor.drawing_prompt(first.negative_prompt)])
        negative = {"negative_prompt_ids": torch.tensor(rows["input_ids"])}
    settings = asdict(first.sampling) | {
        "guidance_scale": [float(job.request.sampling.guidance_scale or 0) for job in owners]  # type: ignore[arg-type]
    }
    inputs: Mapping[str, Any] = chat_inputs(model, processor, [job.request.messages for job in owners])
    if first.sampling.image_guidance_scale is not None:  # then all of the batch are edits
        images = [[image_turn(job.request.image)] for job in owners if job.request.image is not None]
        inputs = edit_inputs(inputs, chat_inputs(model, processor, images))
    seeds = [job.request.seed for job in owners]
    watch = _Watch(model, processor, owners)
    with user_errors():
        token_ids = model.generate(
            **inputs,
            generation_mode="image",
            seed=seeds,
            streamer=watch,
            forced_token_ids=_forced(model, processor, owners),
            **settings,
            **negative,
        )
    for job in jobs:
        own = token_ids[[row for row, owner in enumerate(owners) if owner is job]]
        # decoded by itself: the last bit of a pixel may depend on the size of a batch
        job.send(Finished(processor.postprocess(model.decode_image_tokens(own))))


def _forced(model: Any, processor: Any, owners: Sequence[Job[DrawRequest]]) -> Tensor | None:
    """Return the tokens [B, M] of source images that edits with a mask keep, -1 for those to draw."""
    if owners[0].request.redrawn is None:
        return None
    kept = {}
    for job in dict.fromkeys(owners):
        assert job.request.redrawn is not None  # as for all of the batch
        kept[job] = keep_outside(image_token_ids(model, processor, job.request.image), job.request.redrawn)
    return torch.cat([kept[job] for job in owners])


class _Watch(BaseStreamer):
    """A streamer that sends previews, and ends a batch for which nobody waits."""

    def __init__(self, model: Any, processor: Any, owners: Sequence[Job[DrawRequest]]) -> None:
        self.model, self.processor, self.owners = model, processor, owners
        self.drawn: list[Tensor] | None = None
        height, width = model.config.image_grid
        self.places = {}
        for job in dict.fromkeys(owners):
            parts = job.request.partial_images + 1
            rows = sorted({round(height * n / parts) for n in range(1, parts)} - {0, height})
            self.places[job] = [row * width for row in rows]

    def put(self, value: Tensor) -> None:
        """Receive the prompts first, then the token ids [B] of one position after the other."""
        if self.drawn is None:
            self.drawn = []
            return
        if not any(job.live for job in self.owners):
            raise Abandoned
        self.drawn.append(value)
        for job, places in self.places.items():
            if job.live and len(self.drawn) in places:
                own = [row for row, owner in enumerate(self.owners) if owner is job]
                images = images_so_far(self.model, self.processor, torch.stack(self.drawn, dim=1)[own])
                for row, image in enumerate(images):
                    job.send(Preview(row, places.index(len(self.drawn)), image))

    def end(self) -> None:
        """Do nothing: the batch is finished once its images are decoded."""


# ---- reconstructions -------------------------------------------------------------------------------------------------


def run_reconstructions(model: Any, processor: Any, jobs: Sequence[Job[ReconstructRequest]]) -> None:
    """Reconstruct images one after the other: the last bit of a pixel may depend on the size of a batch."""
    for job in jobs:
        job.send(Finished([reconstruct_image(model.image_tokenizer, processor.image_processor, job.request.image)]))
