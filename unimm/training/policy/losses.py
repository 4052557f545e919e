"""Functions of group relative policy optimization: advantages, log-probabilities of sampled tokens, and the clipped
loss with its KL divergence. P prompts, G samples of each, R = P * G rows, T tokens of a row, V vocabulary size.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from unimm.training.policy.settings import Advantage, LossType, PolicyConfig

TINY = 1e-4  # added to a group's standard deviation, as in TRL


def advantages(rewards: Tensor, kind: Advantage) -> Tensor:
    """Compute the advantage of each sample from the rewards of its group, [P, G]. A group of equal rewards has
    advantages of exactly 0; rounding would leave something there for the standard deviation to magnify."""
    size = rewards.shape[1]
    centered = rewards - rewards.mean(1, keepdim=True)
    if kind == "grpo":
        centered = centered / (rewards.std(1, keepdim=True) + TINY)
    elif kind == "leave_one_out":
        centered = centered * size / (size - 1)
    return centered.masked_fill(constant(rewards)[:, None], 0.0)


def constant(rewards: Tensor) -> Tensor:
    """Return which groups [P] of rewards [P, G] are equal throughout, and so teach nothing."""
    return rewards.amax(1) == rewards.amin(1)


def guide(conditional: Tensor, unconditional: Tensor, scales: Tensor) -> Tensor:
    """Apply classifier-free guidance to logits [R, T, V] with scales [T], 0 for tokens without guidance."""
    guided = unconditional + scales[:, None] * (conditional - unconditional)
    return torch.where(scales[:, None] > 0, guided, conditional)


def log_probabilities(
    logits: Tensor, chosen: Tensor, warpers: LogitsProcessorList, *, with_entropy_gradient: bool = False
) -> tuple[Tensor, Tensor]:
    """Compute the log-probabilities of `chosen` [R, T] and the entropies [R, T] of the distribution that is sampled:
    softmax(warpers(logits)), logits [R, T, V] in float32.

    A chosen token always counts as part of the support: one that an update has moved out of the k most likely keeps a
    finite ratio.
    """
    flat = logits.flatten(0, 1)
    ids = chosen.reshape(-1, 1)
    scores = plain = LogitsProcessorList(each for each in warpers if hasattr(each, "temperature"))(ids, flat)
    if any(not hasattr(each, "temperature") for each in warpers):
        support = torch.isfinite(warpers(ids, flat.detach())).scatter(1, ids, True)
        scores = plain.masked_fill(~support, -torch.inf)
    logps = scores.log_softmax(-1)
    with torch.set_grad_enabled(with_entropy_gradient and torch.is_grad_enabled()):
        known = logps if with_entropy_gradient else logps.detach()
        entropy = -(known.exp() * known.masked_fill(known == -torch.inf, 0.0)).sum(-1)
    return logps.gather(1, ids).view_as(chosen), entropy.view_as(chosen)


class Terms(NamedTuple):
    """The terms of the loss: per token [R, T] the loss and the KL divergence, and per token or row whether the ratio
    was clipped, and the ratio."""

    loss: Tensor
    kl: Tensor
    clipped: Tensor
    ratio: Tensor


def policy_terms(
    logps: Tensor, old: Tensor, advantage: Tensor, mask: Tensor, config: PolicyConfig, reference: Tensor | None = None
) -> Terms:
    """Compute the clipped loss of tokens with log-probabilities `logps` [R, T], which were sampled at `old` [R, T].

    Args:
        advantage: of each row, [R].
        mask: [R, T], 1 for tokens that were sampled.
        reference: log-probabilities [R, T] under the starting model; the divergence from it is weighted by the ratio
            with `kl_correction`, as in TRL.
    """
    log_ratio = logps - old
    if config.ratio_level == "sequence":
        log_ratio = ((log_ratio * mask).sum(-1) / mask.sum(-1).clamp_min(1))[:, None]
    ratio, gain = log_ratio.exp(), advantage[:, None]
    bounded = ratio.clamp(1 - config.clip, 1 + config.upper_clip)
    loss = -torch.minimum(ratio * gain, bounded * gain)
    clipped = ((ratio < 1 - config.clip) & (gain < 0)) | ((ratio > 1 + config.upper_clip) & (gain > 0))
    kl = torch.zeros_like(logps)
    if reference is not None:
        kl = divergence(logps, reference)
        loss = loss + config.kl_weight * (kl * ratio if config.kl_correction else kl)
    return Terms(loss.expand_as(logps), kl, clipped, ratio)


def divergence(logps: Tensor, reference: Tensor) -> Tensor:
    """Estimate the KL divergence from a reference by each sampled token: Schulman's k3, exp(d) - d - 1 with
    d = reference - logps."""
    apart = reference - logps
    return apart.exp() - apart - 1


def summed(loss: Tensor, mask: Tensor, kind: LossType, longest: int) -> Tensor:
    """Sum a loss per token [R, T] so that its division by `divisor` of the whole batch is the loss."""
    if kind == "grpo":
        return ((loss * mask).sum(-1) / mask.sum(-1).clamp_min(1)).sum()
    return (loss * mask).sum() / (longest if kind == "dr_grpo" else 1)


def divisor(rows: Tensor, tokens: Tensor, kind: LossType) -> Tensor:
    """Return what the sums of the whole batch are divided by: its tokens for "dapo", else its rows."""
    return tokens if kind == "dapo" else rows
