"""Responses in, rewards out: the right function for the data, and NaN where none can tell."""

from gradvar.rollouts.rewards.choice import choose_reward
from gradvar.rollouts.rewards.registry import (
    REWARDS,
    Reward,
    RewardResult,
    RewardRule,
    score_rollouts,
)
from gradvar.rollouts.rewards.worker_pool import TIME_LIMIT, MathPool

__all__ = [
    # choosing
    "REWARDS",
    "Reward",
    "RewardRule",
    "choose_reward",
    # scoring
    "TIME_LIMIT",
    "MathPool",
    "RewardResult",
    "score_rollouts",
]
