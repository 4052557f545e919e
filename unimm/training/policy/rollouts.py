"""Rollouts: images and answers that the policy samples for its tasks, and the forward that computes their
log-probabilities again, with gradients.

Images come from the drawing engine (`generate(generation_mode="image")`): the prompt of a group is prefilled once.
Image or answer k of a task is a function of (seed of the task, k) and the weights, not of the rest of the batch.
P tasks, G samples of each, R = P * G rows, L prompt tokens, T sampled tokens, M image tokens, K codebook size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import SuppressTokensLogitsProcessor, TemperatureLogitsWarper

from unimm.data.conversations import DRAWN_KINDS
from unimm.data.editing import edit_request
from unimm.data.tasks import Kind, Task
from unimm.noise import Noise, image_seed
from unimm.training.policy.losses import guide, log_probabilities
from unimm.training.policy.settings import PolicyConfig


@dataclass
class Rollout:
    """Samples of the tasks of one flow in one micro-batch.

    Args:
        kind: of the tasks.
        input_ids, attention_mask: prompts [R, L] with left padding, ending where the sample begins.
        chosen: sampled token ids [R, T].
        mask: [R, T], False after the end of an answer.
        advantage: [R].
        pixel_values: input images, one for each row.
        counted: rows and tokens, those included that are left out of the forward.
        old, reference: log-probabilities [R, T] under the sampling policy, and under the starting model.
    """

    kind: Kind
    input_ids: Tensor
    attention_mask: Tensor
    chosen: Tensor
    mask: Tensor
    advantage: Tensor
    pixel_values: Tensor | None = None
    counted: tuple[int, int] = (0, 0)
    old: Tensor | None = None
    reference: Tensor | None = None

    @property
    def drawn(self) -> bool:
        """Return whether the samples are images."""
        return self.kind in DRAWN_KINDS

    def select(self, rows: Tensor) -> "Rollout":
        """Return some of the rows [n], which count as many."""
        tensors = {name: value[rows] for name, value in self.tensors().items() if isinstance(value, Tensor)}
        return replace(self, **tensors)

    def rows(self, start: int, stop: int) -> "Rollout":
        """Return the rows of a micro-batch, counted, without the padding that all of them share."""
        part = self.select(torch.arange(start, stop, device=self.chosen.device))
        padding = int((part.attention_mask.cumsum(1) == 0).all(0).sum())
        length = max(1, int(part.mask.sum(1).max()))
        part.input_ids, part.attention_mask = part.input_ids[:, padding:], part.attention_mask[:, padding:]
        part.chosen, part.mask = part.chosen[:, :length], part.mask[:, :length]
        part.counted = (len(part.chosen), int(part.mask.sum()))
        return part

    def tensors(self) -> dict[str, Any]:
        """Return the fields as a dict that `Rollout(**...)` takes, for a checkpoint."""
        return {each.name: getattr(self, each.name) for each in fields(self)}


def messages_of(task: Task) -> list[dict[str, Any]]:
    """Return the conversation that asks for a task."""
    if task["kind"] == "drawing":
        return [{"role": "user", "content": [{"type": "text", "text": task["prompt"]}]}]
    if task["kind"] == "editing":
        return [edit_request(task["image"], task["prompt"])]
    content = [{"type": "image", "image": task["image"]}, {"type": "text", "text": task["question"]}]
    return [{"role": "user", "content": content}]


class GumbelNoise(LogitsProcessor):
    """Turns greedy decoding into sampling by the Gumbel-max trick: the noise of row n is a function of (seed n, token
    number) alone, so an answer does not depend on the rest of the batch.

    Args:
        seeds: one for each row.
        start: number of tokens before an answer.
    """

    def __init__(self, seeds: Sequence[int], start: int, temperature: float) -> None:
        self.seeds, self.start, self.temperature = seeds, start, temperature
        self.noise: Noise | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores [R, V] at this temperature, plus noise."""
        self.noise = self.noise or Noise(self.seeds, scores.shape[1], scores.device)
        return scores / self.temperature + self.noise.step(input_ids.shape[1] - self.start)


class Sampler:
    """Samples images and answers with the current weights of `model`, and computes their log-probabilities.

    Args:
        model: a unified model, not wrapped.
        processor: its processor.
    """

    def __init__(self, model: Any, processor: Any, config: PolicyConfig) -> None:
        self.model, self.processor, self.config = model, processor, config
        # an answer that held the placeholder of an input image would ask for its pixels when it is read again
        self.no_image = SuppressTokensLogitsProcessor([model.config.image_token_id], device=str(model.device))
        self.warpers = {
            **dict.fromkeys(DRAWN_KINDS, config.sampling.warpers()),
            "answering": LogitsProcessorList([TemperatureLogitsWarper(config.temperature), self.no_image]),
        }
        self.scales = config.sampling.scales(1, model.num_image_tokens)[:, 0]  # [M]

    def longest(self, kind: Kind) -> int:
        """Return the largest number of tokens of a sample."""
        return int(self.model.num_image_tokens) if kind in DRAWN_KINDS else self.config.max_answer_tokens

    # ---- sampling ----

    @torch.no_grad()
    def prompts(self, tasks: Sequence[Task]) -> dict[str, Tensor]:
        """Return model inputs of the tasks, padded on the left; drawings end with the begin marker."""
        inputs = self.processor.apply_chat_template(
            [messages_of(task) for task in tasks],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        ).to(self.model.device)
        found = {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values") if name in inputs}
        if tasks[0]["kind"] in DRAWN_KINDS:
            found["input_ids"] = F.pad(found["input_ids"], (0, 1), value=self.model.config.boi_token_id)
            found["attention_mask"] = F.pad(found["attention_mask"], (0, 1), value=1)
        return found

    @torch.no_grad()
    def sample(self, tasks: Sequence[Task], size: int, *, greedy: bool = False) -> tuple[dict[str, Tensor], Tensor]:
        """Sample `size` images or answers of each task (all of one kind), `sampling_batch_size` at once; return the
        inputs of the prompts, and token ids [R, T].

        `greedy` answers take the likeliest token; drawings are always sampled.
        """
        inputs, step = self.prompts(tasks), max(1, self.config.sampling_batch_size // size)
        sample = self._draw if tasks[0]["kind"] in DRAWN_KINDS else partial(self._answer, greedy=greedy)
        chosen = [
            sample(
                {name: value[start : start + step] for name, value in inputs.items()}, tasks[start : start + step], size
            )
            for start in range(0, len(tasks), step)
        ]
        longest, end = max(rows.shape[1] for rows in chosen), int(self._ends()[0])
        return inputs, torch.cat([F.pad(rows, (0, longest - rows.shape[1]), value=end) for rows in chosen])

    def rollout(self, kind: Kind, inputs: dict[str, Tensor], chosen: Tensor, size: int) -> Rollout:
        """Return `size` samples of each prompt as a rollout, with advantages of 0."""
        mask = torch.ones_like(chosen, dtype=torch.bool) if kind in DRAWN_KINDS else self.written(chosen)
        every = {name: value.repeat_interleave(size, 0) for name, value in inputs.items()}
        return Rollout(
            kind, **every, chosen=chosen, mask=mask, advantage=torch.zeros(len(chosen), device=chosen.device)
        )

    def _draw(self, inputs: dict[str, Tensor], tasks: Sequence[Task], size: int) -> Tensor:
        seeds, sampling = [task["seed"] for task in tasks], vars(self.config.sampling)
        return self.model.generate(**inputs, generation_mode="image", num_return_sequences=size, seed=seeds, **sampling)

    def _answer(self, inputs: dict[str, Tensor], tasks: Sequence[Task], size: int, *, greedy: bool) -> Tensor:
        rows = {name: value.repeat_interleave(size, 0) for name, value in inputs.items()}
        noise = LogitsProcessorList([self.no_image])
        if not greedy:
            seeds = [image_seed(task["seed"], k) for task in tasks for k in range(size)]
            noise.append(GumbelNoise(seeds, rows["input_ids"].shape[1], self.config.temperature))
        written = self.model.generate(
            **rows,
            generation_mode="text",
            do_sample=False,
            logits_processor=noise,
            max_new_tokens=self.config.max_answer_tokens,
        )
        return written[:, rows["input_ids"].shape[1] :]

    def images(self, chosen: Tensor) -> list[Image.Image]:
        """Decode sampled token ids [R, M] to images."""
        with torch.no_grad(), torch.autocast(self.model.device.type, enabled=False):
            return list(self.processor.postprocess(self.model.decode_image_tokens(chosen)))

    def answers(self, chosen: Tensor) -> list[str]:
        """Decode sampled token ids [R, T] to answers; what follows the end of one is dropped."""
        mask = self.written(chosen)
        rows = [row[keep] for row, keep in zip(chosen, mask, strict=True)]
        process = self.processor.post_process_multimodal_output
        return [str(process(row, generation_mode="text")[0]).strip() for row in rows]

    def written(self, chosen: Tensor) -> Tensor:
        """Return the mask [R, T] of an answer's tokens, up to and including the one that ends it."""
        ended = torch.isin(chosen, self._ends()).long().cumsum(1)
        return F.pad(ended, (1, 0))[:, :-1] == 0

    def cut(self, chosen: Tensor) -> Tensor:
        """Return which answers [R] reached the largest length without ending."""
        return ~torch.isin(chosen, self._ends()).any(1) & (chosen.shape[1] >= self.config.max_answer_tokens)

    def _ends(self) -> Tensor:
        return torch.tensor(self.model.generation_config.eos_token_id, device=self.model.device).view(-1)

    # ---- log-probabilities ----

    def log_probabilities(self, model: Any, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """Compute log-probabilities and entropies [R, T] of a rollout under `model` (this one, wrapped or not, or the
        reference), with one forward; guided images have a second, unconditional row in it."""
        vocabulary = self.model.visual_vocabulary if rollout.drawn else None
        ids, mask = self._whole(rollout.input_ids, rollout.attention_mask, rollout)
        guided = rollout.drawn and bool((self.scales > 0).any())
        if guided:
            null = torch.tensor(self.model.config.null_prompt, device=ids.device).expand(len(ids), -1)
            others, other_mask = self._whole(null, torch.ones_like(null), rollout)
            length = max(ids.shape[1], others.shape[1])
            pad = self.model.config.boi_token_id  # masked; the image placeholder would ask for pixels
            ids = torch.cat([_left_pad(ids, length, pad), _left_pad(others, length, pad)])
            mask = torch.cat([_left_pad(mask, length, 0), _left_pad(other_mask, length, 0)])
        rows, total = ids.shape
        count = rollout.chosen.shape[1]
        places = torch.arange(rows, device=ids.device)[:, None] * total + torch.arange(
            total - count, total, device=ids.device
        )
        images = {} if rollout.pixel_values is None else {"pixel_values": rollout.pixel_values}
        logits = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=self.model.token_positions(ids, mask),
            logits_at=places.flatten(),
            vocabulary="image" if rollout.drawn else "answer",
            use_cache=False,
            **images,
        ).logits.float()
        logits = logits.view(rows, count, -1)
        if guided:
            logits = guide(logits[: rows // 2], logits[rows // 2 :], self.scales.to(logits.device))
        chosen = rollout.chosen if vocabulary is None else rollout.chosen - vocabulary.base
        return log_probabilities(
            logits, chosen, self.warpers[rollout.kind], with_entropy_gradient=self.config.entropy_weight > 0
        )

    def _whole(self, prompts: Tensor, mask: Tensor, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """Return ids and mask [R, L + T - 1] of prompts with their samples, of which nothing needs the last token."""
        ids = torch.cat([prompts, rollout.chosen[:, :-1]], dim=1)
        return ids, torch.cat([mask, rollout.mask[:, :-1].to(mask)], dim=1)


def _left_pad(rows: Tensor, length: int, value: int) -> Tensor:
    return F.pad(rows, (length - rows.shape[1], 0), value=value)
