"""Rewards of drawn images: small classes with one method over prompts, their metadata and images.

`build_rewards` makes them from a recipe's settings; a weighted sum of them is what a policy learns from.
"""

from unimm.rewards.base import Reward
from unimm.rewards.settings import RewardConfig, build_reward, build_rewards

__all__ = ["Reward", "RewardConfig", "build_reward", "build_rewards"]
