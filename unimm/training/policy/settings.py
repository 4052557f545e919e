"""Settings of learning from rewards: the policy's update, and what the run watches and stops at."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from unimm.config.schema import Count, NonNegative, Range, Rate, used_when
from unimm.errors import UserError
from unimm.sampling import ImageSampling

Advantage = Literal["grpo", "dr_grpo", "leave_one_out"]
LossType = Literal["grpo", "dapo", "dr_grpo"]


@dataclass
class PolicyConfig:
    """Settings of group relative policy optimization (GRPO, https://arxiv.org/abs/2402.03300), named as in TRL if TRL
    has them.

    Args:
        group_size: images or answers that are sampled for each task, G.
        sampling: how images are drawn while learning. Log-probabilities are those of this distribution: after
            guidance (the unconditional rows are then part of the gradient), temperature and the other settings.
        temperature: of answers.
        max_answer_tokens: longest answer.
        iterations: optimizer steps on the same samples; with 1 the ratio of probabilities is always 1.
        advantage: "grpo" (reward minus the group's mean, over its standard deviation), "dr_grpo" (without the
            division, https://arxiv.org/abs/2503.20783) or "leave_one_out" (minus the mean of the others, RLOO,
            https://arxiv.org/abs/2402.14740).
        loss_type: "grpo" (mean over samples of the mean over tokens), "dapo" (mean over all tokens,
            https://arxiv.org/abs/2503.14476) or "dr_grpo" (sum over tokens by the longest possible length). The three
            are equal for images, which all have the same number of tokens.
        ratio_level: "token", or "sequence" (GSPO, https://arxiv.org/abs/2507.18071).
        clip: how far below 1 the ratio still has a gradient; clip_high: how far above (None: as `clip`).
        kl_weight: factor of the KL divergence from the starting model; 0: none, and no reference is kept.
        kl_correction: weight the divergence by the ratio, which makes its gradient unbiased
            (https://arxiv.org/abs/2512.02556, section 3.1; TRL's `use_bias_correction_kl`).
        entropy_weight: factor of the mean entropy of a token, which is added to what is maximized.
        sampling_batch_size: images or answers that are sampled at once.
    """

    group_size: Annotated[int, Range(least=2)] = 8
    sampling: ImageSampling = field(default_factory=ImageSampling)
    temperature: Rate = 1.0
    max_answer_tokens: Count = 16
    iterations: Count = 1
    advantage: Advantage = "grpo"
    loss_type: LossType = "grpo"
    ratio_level: Literal["token", "sequence"] = "token"
    clip: Annotated[float, Range(above=0, below=1)] = 0.2
    clip_high: Rate | None = None
    kl_weight: NonNegative = 0.0
    kl_correction: bool = field(default=True, metadata=used_when(lambda c: c.kl_weight > 0, "policy.kl_weight above 0"))
    entropy_weight: NonNegative = 0.0
    sampling_batch_size: Count = 64

    def __post_init__(self) -> None:
        if self.sampling.greedy:
            raise UserError("policy.sampling is greedy, and the images of a group would be equal: sample them.")
        if not isinstance(self.sampling.guidance_scale, int | float | None):
            raise UserError("policy.sampling.guidance_scale is a list: give one number for all prompts.")
        if self.sampling.image_guidance_scale is not None:
            raise UserError(
                "policy.sampling.image_guidance_scale is set, and learning has one guidance scale for text and image: "
                "leave it out."
            )
        if self.sampling_batch_size < self.group_size:
            raise UserError(
                f"policy.sampling_batch_size is {self.sampling_batch_size} and policy.group_size {self.group_size}: a "
                "group is sampled at once."
            )

    @property
    def upper_clip(self) -> float:
        """Return how far above 1 the ratio still has a gradient."""
        return self.clip if self.clip_high is None else self.clip_high


@dataclass
class WatchConfig:
    """What ends a run that goes wrong.

    Args:
        window: optimizer steps after which gradients of exactly zero, or groups without any signal, end the run.
        max_kl: mean KL divergence of a token from the starting model that ends the run.
        max_judge_drop: the run ends if an evaluation finds the reward higher and the judge's score lower than at the
            start, by at least this much: the reward is being exploited.
    """

    window: Count = 20
    max_kl: Rate = 1.0
    max_judge_drop: Rate = 0.05
