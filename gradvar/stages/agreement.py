"""Whether sampler and policy agree on the log-probabilities of the sampled tokens, as the run holds them."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from gradvar.estimators.sampler_agreement import SamplerAgreement, sampler_agreement
from gradvar.runs import MeasureConfig, Rollout, Run
from gradvar.runs.records import counted


@dataclass(frozen=True, kw_only=True)
class TokenDifference:
    """One sampled token as sampler and policy saw it."""

    prompt_id: str
    rollout_id: int
    token: int
    """Position in the response, the first is 0."""
    token_id: int
    sampler: float
    """Log-probability in nats."""
    policy: float
    """Log-probability in nats."""

    @property
    def difference(self) -> float:
        """Sampler minus policy, nats."""
        return self.sampler - self.policy


@dataclass(frozen=True, kw_only=True)
class ResponseDifference:
    """One response's log-probability as sampler and policy saw it."""

    prompt_id: str
    rollout_id: int
    difference: float
    """Sampler minus policy, summed over its loss tokens, nats: minus the log of its importance ratio."""


def sampler_agreements(run: Run) -> dict[str, SamplerAgreement]:
    """Compare sampler and policy log-probabilities of every measured prompt that holds both.

    Responses that were left out are not compared; `worst_response` is a rollout id.
    """
    found = {}
    for prompt_id, rows in _compared(run):
        rollouts, policies = zip(*rows, strict=True)
        samplers = [rollout.sampler_logprobs or () for rollout in rollouts]
        agreement = sampler_agreement(samplers, policies, [rollout.loss_mask for rollout in rollouts])
        found[prompt_id] = replace(agreement, worst_response=rollouts[agreement.worst_response].rollout_id)
    return found


def worst_tokens(run: Run, count: int) -> list[TokenDifference]:
    """Return the loss tokens on which sampler and policy differ most, the worst first."""
    return heapq.nlargest(
        count,
        (
            TokenDifference(
                prompt_id=prompt_id,
                rollout_id=rollout.rollout_id,
                token=int(place),
                token_id=rollout.token_ids[place],
                sampler=float((rollout.sampler_logprobs or ())[place]),
                policy=float(policy[place]),
            )
            for prompt_id, rows in _compared(run)
            for rollout, policy in rows
            for place in np.argsort(-np.abs(_differences(rollout, policy)))[:count]
            if rollout.loss_mask is None or rollout.loss_mask[place]
        ),
        key=lambda one: abs(one.difference),
    )


def response_differences(run: Run) -> dict[str, list[ResponseDifference]]:
    """Return the difference between sampler and policy summed over each response, by prompt."""
    return {
        prompt_id: [
            ResponseDifference(
                prompt_id=prompt_id,
                rollout_id=rollout.rollout_id,
                difference=float(_differences(rollout, policy).sum()),
            )
            for rollout, policy in rows
        ]
        for prompt_id, rows in _compared(run)
    }


def disagreement(run: Run) -> str | None:
    """Return one line if sampler and policy disagree beyond the run's stated limit, else None."""
    limit = run.config(MeasureConfig).logprob_limit
    found = sampler_agreements(run)
    bad = {name: one for name, one in found.items() if not one.mean_abs <= limit}
    if not bad:
        return None
    name, worst = max(bad.items(), key=lambda item: item[1].mean_abs)
    return (
        f"SAMPLER AND POLICY DISAGREE on {len(bad)} of {counted(len(found), 'prompt')}: at worst (prompt {name}) "
        f"{worst.mean_abs:.3g} nats per token on average, limit {limit:g}, largest {worst.max_abs:.3g} at response "
        f"{worst.worst_response}, token {worst.worst_token}; these rollouts do not come from this policy at this "
        "temperature, and every number below is biased"
    )


def _compared(run: Run) -> Iterator[tuple[str, list[tuple[Rollout, NDArray[np.float32]]]]]:
    """Yield each measured prompt's rollouts that hold both log-probabilities, with the policy's."""
    for prompt_id in run.measured_prompt_ids():
        if not run.file("measures", prompt_id).exists():
            continue
        rollouts, measures = {r.rollout_id: r for r in run.rollouts(prompt_id)}, run.measures(prompt_id)
        rows = [
            (rollouts[name], logprobs)
            for name, logprobs in zip(measures.rollout_ids, measures.policy_logprobs, strict=True)
            if name in rollouts and rollouts[name].sampler_logprobs is not None and name not in measures.left_out
        ]
        if rows:
            yield prompt_id, rows


def _differences(rollout: Rollout, policy: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return sampler minus policy, 0 where a token carries no loss."""
    difference = np.asarray(rollout.sampler_logprobs, dtype=np.float64) - policy.astype(np.float64)
    return difference if rollout.loss_mask is None else difference * np.asarray(rollout.loss_mask)
