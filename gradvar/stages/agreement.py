"""Whether sampler and policy agree on the log-probabilities of the sampled tokens, as the run holds them."""

from __future__ import annotations

from dataclasses import replace

from gradvar.estimators.sampler_agreement import SamplerAgreement, sampler_agreement
from gradvar.runs import MeasureConfig, Run


def sampler_agreements(run: Run) -> dict[str, SamplerAgreement]:
    """Compare sampler and policy log-probabilities of every measured prompt that holds both.

    Responses that were left out are not compared; `worst_response` is a rollout id.
    """
    found = {}
    for prompt_id in run.measured_prompt_ids():
        if not run.file("measures", prompt_id).exists():
            continue
        rollouts, measures = {r.rollout_id: r for r in run.rollouts(prompt_id)}, run.measures(prompt_id)
        rows = [
            (name, rollouts[name].sampler_logprobs, logprobs, rollouts[name].loss_mask)
            for name, logprobs in zip(measures.rollout_ids, measures.policy_logprobs, strict=True)
            if name in rollouts and rollouts[name].sampler_logprobs is not None and name not in measures.left_out
        ]
        if rows:
            names, sampler, policies, masks = zip(*rows, strict=True)
            agreement = sampler_agreement(sampler, policies, masks)
            found[prompt_id] = replace(agreement, worst_response=names[agreement.worst_response])
    return found


def disagreement(run: Run) -> str | None:
    """Return one line if sampler and policy disagree beyond the run's stated limit, else None."""
    limit = run.config(MeasureConfig).logprob_limit
    found = sampler_agreements(run)
    bad = {name: one for name, one in found.items() if not one.mean_abs <= limit}
    if not bad:
        return None
    name, worst = max(bad.items(), key=lambda item: item[1].mean_abs)
    return (
        f"SAMPLER AND POLICY DISAGREE on {len(bad)} of {len(found)} prompts: at worst (prompt {name}) "
        f"{worst.mean_abs:.3g} nats per token on average, limit {limit:g}, largest {worst.max_abs:.3g} at response "
        f"{worst.worst_response}, token {worst.worst_token}; these rollouts do not come from this policy at this "
        "temperature, and every number below is biased"
    )
