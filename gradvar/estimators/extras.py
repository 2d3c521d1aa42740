"""DAPO's extras with and without: overlong filtering, soft overlong punishment, dynamic sampling.

Each is set beside the plain update on the same permutations, so ratios and differences are paired. The reference of
bias stays grad J of the plain reward: a punished reward is another objective, and how far that turns the update is what
is asked. Shape letters: N responses, n of a group, B groups, P permutations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from gradvar.estimators.advantages import check_advantage
from gradvar.estimators.aggregation import Rule, expand_rules
from gradvar.estimators.bias import (
    Jackknifed,
    Products,
    cosine,
    estimate_of,
    jackknifed,
    products,
    reward_direction,
    within_one,
)
from gradvar.estimators.cv import SILENT, cv_from_rho, pooled_rho, resolution
from gradvar.estimators.groups import (
    PERMUTATIONS,
    GroupMoments,
    draw_groups,
    group_coefficients,
    loud_groups,
    moments_of_kinds,
    silent_share,
)
from gradvar.estimators.inputs import arrange, generator, is_silent
from gradvar.estimators.intervals import THESE_PROMPTS, check_level
from gradvar.estimators.ratios import pooled_cv_ratio
from gradvar.estimators.tails import LengthTails, length_tails
from gradvar.estimators.transforms import overlong_penalty
from gradvar.runs.records import Estimate, PromptScores, TableRow, estimate_table

Array = NDArray[np.float64]

NONE = "none"
FILTERING = "overlong filtering"
PUNISHMENT = "soft overlong punishment"
SAMPLING = "dynamic sampling"
BUFFER_SHARE = 0.2
"""DAPO's punishment interval over its maximum length: 4096 of 20480 tokens."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Prompt:
    """One prompt and target: moments of each extra, products of those that may turn the update."""

    moments: dict[str, GroupMoments]
    turned: Products
    """Of NONE, FILTERING and PUNISHMENT."""
    tails: dict[str, LengthTails]


def extras_table(
    groups: Sequence[PromptScores],
    *,
    rules: Sequence[str] = ("grpo", "dapo"),
    group_size: int = 8,
    advantage: str = "grpo",
    buffer: float | None = None,
    level: float = 0.95,
    permutations: int = PERMUTATIONS,
    seed: int,
) -> pd.DataFrame:
    """CV and direction of an update with each of DAPO's extras, beside the plain one (column `extra`).

    Quantities, for every target, per prompt and over these prompts:
        "cv"                  total CV; `extra` "none", "overlong filtering" (truncated responses carry no loss, their
                              reward stays in the baseline), "soft overlong punishment" (added to the reward) or
                              "dynamic sampling" (given that a group's rewards differ)
        "cv_ratio"            over the plain update's, paired; verdict "lower", "higher", "undetermined", "unresolved"
        "cosine"              of E ghat with grad J of the plain reward
        "cosine_difference"   to the plain update's, paired; verdict likewise
        "affected"            share of responses (of groups, for dynamic sampling) that the extra changes
    Dynamic sampling has no rows of direction where a silent group's update is 0: E ghat only grows longer.

    Args:
        groups: Prompts by targets; several targets get their sum as well.
        rules: Rules that take no alpha.
        group_size: n, responses of one update.
        advantage: Kind of `advantages`, computed inside each group.
        buffer: Length of the punishment interval in tokens; None takes a fifth of the maximum length, as DAPO does.
        level: Nominal coverage.
        permutations: Random permutations a prompt.
        seed: Of the permutations.

    Returns:
        The table. Silent prompts get one "cv" row that says so, those with fewer than 3 group_size verified responses
        likewise; neither counts in pooled rows.

    Raises:
        GradvarError: Unknown rule or advantage, a rule that takes alpha, or a buffer that does not fit.
    """
    check_level(level)
    check_advantage(advantage)
    variants = [rule for rule, _ in expand_rules(rules, ())]
    targets = arrange(groups)
    rows: list[TableRow] = []
    found: dict[tuple[str, str], dict[str, _Prompt]] = {}
    everyone = {name: scores for prompts in targets.values() for name, scores in prompts.items()}
    for name, raw in everyone.items():
        scores = raw.verified()
        n = len(scores.lengths)
        common: dict[str, Any] = {"prompt_id": name, "advantage": advantage, "group_size": group_size}
        if is_silent(raw) or n < 3 * group_size:
            why = SILENT if is_silent(raw) else f"fewer than {3 * group_size} verified responses"
            none = _plain(math.nan, level, f"not estimated; {why}", n, seed)
            verdict = SILENT if is_silent(raw) else "unresolved"
            extra = {"extra": None, "estimand": THESE_PROMPTS}
            rows += [
                TableRow(quantity="cv", estimate=none, target=target, verdict=verdict, extra=extra, **common)
                for target, prompts in targets.items()
                if name in prompts
            ]
            continue
        limit = float(scores.max_length) if scores.max_length > 0 else float(scores.lengths.max())
        interval = BUFFER_SHARE * limit if buffer is None else buffer
        penalty = overlong_penalty(scores.lengths, max_length=limit, buffer=interval)
        drawn = draw_groups(n, group_size, permutations, rng=generator(seed, name, "groups"))
        shares = {
            FILTERING: float(scores.truncated.mean()),
            PUNISHMENT: float((penalty < 0).mean()),
            SAMPLING: silent_share(scores.rewards, group_size),
        }
        for target, prompts in targets.items():
            if name not in prompts:
                continue
            rows += [
                TableRow(
                    quantity="affected",
                    estimate=_plain(share, level, "share, no interval", n, seed),
                    target=target,
                    extra={"extra": extra, "estimand": THESE_PROMPTS},
                    **common,
                )
                for extra, share in shares.items()
            ]
            gram = prompts[name].verified().gram
            for rule in variants:
                mine = found.setdefault((target, rule.name), {})
                mine[name] = _prompt(gram, scores, drawn, rule, advantage, limit, penalty)
    for (target, rule_name), prompts_of_rule in found.items():
        pools = [(name, [one]) for name, one in prompts_of_rule.items()]
        if len(prompts_of_rule) > 1:
            pools.append((None, list(prompts_of_rule.values())))  # type: ignore[arg-type]
        for label, pool in pools:
            rows += [
                replace(
                    row,
                    estimate=replace(row.estimate, seed=seed),
                    target=target,
                    prompt_id=label,
                    rule=rule_name,
                    advantage=advantage,
                    scope="prompt group",
                    group_size=group_size,
                )
                for row in _rows_of_pool(pool, group_size, level)
            ]
    return estimate_table(rows)


def _prompt(
    gram: Array,
    scores: PromptScores,
    drawn: NDArray[np.intp],
    rule: Rule,
    advantage: str,
    limit: float,
    penalty: Array,
) -> _Prompt:
    options: dict[str, Any] = {"advantage": advantage, "max_length": limit}
    plain = group_coefficients(drawn, scores.rewards, scores.lengths, rule, **options)
    filtered = group_coefficients(drawn, scores.rewards, scores.lengths, rule, masked=scores.truncated, **options)
    punished = group_coefficients(drawn, scores.rewards + penalty, scores.lengths, rule, **options)
    kinds = np.stack([plain, filtered, punished])
    three = moments_of_kinds(gram, drawn, kinds)
    given = moments_of_kinds(gram, drawn, plain[None], loud_groups(drawn, scores.rewards))
    as_is, less = (
        length_tails(gram, rewards, scores.lengths, (rule, None), advantage=advantage, max_length=limit)
        for rewards in (scores.rewards, scores.rewards + penalty)
    )
    return _Prompt(
        tails={NONE: as_is, FILTERING: as_is, PUNISHMENT: less, SAMPLING: as_is},
        moments=dict(zip((NONE, FILTERING, PUNISHMENT, SAMPLING), [*three, *given], strict=True)),
        turned=products(gram, drawn, kinds, reward_direction(scores.rewards, drawn)[None]),
    )


def _rows_of_pool(pool: Sequence[_Prompt], group_size: int, level: float) -> list[TableRow]:
    rows: list[TableRow] = []
    plain = [one.moments[NONE] for one in pool]
    for extra in (NONE, FILTERING, PUNISHMENT, SAMPLING):
        mine = [one.moments[extra] for one in pool]
        tails = [one.tails[extra] for one in pool]
        rho = pooled_rho(mine, group_size=group_size, level=level, tails=tails)[0]
        rows.append(_row("cv", cv_from_rho(rho), extra, resolution(rho)))
        if extra != NONE:
            ratio = pooled_cv_ratio(mine, plain, group_size=group_size, level=level)
            rows.append(_row("cv_ratio", ratio, extra, _side(ratio, 1.0)))
    angles = jackknifed([one.turned for one in pool], cosine)
    method = "permutation groups, delete-one jackknife, t"
    for k, extra in enumerate((NONE, FILTERING, PUNISHMENT)):
        rows.append(_row("cosine", within_one(estimate_of(angles, k, level=level, method=method)), extra, None))
        if k:
            turned = estimate_of(_minus_first(angles), k, level=level, method=f"paired difference; {method}")
            rows.append(_row("cosine_difference", turned, extra, _side(turned, 0.0)))
    return rows


def _minus_first(result: Jackknifed) -> Jackknifed:
    return replace(
        result,
        value=result.value - result.value[0],
        replicates=[replicate - replicate[:, :1] for replicate in result.replicates],
        surplus=None,
    )


def _side(estimate: Estimate, same: float) -> str:
    if math.isnan(estimate.value):
        return "unresolved"
    return "higher" if estimate.low > same else "lower" if estimate.high < same else "undetermined"


def _row(quantity: str, estimate: Estimate, extra: str, verdict: str | None) -> TableRow:
    told = {"extra": extra, "estimand": THESE_PROMPTS}
    return TableRow(quantity=quantity, estimate=estimate, target="", verdict=verdict, extra=told)


def _plain(value: float, level: float, method: str, n: int, seed: int) -> Estimate:
    return Estimate(value=value, low=math.nan, high=math.nan, level=level, method=method, n=n, clusters=1, seed=seed)
