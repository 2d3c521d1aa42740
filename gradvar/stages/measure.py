"""Stage measure: rollouts to score Grams and policy log-probabilities, one prompt at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gradvar.errors import GradvarError
from gradvar.estimators.sampler_agreement import SamplerAgreement, sampler_agreement
from gradvar.gradients import ScoreMeasurement, measure_scores, resolve_targets
from gradvar.models import find_model, load_model
from gradvar.runs import MeasureConfig, Measures, Prompt, Rollout, Run, SampleConfig, rollouts_digest
from gradvar.stages.identity import agree_on_model, agreed_config
from gradvar.stages.listener import Advance, Listener, Silent


def measure(run: Run, given: Mapping[str, Any], listener: Listener | None = None) -> None:
    """Measure the score Grams that are missing: new prompts, grown prompts, new targets.

    Args:
        run: A run with rollouts.
        given: Settings of `MeasureConfig` given now, and `device`.
        listener: Who is told.

    Raises:
        GradvarError: No rollouts, targets that match nothing, or a gradient that is not finite.
    """
    listener = listener or Silent()
    config = agreed_config(run, MeasureConfig, given)
    made = run.config(SampleConfig)
    prompts = [prompt for prompt in run.prompts() if run.file("rollouts", prompt.prompt_id).exists()]
    if not prompts:
        raise GradvarError(f"{run.path} holds no rollouts: run `gradvar sample {run.path}` first")
    folder = find_model(made.model, made.revision)
    agree_on_model(run, made.model, folder.weights_hash())
    device = made.device
    model = load_model(folder, dtype=made.dtype, device=device, trust_remote_code=made.trust_remote_code)
    targets = [target.key for target in resolve_targets(model, list(config.targets))]
    before = run.stored(MeasureConfig)
    if before:  # targets are additive: the run keeps the specs it was measured on
        specs = list(dict.fromkeys([*before["targets"], *config.targets]))
        config = agreed_config(run, MeasureConfig, {**given, "targets": specs})

    run.begin("measure", config, device=device)
    work = []
    for prompt in prompts:
        rollouts = run.rollouts(prompt.prompt_id)
        fresh = _is_fresh(run, prompt, rollouts)
        have = list(run.grams(prompt.prompt_id)) if fresh else []
        missing = [key for key in targets if key not in have]
        if not fresh and run.file("grams", prompt.prompt_id).exists():
            missing = list(dict.fromkeys([*run.grams(prompt.prompt_id), *missing]))
        work.append((prompt, rollouts, missing))
    total = sum(len(rollouts) for _, rollouts, _ in work)
    done = sum(len(rollouts) for _, rollouts, missing in work if not missing)
    if done < total:
        listener.say(f"measuring {total - done} responses on {', '.join(targets)} ({made.dtype}, {device})")
    with listener.task("measure", total, done) as advance:
        for prompt, rollouts, missing in work:
            if missing:
                _measure_prompt(run, config, made, model, prompt, rollouts, missing, advance)
    attention = str(getattr(model.config, "_attn_implementation", "unknown"))
    run.finish("measure", targets=targets, dtype=made.dtype, attention=attention)


def sampler_agreements(run: Run) -> dict[str, SamplerAgreement]:
    """Compare sampler and policy log-probabilities of every measured prompt that holds both."""
    found = {}
    for prompt_id in run.measured_prompt_ids():
        rollouts = run.rollouts(prompt_id)
        if not run.file("measures", prompt_id).exists():
            continue
        policy = run.measures(prompt_id).policy_logprobs
        rows = [
            (rollout.sampler_logprobs, logprobs, rollout.loss_mask)
            for rollout, logprobs in zip(rollouts, policy, strict=False)
            if rollout.sampler_logprobs is not None
        ]
        if rows:
            sampler, policies, masks = zip(*rows, strict=True)
            found[prompt_id] = sampler_agreement(sampler, policies, masks)
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


def _measure_prompt(
    run: Run,
    config: MeasureConfig,
    made: SampleConfig,
    model: Any,
    prompt: Prompt,
    rollouts: Sequence[Rollout],
    targets: list[str],
    advance: Advance,
) -> None:
    digest = rollouts_digest(rollouts)
    seen = 0

    def progress(done: int) -> None:  # the engine counts up, the listener takes steps
        nonlocal seen
        advance(done - seen)
        seen = done

    masks = None if all(r.loss_mask is None for r in rollouts) else [_mask(r) for r in rollouts]
    try:
        measured = measure_scores(
            model,
            list(prompt.token_ids),
            [list(rollout.token_ids) for rollout in rollouts],
            targets,
            loss_masks=masks,
            temperature=made.temperature,
            include_bias=config.include_bias,
            token_budget=config.token_budget,
            memory_budget=None if config.memory_budget is None else int(config.memory_budget * 2**30),
            rollout_ids=[rollout.rollout_id for rollout in rollouts],
            on_progress=progress,
        )
    except GradvarError as error:
        raise GradvarError(f"prompt {prompt.prompt_id!r}: {error}") from error
    fresh = _is_fresh(run, prompt, rollouts)
    if not fresh:
        run.write_measures(prompt.prompt_id, _measures(measured, rollouts))
    grams = {**(run.grams(prompt.prompt_id) if fresh else {}), **measured.grams}
    run.write_grams(prompt.prompt_id, grams, rollouts_digest=digest)
    run.log("grams written", prompt_id=prompt.prompt_id, targets=list(grams))


def _is_fresh(run: Run, prompt: Prompt, rollouts: Sequence[Rollout]) -> bool:
    """Whether Grams and measures are there and belong to these rollouts."""
    there = run.file("measures", prompt.prompt_id).exists()
    return there and run.grams_label(prompt.prompt_id) == rollouts_digest(rollouts)


def _mask(rollout: Rollout) -> list[int]:
    return [1] * len(rollout.token_ids) if rollout.loss_mask is None else list(rollout.loss_mask)


def _measures(measured: ScoreMeasurement, rollouts: Sequence[Rollout]) -> Measures:
    masks = [np.array(_mask(rollout), dtype=np.float64) for rollout in rollouts]
    proxies = [
        float(mask @ (1 - 2 * np.exp(logprobs.astype(np.float64)) + collision))
        for mask, logprobs, collision in zip(masks, measured.logprobs, measured.collision, strict=True)
    ]
    entropies = [float(mask @ entropy) for mask, entropy in zip(masks, measured.entropy, strict=True)]
    return Measures(
        rollout_ids=tuple(rollout.rollout_id for rollout in rollouts),
        policy_logprobs=[logprobs.astype(np.float32) for logprobs in measured.logprobs],
        entropy=np.array(entropies),
        proxy=np.array(proxies),
    )
