"""Stage reward: rollouts to rewards, again at any time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gradvar.errors import GradvarError
from gradvar.rollouts.rewards import MathPool, RewardResult, choose_reward, score_rollouts
from gradvar.runs import Prompt, RewardConfig, Rollout, Run, rollouts_digest
from gradvar.runs.records import counted
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
    chosen = {
        prompt.prompt_id: choose_reward(prompt.data_source, prompt.ground_truth, config.reward)
        for prompt in sampled
        if config.reward is not None or (prompt.ground_truth is not None and not _is_imported(run, prompt))
    }
    run.begin("reward", config)
    reasons: Counter[str] = Counter()
    unverified: Counter[str] = Counter()
    with (
        listener.task("reward", sum(len(run.rollouts(p.prompt_id)) for p in sampled)) as advance,
        MathPool() as pool,
    ):
        for prompt in sampled:
            rollouts = run.rollouts(prompt.prompt_id)
            digest = rollouts_digest(rollouts)
            old = run.rewards_label(prompt.prompt_id)
            if prompt.prompt_id not in chosen and old == (digest, IMPORTED):
                reasons["imported with the rollouts"] += 1
                advance(len(rollouts))
                continue
            if prompt.prompt_id not in chosen:
                label, result = (digest, "none"), _no_gold_answer(rollouts)
                reasons["none: no gold answer in the data"] += 1
            else:
                rule = chosen[prompt.prompt_id]
                label, result = (digest, rule.label), None
                reasons[rule.why] += 1
            if old == label:
                advance(len(rollouts))
                continue
            if result is None:
                result = score_rollouts(rule, prompt, rollouts, pool=pool, on_progress=advance)
            unverified.update(result.unverified.values())
            run.write_rewards(prompt.prompt_id, [r.rollout_id for r in rollouts], result.rewards, label=label)
    if config.reward is None and len({rule.name for rule in chosen.values()}) > 1:
        listener.warn("prompts are scored by different rewards (below); give one by --reward if that is not meant")
    for reason, count in reasons.items():
        listener.say(f"reward: {reason} ({counted(count, 'prompt')})")
    for reason, count in unverified.items():
        listener.warn(f"{counted(count, 'response')} unverified (null, not zero): {reason}")
    rewards = [run.rewards(prompt.prompt_id) for prompt in sampled]
    if all(np.unique(r[~np.isnan(r)]).size <= 1 for r in rewards):
        listener.warn(
            "all rewards are equal within every prompt: advantages are zero, so only the score's results (A = 1) mean "
            "something"
        )
    run.finish("reward", unverified=int(sum(np.isnan(r).sum() for r in rewards)))


def _is_imported(run: Run, prompt: Prompt) -> bool:
    return run.rewards_label(prompt.prompt_id) == (rollouts_digest(run.rollouts(prompt.prompt_id)), IMPORTED)


def _no_gold_answer(rollouts: Sequence[Rollout]) -> RewardResult:
    reason = "the problem has no gold answer (name its column by --answer-column, or give --reward file.py:function)"
    return RewardResult(
        rewards=np.full(len(rollouts), np.nan), unverified={rollout.rollout_id: reason for rollout in rollouts}
    )
