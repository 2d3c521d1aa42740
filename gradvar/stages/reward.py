"""Stage reward: rollouts to rewards, again at any time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from gradvar.errors import GradvarError
from gradvar.rollouts.rewards import RewardPool, choose_reward, score_rollouts
from gradvar.runs import RewardConfig, Run, rollouts_digest
from gradvar.stages.identity import agreed_config
from gradvar.stages.listener import Listener, Silent
from gradvar.stages.sample import IMPORTED


def reward(run: Run, given: Mapping[str, Any], listener: Listener | None = None) -> None:
    """Score every prompt whose rollouts or reward function changed; the rest stays.

    Args:
        run: A run with rollouts.
        given: Settings of `RewardConfig` given now.
        listener: Who is told.

    Raises:
        GradvarError: No rollouts, or a reward function that fails.
    """
    listener = listener or Silent()
    config = agreed_config(run, RewardConfig, given)
    sampled = [prompt for prompt in run.prompts() if run.file("rollouts", prompt.prompt_id).exists()]
    if not sampled:
        raise GradvarError(f"{run.path} holds no rollouts: run `gradvar sample {run.path}` first")
    run.begin("reward", config)
    reasons: dict[str, int] = {}
    unverified: dict[str, int] = {}
    with listener.task("reward", len(sampled)) as advance, RewardPool() as pool:
        for prompt in sampled:
            rollouts = run.rollouts(prompt.prompt_id)
            digest = rollouts_digest(rollouts)
            old = run.rewards_label(prompt.prompt_id)
            if config.reward is None and old == (digest, IMPORTED):
                reasons["imported with the rollouts"] = reasons.get("imported with the rollouts", 0) + 1
                advance(1)
                continue
            chosen = choose_reward(prompt.data_source, prompt.ground_truth, config.reward)
            reasons[f"{chosen.name}: {chosen.why}"] = reasons.get(f"{chosen.name}: {chosen.why}", 0) + 1
            label = (digest, chosen.identity)
            if old != label:
                result = score_rollouts(chosen, prompt, rollouts, pool=pool)
                for reason in result.unverified.values():
                    unverified[reason] = unverified.get(reason, 0) + 1
                ids = [rollout.rollout_id for rollout in rollouts]
                run.write_rewards(prompt.prompt_id, ids, result.rewards, label=label)
            advance(1)
    for reason, count in reasons.items():
        listener.say(f"reward {reason} ({count} prompts)")
    for reason, count in unverified.items():
        listener.warn(f"{count} responses unverified (null, not zero): {reason}")
    rewards = [run.rewards(prompt.prompt_id) for prompt in sampled]
    if all(np.unique(r[~np.isnan(r)]).size <= 1 for r in rewards):
        listener.warn(
            "all rewards are equal within every prompt: advantages are zero, so only the score's results (A = 1) mean "
            "something"
        )
    run.finish("reward", unverified=sum(unverified.values()))
