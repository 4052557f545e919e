"""Advantages, losses and log-probabilities against TRL's own trainers and closed forms."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import LogitsProcessorList

from tests.mllm.tiny import language_model, text_tokenizer
from unimm.sampling import ImageSampling
from unimm.training.policy.losses import (
    advantages,
    constant,
    divisor,
    guide,
    log_probabilities,
    policy_terms,
    summed,
)
from unimm.training.policy.settings import PolicyConfig

G, T = 4, 6
REWARDS = [0.0, 1.0, 0.5, 0.25, 0.3, 0.3, 0.3, 0.3]  # two groups of four; the second is constant


def trl_trainer(folder: Path, rloo: bool = False, **options: Any) -> Any:
    """A trainer of TRL on a tiny language model, whose reward function returns REWARDS."""
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    config = (RLOOConfig if rloo else GRPOConfig)(
        output_dir=str(folder),
        num_generations=G,
        per_device_train_batch_size=len(REWARDS),
        max_completion_length=T,
        report_to=[],
        use_cpu=True,
        bf16=False,
        beta=0.0,
        disable_tqdm=True,
        **options,
    )
    tokenizer = text_tokenizer()
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return (RLOOTrainer if rloo else GRPOTrainer)(
        model=language_model(),
        reward_funcs=lambda completions, **kwargs: REWARDS[: len(completions)],
        args=config,
        train_dataset=Dataset.from_list([{"prompt": "a photo of a red circle"}] * 8),
        processing_class=tokenizer,
    )


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "leave_one_out"])
def test_advantages_are_those_of_trl(kind: str, tmp_path: Path) -> None:
    options = {"normalize_advantages": False} if kind == "leave_one_out" else {}
    if kind == "dr_grpo":
        options = {"scale_rewards": "none"}
    trainer = trl_trainer(tmp_path, rloo=kind == "leave_one_out", **options)
    inputs = [{"prompt": "a photo of a red circle"}] * len(REWARDS)
    expected = trainer._generate_and_score_completions(inputs)["advantages"]
    found = advantages(torch.tensor(REWARDS).view(2, G), kind).flatten()
    assert (found - expected).abs().max() < 1e-6
    assert found[:G].abs().min() > 0 and not found[G:].any()


def recorded(seed: int = 0) -> dict[str, Tensor]:
    """Log-probabilities of 8 samples of up to T tokens, before and after an update, with some ratios to be clipped."""
    generator = torch.Generator().manual_seed(seed)
    logps = -3 * torch.rand(8, T, generator=generator)
    lengths = torch.tensor([6, 6, 3, 1, 5, 6, 2, 4])
    return {
        "logps": logps,
        "old": logps + 0.4 * torch.randn(8, T, generator=generator),
        "reference": logps + 0.3 * torch.randn(8, T, generator=generator),
        "entropy": torch.rand(8, T, generator=generator),
        "advantage": torch.randn(8, generator=generator),
        "mask": torch.arange(T) < lengths[:, None],
    }


@pytest.fixture(scope="module")
def trl(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return trl_trainer(tmp_path_factory.mktemp("trl"))


CASES = [*itertools.product(("grpo", "dapo", "dr_grpo"), ("token", "sequence"), (0.0, 0.1), (0.0,))]


@pytest.mark.parametrize(("loss_type", "level", "beta", "entropy"), [*CASES, ("grpo", "token", 0.1, 0.2)])
@pytest.mark.parametrize("corrected", [True, False])
def test_loss_and_gradient_are_those_of_trl(
    loss_type: str, level: str, beta: float, entropy: float, corrected: bool, trl: Any
) -> None:
    trl.args.use_bias_correction_kl = corrected
    trl.loss_type, trl.importance_sampling_level, trl.beta = loss_type, level, beta
    trl.epsilon_low, trl.epsilon_high = 0.2, 0.28
    trl.entropy_coef, trl._entropy_bonus_enabled = entropy, entropy > 0
    trl.current_gradient_accumulation_steps = trl.args.steps_per_generation = 1
    each = recorded()
    theirs = each["logps"].clone().requires_grad_()
    trl._get_per_token_logps_and_entropies = lambda *args, **kwargs: (theirs, each["entropy"], None)
    mask = each["mask"].long()
    inputs = {
        "prompt_ids": torch.ones(8, 1, dtype=torch.long),
        "prompt_mask": torch.ones(8, 1, dtype=torch.long),
        "completion_ids": torch.ones(8, T, dtype=torch.long),
        "completion_mask": mask,
        "advantages": each["advantage"],
        "old_per_token_logps": each["old"],
        "ref_per_token_logps": each["reference"],
        "num_items_in_batch": mask.sum(),
    }
    trl.model.train()
    expected = trl._compute_loss(trl.model, inputs)
    expected.backward()

    config = PolicyConfig(
        loss_type=loss_type, ratio_level=level, kl_weight=beta, clip=0.2, clip_high=0.28, kl_correction=corrected
    )  # type: ignore[arg-type]
    ours = each["logps"].clone().requires_grad_()
    terms = policy_terms(
        ours, each["old"], each["advantage"], each["mask"], config, each["reference"] if beta else None
    )
    loss = summed(terms.loss, each["mask"], config.loss_type, T)
    loss = loss / divisor(torch.tensor(8.0), mask.sum(), config.loss_type)
    loss = loss - entropy * (each["entropy"] * mask).sum() / mask.sum()
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    assert (ours.grad - theirs.grad).abs().max() < 1e-6  # type: ignore[operator]
    assert terms.clipped.any()


def test_a_clipped_or_masked_token_has_no_gradient() -> None:
    each = recorded()
    logps = each["logps"].clone().requires_grad_()
    terms = policy_terms(logps, each["old"], each["advantage"], each["mask"], PolicyConfig())
    summed(terms.loss, each["mask"], "grpo", T).backward()
    dead = terms.clipped | ~each["mask"]
    assert dead.any() and not logps.grad[dead].any() and logps.grad[~dead].all()  # type: ignore[index]


def test_equal_policies_have_a_ratio_of_one_and_no_divergence() -> None:
    logps = recorded()["logps"].requires_grad_()
    mask = torch.ones_like(logps, dtype=torch.bool)
    terms = policy_terms(logps, logps.detach(), torch.zeros(8), mask, PolicyConfig(kl_weight=1.0), logps.detach())
    assert torch.equal(terms.ratio, torch.ones_like(logps)) and not terms.kl.any()
    terms.loss.sum().backward()
    assert not logps.grad.any()  # type: ignore[union-attr]


def test_the_divergence_estimates_the_true_one() -> None:
    """Schulman's k3, averaged over the policy's own samples, is KL(policy || reference) in closed form."""
    policy = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    reference = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    logps = policy.log()[:, None]
    mask = torch.ones_like(logps, dtype=torch.bool)
    terms = policy_terms(
        logps, logps, torch.zeros(3), mask, PolicyConfig(kl_weight=1.0, kl_correction=False), reference.log()[:, None]
    )
    expected = (policy * (policy / reference).log()).sum()
    assert (policy * terms.kl[:, 0]).sum().item() == pytest.approx(expected.item(), abs=1e-12)


def test_a_constant_group_has_advantages_of_exactly_zero() -> None:
    rewards = torch.full((3, 7), 0.1) * torch.tensor([[1.0], [3.0], [0.7]])  # their means are rounded
    rewards[2, 0] += 1e-3
    assert constant(rewards).tolist() == [True, True, False]
    for kind in ("grpo", "dr_grpo", "leave_one_out"):
        found = advantages(rewards, kind)
        assert not found[:2].any() and found[2].any()


@pytest.mark.parametrize(
    "sampling",
    [ImageSampling(), ImageSampling(temperature=0.7), ImageSampling(temperature=1.3, top_k=5, top_p=0.8, min_p=0.05)],
)
def test_log_probabilities_are_those_of_the_sampled_distribution(sampling: ImageSampling) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(5, 4, 12, generator=generator, dtype=torch.float64)
    warped = sampling.warpers()(torch.zeros(20, 1, dtype=torch.long), logits.flatten(0, 1)).view_as(logits)
    chosen = warped.argmax(-1)
    logps, entropy = log_probabilities(logits, chosen, sampling.warpers())
    probabilities = warped.softmax(-1)
    assert torch.allclose(logps, probabilities.gather(-1, chosen[..., None])[..., 0].log(), atol=1e-12)
    assert torch.allclose(entropy, -torch.special.xlogy(probabilities, probabilities).sum(-1), atol=1e-12)


def test_a_token_that_left_the_support_keeps_a_finite_gradient() -> None:
    logits = torch.tensor([[[3.0, 2.0, 0.0, -1.0]]], requires_grad=True)
    logps, _ = log_probabilities(logits, torch.tensor([[3]]), ImageSampling(top_k=2).warpers())
    assert logps.item() == pytest.approx(-1 - math.log(sum(map(math.exp, (3, 2, -1)))), abs=1e-6)
    logps.sum().backward()
    assert torch.isfinite(logits.grad).all() and logits.grad[0, 0, 3] > 0  # type: ignore[union-attr, index]


def test_guidance_applies_to_guided_tokens_only() -> None:
    conditional, unconditional = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    found = guide(conditional, unconditional, torch.tensor([0.0, 2.0, 5.0]))
    assert torch.equal(found[:, 0], conditional[:, 0])
    assert torch.allclose(found[:, 2], 5 * conditional[:, 2] - 4 * unconditional[:, 2], atol=1e-5)


def test_no_warpers_change_nothing() -> None:
    logits = torch.randn(2, 3, 5)
    logps, _ = log_probabilities(logits, torch.zeros(2, 3, dtype=torch.long), LogitsProcessorList())
    assert torch.equal(logps, logits.log_softmax(-1)[..., 0])
