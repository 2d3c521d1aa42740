"""Stage check: how far the numbers of a run can be trusted.

The gradients of chosen responses against float32 with plain attention, alone and in a batch; the score identity; the
sampler's log-probabilities against the policy's; the entropy balance; how much of the score's square is its mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from gradvar.errors import GradvarError
from gradvar.estimators.identity_tables import identity_table
from gradvar.gradients import PrecisionCheck, check_precision, float32_reference
from gradvar.models import BALANCED, ModelFolder, find_model, load_model, load_tokenizer
from gradvar.runs import (
    Estimate,
    EstimateConfig,
    MeasureConfig,
    Prompt,
    PromptScores,
    Rollout,
    Run,
    SampleConfig,
    TableRow,
    estimate_table,
)
from gradvar.runs.config import resolve
from gradvar.runs.provenance import utc_now
from gradvar.stages.agreement import response_differences, sampler_agreements, worst_tokens
from gradvar.stages.entropy import entropy_rows
from gradvar.stages.groups import estimated_groups
from gradvar.stages.identity import agree_on_model, agreed_config, measured_attention
from gradvar.stages.listener import Listener, Silent

LIMIT = 0.05
"""Relative error of a gradient or of D above which it is called imprecise."""
CROWDED = 0.5
"""||mean s||^2 / E||s||^2 from which rounding counts more than twice in D, a small difference of large numbers."""
WORST = 5
"""Tokens shown."""
_METHOD = "against float32 with eager attention, each response alone"


def check(
    run: Run,
    given: Mapping[str, Any],
    listener: Listener | None = None,
    *,
    responses: int = 4,
    prompts: int = 1,
    attention: str | None = None,
) -> pd.DataFrame:
    """Check the measurement of a run; write and return the table `check`.

    Quantities: "gradient_error" ||s - s_ref|| / ||s_ref||, "gradient_cosine", "norm_error", "deviation_error"
    D / D_ref - 1 and "logprob_error" (mean over tokens, nats) by response, `scope` "alone" or "in a batch", and the
    largest of them over all with its verdict; "identity_signal"; "entropy_surplus"; "mean_share"
    ||mean s||^2 / E||s||^2 and "condition", the factor by which it magnifies rounding in D; "sampler_mean_abs",
    "sampler_max_abs", "sampler_response_max" (a response's summed difference) and "sampler_worst_token" in nats,
    `rollout_id` and `token` saying which.

    Args:
        run: A run with Grams.
        given: Settings of `EstimateConfig` given now.
        listener: Who is told.
        responses: How many responses of a prompt are measured again, from the shortest to the longest.
        prompts: How many prompts they are taken from.
        attention: Attention implementation, as in `MeasureConfig`; None: the run's.

    Raises:
        GradvarError: Nothing was measured, or counts that mean nothing.
    """
    listener = listener or Silent()
    for name, count, least in (("responses", responses, 2), ("prompts", prompts, 1)):
        if count < least:
            raise GradvarError(f"--{name}: expected at least {least}, received {count}")
    config = agreed_config(run, EstimateConfig, given)
    started = utc_now()
    groups = estimated_groups(run, listener)
    if attention is not None:
        resolve(MeasureConfig, {"attention": attention})  # refuses what there is not
    rows = _precision_rows(run, config, listener, responses, prompts, attention)
    rows += _condition_rows(groups, config)
    rows += _sampler_rows(run, config)
    tables = [estimate_table(rows), identity_table(groups, seed=config.seed, level=config.level)]
    tables.append(entropy_rows(run, groups, config.level, config.seed))
    table = pd.concat([one for one in tables if len(one)], ignore_index=True)
    table = table.astype({name: "Int64" for name in ("rollout_id", "token", "token_id") if name in table})
    run.begin("check", config, started=started)
    run.write_estimates("check", table)
    run.finish("check")
    return table


def _precision_rows(
    run: Run, config: EstimateConfig, listener: Listener, responses: int, prompts: int, attention: str | None
) -> list[TableRow]:
    made, chosen = run.config(SampleConfig), run.measured_prompt_ids()[:prompts]
    folder = find_model(made.model, made.revision)
    agree_on_model(run, made.model, folder.weights_hash())
    model = load_model(
        folder, dtype=made.dtype, device=made.device, trust_remote_code=made.trust_remote_code,
        attention=attention or measured_attention(run) or "auto",
    )  # fmt: skip
    if made.device == BALANCED:  # an offloaded model cannot be copied
        reference = load_model(
            folder,
            dtype=made.dtype if made.dtype == "float64" else "float32",
            device=made.device,
            trust_remote_code=made.trust_remote_code,
            attention="eager",
        )
    else:
        reference = float32_reference(model)
    known, kept = {p.prompt_id: p for p in run.prompts()}, {s.prompt_id: s for s in run.scores()}
    rows: list[TableRow] = []
    with listener.task("check", 2 * len(chosen)) as advance:
        for name in chosen:
            picked = _spread([r for r in run.rollouts(name) if r.rollout_id in kept[name].rollout_ids], responses)
            for scope, budget in (("in a batch", None), ("alone", 1)):
                found = _precision(run, model, reference, known[name], picked, budget)
                rows += _response_rows(found, name, scope, picked, config)
                advance(1)
    return [*_summary_rows(rows, config, run.config(MeasureConfig).logprob_limit), *rows]


def _precision(
    run: Run, model: Any, reference: Any, prompt: Prompt, picked: Sequence[Rollout], budget: int | None
) -> PrecisionCheck:
    masks = [[1] * len(r.token_ids) if r.loss_mask is None else list(r.loss_mask) for r in picked]
    return check_precision(
        model,
        list(prompt.token_ids),
        [list(rollout.token_ids) for rollout in picked],
        run.targets,
        loss_masks=masks,
        temperature=run.config(SampleConfig).temperature,
        include_bias=run.config(MeasureConfig).include_bias,
        token_budget=budget,
        rollout_ids=[rollout.rollout_id for rollout in picked],
        reference=reference,
    )


def _spread(rollouts: Sequence[Rollout], count: int) -> list[Rollout]:
    """Return `count` rollouts from the shortest to the longest, evenly by rank."""
    ranked = sorted(rollouts, key=lambda rollout: (len(rollout.token_ids), rollout.rollout_id))
    places = np.linspace(0, len(ranked) - 1, min(count, len(ranked))).round().astype(int)
    return [ranked[place] for place in dict.fromkeys(places.tolist())]


def _response_rows(
    found: PrecisionCheck, prompt_id: str, scope: str, picked: Sequence[Rollout], config: EstimateConfig
) -> list[TableRow]:
    rows = []
    for row in found.rows:
        values = {
            "gradient_error": row.gradient_error,
            "gradient_cosine": row.cosine,
            "norm_error": row.norm_error,
            "deviation_error": row.deviation_error,
        }
        labels: dict[str, Any] = {"target": row.target, "prompt_id": prompt_id, "scope": scope}
        extra = {"rollout_id": row.rollout_id}
        rows += [
            TableRow(quantity=name, estimate=_plain(value, config), extra=extra, **labels)
            for name, value in values.items()
        ]
    for rollout, ours, exact in zip(picked, found.logprobs, found.reference_logprobs, strict=True):
        error = float(np.abs(ours - exact).mean())
        labels = {"target": "any", "prompt_id": prompt_id, "scope": scope, "extra": {"rollout_id": rollout.rollout_id}}
        rows.append(TableRow(quantity="logprob_error", estimate=_plain(error, config), **labels))
    return rows


def _summary_rows(rows: Sequence[TableRow], config: EstimateConfig, logprob_limit: float) -> list[TableRow]:
    """Return the largest error of each kind by target and scope, over all responses checked, with its verdict."""
    found: dict[tuple[str, str, str], list[float]] = {}
    for row in rows:
        if row.quantity in ("gradient_error", "deviation_error", "logprob_error"):
            found.setdefault((row.quantity, row.target, str(row.scope)), []).append(abs(row.estimate.value))
    summary = []
    for (quantity, target, scope), errors in found.items():
        worst = float(np.max(errors))  # NaN where one is: then nothing is known
        verdict = "precise" if worst <= (logprob_limit if quantity == "logprob_error" else LIMIT) else "imprecise"
        estimate = _plain(worst, config, n=len(errors))
        summary.append(
            TableRow(quantity=f"largest_{quantity}", estimate=estimate, target=target, scope=scope, verdict=verdict)
        )
    return summary


def _condition_rows(groups: Sequence[PromptScores], config: EstimateConfig) -> list[TableRow]:
    rows = []
    for group in groups:
        whole, mean = float(np.diagonal(group.gram).mean()), float(group.gram.mean())
        share = mean / whole if whole > 0 else math.nan
        verdict = "D loses digits" if share > CROWDED else "well conditioned"
        method = "plug-in: mean of all S_ij over mean of S_ii"
        labels: dict[str, Any] = {"target": group.target, "prompt_id": group.prompt_id}
        for quantity, value in (("mean_share", share), ("condition", 1 / (1 - share) if share < 1 else math.inf)):
            estimate = _plain(value, config, n=len(group.lengths), method=method)
            rows.append(TableRow(quantity=quantity, estimate=estimate, verdict=verdict, **labels))
    return rows


def _sampler_rows(run: Run, config: EstimateConfig) -> list[TableRow]:
    limit, rows = run.config(MeasureConfig).logprob_limit, []
    method = "sampler's log-probabilities against those of the measuring pass"
    for name, one in sampler_agreements(run).items():
        verdict = "agree" if one.mean_abs <= limit else "disagree"
        for quantity, value in (("sampler_mean_abs", one.mean_abs), ("sampler_max_abs", one.max_abs)):
            estimate = _plain(value, config, n=one.n_tokens, method=method)
            rows.append(
                TableRow(quantity=quantity, estimate=estimate, target="any", prompt_id=name, verdict=verdict)
            )  # fmt: skip
    for name, found in response_differences(run).items():
        worst = max(found, key=lambda each: abs(each.difference))
        estimate = _plain(worst.difference, config, n=len(found), method=f"{method}, summed over the response")
        extra: dict[str, Any] = {"rollout_id": worst.rollout_id}
        rows.append(
            TableRow(quantity="sampler_response_max", estimate=estimate, target="any", prompt_id=name, extra=extra)
        )
    tokens = worst_tokens(run, WORST)
    texts = _texts(run, [token.token_id for token in tokens])
    for token in tokens:
        extra = {
            "rollout_id": token.rollout_id,
            "token": token.token,
            "token_id": token.token_id,
            "text": texts.get(token.token_id),
            "sampler_logprob": token.sampler,
            "policy_logprob": token.policy,
        }
        estimate = _plain(token.difference, config, method=method)
        rows.append(
            TableRow(
                quantity="sampler_worst_token", estimate=estimate, target="any", prompt_id=token.prompt_id, extra=extra
            )
        )
    return rows


def _texts(run: Run, token_ids: Sequence[int]) -> dict[int, str]:
    """Return what the tokens say; nothing where the model has no tokenizer, as it may be for imported rollouts."""
    made = run.config(SampleConfig)
    folder: ModelFolder = find_model(made.model, made.revision)
    try:
        tokenizer = load_tokenizer(folder, trust_remote_code=made.trust_remote_code)
    except GradvarError:
        return {}
    return {token: str(tokenizer.decode([token], clean_up_tokenization_spaces=False)) for token in token_ids}


def _plain(value: float, config: EstimateConfig, *, n: int = 1, method: str = _METHOD) -> Estimate:
    """Return a number that has no interval."""
    nothing = math.nan
    return Estimate(
        value=value, low=nothing, high=nothing, level=config.level, method=method, n=n, clusters=1, seed=config.seed
    )
