"""Rollouts: the training forward sees the log-probabilities that sampling saw."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.mllm.tiny import unified
from unimm.data.tasks import Task, TaskFlow, Tasks, TasksConfig
from unimm.sampling import ImageSampling
from unimm.training.policy.rollouts import GumbelNoise, Rollout, Sampler
from unimm.training.policy.settings import PolicyConfig

SAMPLINGS = {
    "plain": ImageSampling(),
    "guided": ImageSampling(temperature=0.8, guidance_scale=2.5),
    "partly guided": ImageSampling(guidance_scale=3.0, guidance_interval=(2, 9)),
    "rising": ImageSampling(guidance_scale=3.0, guidance_schedule="linear"),
    "cut off": ImageSampling(temperature=1.2, top_k=6, top_p=0.9, min_p=0.05, guidance_scale=2.0),
}


def tasks(kind: str, count: int) -> list[Task]:
    stream = Tasks(TasksConfig({"flow": TaskFlow(kind)}, seed=1))  # type: ignore[arg-type]
    return [stream[n] for n in range(count)]


def rollout(kind: str, inputs: dict[str, torch.Tensor], chosen: torch.Tensor, mask: torch.Tensor, size: int) -> Rollout:
    every = {name: value.repeat_interleave(size, 0) for name, value in inputs.items()}
    return Rollout(kind, **every, chosen=chosen, mask=mask, advantage=torch.ones(len(chosen)))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["drawing", "editing"])
@pytest.mark.parametrize("name", SAMPLINGS)
@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_images_have_the_log_probabilities_that_sampling_saw(name: str, family: str, kind: str) -> None:
    model, processor = unified(family)
    model.config.null_prompt = processor.null_prompt_ids()
    sampler, asked = Sampler(model, processor, PolicyConfig(sampling=SAMPLINGS[name])), tasks(kind, 3)
    inputs = sampler.prompts(asked)
    assert not inputs["attention_mask"].all()  # prompts of different lengths
    seen = model.generate(
        **inputs,
        generation_mode="image",
        num_return_sequences=4,
        seed=[task["seed"] for task in asked],
        return_dict_in_generate=True,
        output_scores=True,
        **vars(SAMPLINGS[name]),
    )
    scores = torch.stack(seen.scores, 1).log_softmax(-1)  # [R, M, K]
    ids = seen.sequences - model.visual_vocabulary.base
    expected = scores.gather(-1, ids[..., None])[..., 0]
    _, chosen = sampler.sample(asked, 4)
    assert torch.equal(chosen, seen.sequences)
    whole = rollout(kind, inputs, chosen, torch.ones_like(chosen, dtype=torch.bool), 4)
    logps, entropy = sampler.log_probabilities(model, whole)
    assert (logps - expected).abs().max() < 1e-5
    probabilities = scores.exp()
    assert (entropy + torch.special.xlogy(probabilities, probabilities).sum(-1)).abs().max() < 1e-4
    part = whole.rows(4, 8)  # another padding
    assert (sampler.log_probabilities(model, part)[0] - expected[4:8]).abs().max() < 1e-5
    assert part.counted == (4, 4 * 16)


def test_the_gradient_reaches_the_unconditional_rows() -> None:
    """The guided logits' derivative by those without a prompt is 1 - scale."""
    model, processor = unified()
    model.config.null_prompt = processor.null_prompt_ids()
    sampler = Sampler(model, processor, PolicyConfig(sampling=ImageSampling(guidance_scale=4.0)))
    inputs, chosen = sampler.sample(tasks("drawing", 1), 2)
    kept: list[torch.Tensor] = []

    def keep(*args: Any, **kwargs: Any) -> Any:
        output = model(*args, **kwargs)
        output.logits.retain_grad()
        kept.append(output.logits)
        return output

    logps, _ = sampler.log_probabilities(
        keep, rollout("drawing", inputs, chosen, torch.ones_like(chosen, dtype=torch.bool), 2)
    )
    logps.sum().backward()
    conditional, unconditional = kept[0].grad.view(2, 2 * 16, -1)  # type: ignore[union-attr]
    assert torch.allclose(unconditional, conditional * (1 - 4) / 4, atol=1e-6)
    assert conditional.abs().max() > 0.1


def test_answers_have_the_log_probabilities_that_sampling_saw() -> None:
    model, processor = unified()
    config = PolicyConfig(temperature=1.5, max_answer_tokens=5)
    sampler, asked = Sampler(model, processor, config), tasks("answering", 3)
    inputs, chosen = sampler.sample(asked, 4)
    alone = sampler.sample(asked[1:2], 2)[1]  # a function of the task's seed, whatever else is in the batch
    assert torch.equal(alone, chosen[4:6, : alone.shape[1]])
    assert len({tuple(row.tolist()) for row in chosen}) > 6
    mask = sampler.written(chosen)
    whole = rollout("answering", inputs, chosen, mask, 4)
    logps, _ = sampler.log_probabilities(model, whole)
    for n in range(12):  # one row at a time, without padding, as transformers' own generate would score it
        task = inputs["attention_mask"][n // 4].bool()
        prompt = inputs["input_ids"][n // 4][task]
        length = int(mask[n].sum())
        row = torch.cat([prompt, chosen[n, :length]])[None]
        with torch.no_grad():
            logits = model(input_ids=row, pixel_values=inputs["pixel_values"][n // 4][None], vocabulary="answer").logits
        logits[..., model.config.image_token_id] = -torch.inf
        expected = (logits[0, len(prompt) - 1 : -1] / 1.5).log_softmax(-1).gather(-1, chosen[n, :length, None])[:, 0]
        assert (logps[n, :length] - expected).abs().max() < 1e-5


def test_an_answer_never_holds_the_placeholder_of_an_input_image() -> None:
    model, processor = unified()
    sampler = Sampler(model, processor, PolicyConfig(max_answer_tokens=2))
    placeholder = model.config.image_token_id

    def prefer(module: Any, args: Any, output: Any) -> Any:
        output.logits[..., placeholder] = 99.0
        return output

    hook = model.register_forward_hook(prefer)
    inputs, chosen = sampler.sample(tasks("answering", 2), 4)
    assert not (chosen == placeholder).any()
    logps, _ = sampler.log_probabilities(model, rollout("answering", inputs, chosen, sampler.written(chosen), 4))
    assert logps.isfinite().all() and logps.min() > -20
    hook.remove()


def test_answers_follow_the_distribution() -> None:
    noise, scores = GumbelNoise(range(20_000), 5, 0.7), torch.tensor([1.0, 0.0, -0.5])
    drawn = noise(torch.zeros(20_000, 7, dtype=torch.long), scores.expand(20_000, 3)).argmax(-1)
    found = drawn.bincount(minlength=3) / 20_000
    assert (found - (scores / 0.7).softmax(-1)).abs().max() < 0.015  # four standard errors


def test_an_answer_ends_with_its_end_token() -> None:
    model, processor = unified()
    end = int(torch.tensor(model.generation_config.eos_token_id).view(-1)[0])
    sampler = Sampler(model, processor, PolicyConfig(max_answer_tokens=4))
    chosen = torch.tensor([[7, end, end, end], [7, 8, 9, 10], [7, 8, 9, end]])
    assert sampler.written(chosen).sum(1).tolist() == [2, 4, 4]
    assert sampler.cut(chosen).tolist() == [False, True, False]


def test_chunks_and_group_sizes_do_not_change_an_image() -> None:
    model, processor = unified()
    model.config.null_prompt = processor.null_prompt_ids()
    asked = tasks("drawing", 3)
    small, large = (
        Sampler(model, processor, PolicyConfig(sampling=SAMPLINGS["guided"], sampling_batch_size=size))
        for size in (8, 64)
    )
    images = large.sample(asked, 4)[1].view(3, 4, -1)
    assert torch.equal(small.sample(asked, 4)[1].view(3, 4, -1), images)
    assert torch.equal(large.sample(asked, 2)[1].view(3, 2, -1), images[:, :2])
    assert len({tuple(row.tolist()) for row in images.flatten(0, 1)}) == 12


def test_the_padding_of_a_window_is_cut_from_its_micro_batches() -> None:
    ids = F.pad(torch.arange(1, 5).repeat(2, 1), (2, 0))
    chosen = torch.tensor([[7, 0, 0], [8, 9, 0]])
    mask = torch.tensor([[1, 0, 0], [1, 1, 0]]).bool()
    whole = Rollout("answering", ids, (ids > 0).long(), chosen, mask, torch.ones(2))
    part = whole.rows(0, 1)
    assert part.input_ids.tolist() == [[1, 2, 3, 4]] and part.chosen.tolist() == [[7]] and part.counted == (1, 1)
    assert whole.select(torch.tensor([1])).chosen.tolist() == [[8, 9, 0]]
