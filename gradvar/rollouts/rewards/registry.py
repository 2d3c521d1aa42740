"""The rewards that can be asked for by name, and the scoring of one prompt's responses."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gradvar.errors import GradvarError
from gradvar.rollouts.rewards import answers
from gradvar.rollouts.rewards.worker_pool import MathPool, MathTask
from gradvar.runs.records import Prompt, Rollout

OnProgress = Callable[[int], None]
"""Called with the number of responses scored since the last call."""


@dataclass(frozen=True, kw_only=True)
class RewardResult:
    """The rewards of one prompt's responses."""

    rewards: NDArray[np.float64]
    """(N,) in the rollouts' order, NaN where unverified."""
    unverified: dict[int, str]
    """Reason for each unverified response, by rollout id."""


class Scorer(Protocol):
    """Scores all responses of one prompt."""

    def __call__(
        self, prompt: Prompt, rollouts: Sequence[Rollout], *, pool: MathPool | None, on_progress: OnProgress
    ) -> RewardResult:
        """Return the rewards in the rollouts' order; `score_rollouts` says what the arguments are."""


@dataclass(frozen=True, kw_only=True)
class RewardRule:
    """A reward that can be asked for by name."""

    name: str
    summary: str
    """What it counts as right, in a few words."""
    needs: Callable[[Any], str | None]
    """Says what ground truth is expected if it cannot use the given one, else None."""
    score: Scorer


@dataclass(frozen=True, kw_only=True)
class Reward:
    """The reward chosen for some data, and why."""

    name: str
    """A registry name, or `file.py:function`."""
    why: str
    """For the user, for example "countdown, because data_source is 'countdown'"."""
    needs: Callable[[Any], str | None]
    score: Scorer
    label: str
    """Names what scores: `name`, and for a user's function the hash of its file too."""


def score_rollouts(
    reward: Reward,
    prompt: Prompt,
    rollouts: Sequence[Rollout],
    *,
    pool: MathPool | None = None,
    on_progress: OnProgress | None = None,
) -> RewardResult:
    """Score one prompt's responses.

    Args:
        reward: From `choose_reward`.
        prompt: The prompt; its ground truth is what counts.
        rollouts: N responses.
        pool: Processes for math-verify, kept from prompt to prompt; None starts some for this call where needed.
        on_progress: Called with the number of responses scored since the last call.

    Returns:
        Rewards (N,) in the rollouts' order; NaN and a reason where a response could not be verified.

    Raises:
        GradvarError: If the ground truth is not what the reward needs, or the user's function fails.
    """
    check_ground_truth(f"prompt {prompt.prompt_id}", reward.name, reward.needs, prompt.ground_truth)
    return reward.score(prompt, rollouts, pool=pool, on_progress=on_progress or (lambda done: None))


def check_ground_truth(where: str, name: str, needs: Callable[[Any], str | None], ground_truth: Any) -> None:
    """Check that a reward can use a ground truth.

    Args:
        where: What the ground truth belongs to, for the message.
        name: The reward.
        needs: As in `RewardRule.needs`.
        ground_truth: The gold answer.

    Raises:
        GradvarError: If it cannot.
    """
    expected = needs(ground_truth)
    if expected is not None:
        received = "none" if ground_truth is None else f"{ground_truth!r:.80}"
        raise GradvarError(
            f"{where}: the reward {name} needs as ground truth {expected}, received {received}; "
            "mend the data or choose another reward by --reward"
        )


def one_by_one(score: Callable[[Prompt, Rollout], float]) -> Scorer:
    """Return a scorer that loops over the responses in this process."""

    def score_all(
        prompt: Prompt, rollouts: Sequence[Rollout], *, pool: MathPool | None, on_progress: OnProgress
    ) -> RewardResult:
        rewards = np.full(len(rollouts), math.nan)
        for row, rollout in enumerate(rollouts):
            rewards[row] = score(prompt, rollout)
            on_progress(1)
        return RewardResult(rewards=rewards, unverified={})

    return score_all


def _by_text(score: Callable[[str, Any], float]) -> Scorer:
    return one_by_one(lambda prompt, rollout: score(rollout.text, prompt.ground_truth))


def _math_score(
    prompt: Prompt, rollouts: Sequence[Rollout], *, pool: MathPool | None, on_progress: OnProgress
) -> RewardResult:
    """Return 1 or 0 by math-verify; a response without an answer is 0, one that it cannot decide is NaN."""
    gold = answers.gold_texts(prompt.ground_truth)
    rewards = np.full(len(rollouts), math.nan)
    with MathPool() if pool is None else nullcontext(pool) as checker:
        # First the gold alone: one that hangs must not cost every response its time limit.
        readable = checker.run([MathTask(gold=gold, response=None)])[0]
        if readable.reason is not None:
            reason = f"ground truth {prompt.ground_truth!r:.60}: {readable.reason}"
            on_progress(len(rollouts))
            return RewardResult(rewards=rewards, unverified={r.rollout_id: reason for r in rollouts})
        verdicts = checker.run(
            [MathTask(gold=gold, response=rollout.text) for rollout in rollouts],
            on_verdict=lambda index, verdict: on_progress(1),
        )
    unverified = {}
    for row, (rollout, verdict) in enumerate(zip(rollouts, verdicts, strict=True)):
        rewards[row] = verdict.score
        if verdict.reason is not None:
            unverified[rollout.rollout_id] = verdict.reason
    return RewardResult(rewards=rewards, unverified=unverified)


_RULES = (
    RewardRule(
        name="countdown",
        summary="the last <answer> uses every number once and makes the target",
        needs=answers.countdown_needs,
        score=_by_text(answers.countdown_score),
    ),
    RewardRule(
        name="math",
        summary="math-verify finds the answer (boxed first) equal to the gold one",
        needs=answers.text_needs,
        score=_math_score,
    ),
    RewardRule(
        name="gsm8k",
        summary="the number after the last #### is the gold one (verl's strict)",
        needs=answers.gsm8k_needs,
        score=_by_text(answers.gsm8k_score),
    ),
    RewardRule(
        name="gsm8k_flexible",
        summary="the last number is the gold one (verl's flexible)",
        needs=answers.gsm8k_needs,
        score=_by_text(answers.gsm8k_flexible_score),
    ),
    RewardRule(
        name="exact",
        summary="the answer (tagged, boxed, or the whole response) is the gold text",
        needs=answers.text_needs,
        score=_by_text(answers.exact_score),
    ),
)
REWARDS: dict[str, RewardRule] = {rule.name: rule for rule in _RULES}
"""Rewards by the name that `--reward` takes."""
