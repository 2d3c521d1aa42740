"""How large a group: CV, efficiency and silent share against group size, and the responses that CV <= 1 takes.

Up to a third of the responses the CV is estimated; beyond, extrapolated by CV^2 proportional to 1/n from the largest
estimated size, and marked so; its ends allow for n CV^2 going on as it changed up to there (`extrapolated_cv`). A pool
goes as far as its smallest prompt, so that all its sizes are of the same prompts and what changes with n is n's;
`method` names the prompt that ends it before others would. The noise scale of a rule, in responses, is n CV^2:
tr Sigma / ||E ghat||^2 per response (that of the gradient itself, of no rule, is in `noise_scale`). The efficiency
eta = cos^2 rho goes on with the same law, its direction kept:

    eta(n) = <E ghat, grad J>^2 / (||grad J||^2 (||E ghat||^2 + tr Var(ghat) n0 / n))

Shape letters: N responses, n of a group, n0 of the largest estimated one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from gradvar.errors import GradvarError
from gradvar.estimators.advantages import check_advantage
from gradvar.estimators.aggregation import Rule, expand_rules, find_rule
from gradvar.estimators.bias import Statistic, eta_estimate, is_direction_known, jackknifed, log_noise
from gradvar.estimators.cv import SILENT, UNRESOLVED, cv_from_rho, pooled_rho, resolution
from gradvar.estimators.enough import responses_for_cv_1
from gradvar.estimators.group_products import Layout
from gradvar.estimators.groups import PERMUTATIONS, GroupMoments, draw_groups, variant_coefficients
from gradvar.estimators.inputs import arrange, generator, why_nothing
from gradvar.estimators.intervals import (
    MINIMUM_PROMPTS,
    PROMPTS_LIKE_THESE,
    THESE_PROMPTS,
    check_level,
)
from gradvar.estimators.silent_shares import silent_estimate, silent_rows
from gradvar.estimators.tails import LengthTails, PromptTails
from gradvar.estimators.update_products import Array, Products, moments_of_updates, products, reward_direction
from gradvar.runs.records import Estimate, PromptScores, TableRow, estimate_table, no_estimate

SIZES = (4, 8, 16, 32, 64, 128)
"""Sizes for which the CV is estimated, or extrapolated where the rollouts do not hold three such groups."""


def parse_variant(text: str) -> tuple[str, float | None]:
    """Return rule and alpha of "grpo" or "vl_norm:0.75".

    Raises:
        GradvarError: No such rule, no alpha where one is needed or one where none is, or no number.
    """
    name, colon, alpha = text.partition(":")
    rule = find_rule(name)
    if not rule.takes_alpha:
        if colon:
            raise GradvarError(f"--plan-rule: {rule.name} takes no alpha, received {text!r}: leave :{alpha} out")
        return rule.name, None
    try:
        value = float(alpha)
    except ValueError:
        raise GradvarError(
            f"--plan-rule: expected {rule.name} with its alpha, for example {rule.name}:1, received {text!r}"
        ) from None
    expand_rules((rule.name,), (value,))
    return rule.name, value


def planning_table(
    groups: Sequence[PromptScores],
    *,
    rule: str = "grpo",
    alpha: float | None = None,
    further: Sequence[tuple[str, float | None]] = (),
    sizes: Sequence[int] = SIZES,
    advantage: str = "grpo",
    level: float = 0.95,
    permutations: int = PERMUTATIONS,
    seed: int,
) -> pd.DataFrame:
    """CV and efficiency against group size for one rule or several, per prompt and pooled over prompts.

    Quantities, for every target: "rho", "cv" and "eta" at each size (verdict "resolved", "unresolved" or
    "extrapolated"; no rho where extrapolated; an eta without a resolved direction is NaN and "unresolved" anywhere),
    "silent_share" where it can be counted (pooled: the mean over all prompts; of no rule, told beside the first), and
    "responses_for_cv_1": the
    noise scale n CV^2 in responses to a prompt, with the image of that CV's interval, at the smallest estimated size
    whose CV is at most 1, else at the largest (`responses_for_cv_1`; verdict "at most" where the smallest size is
    enough already). Pooled rows are estimated at sizes of which every prompt of the pool holds three groups. They come
    for both estimands (`estimand`).

    Args:
        groups: Prompts by targets; several targets get their sum as well.
        rule: Name for `aggregation_weights`.
        alpha: Exponent of vl_norm.
        further: Further rules with their alphas (`parse_variant`), on the same groups.
        sizes: Group sizes, at least 2.
        advantage: Kind of `advantages`, computed inside each group.
        level: Nominal coverage.
        permutations: Random permutations a prompt and size.
        seed: Of the permutations.

    Returns:
        The table. Silent prompts, and those without three groups of the smallest size, are left out and said in one
        "cv" row.

    Raises:
        GradvarError: Unknown rule or advantage, or a size below 2.
    """
    check_level(level)
    check_advantage(advantage)
    variants = [expand_rules((name,), () if a is None else (a,))[0] for name, a in ((rule, alpha), *further)]
    ordered = sorted(set(sizes))
    if not ordered or ordered[0] < 2:
        raise GradvarError(f"sizes must be at least 2, received {list(sizes)}")
    rows: list[TableRow] = []
    targets = arrange(groups)
    loud = {name: s.verified() for own in targets.values() for name, s in own.items() if not _why(s, advantage)}
    drawn: Drawn = {target: {n: {} for n in ordered} for target in targets}
    ends: dict[tuple[str, str], PromptTails] = {}
    for name, scores in loud.items():
        grams = {
            target: own[name].verified().gram
            for target, own in targets.items()
            if name in own and not _why(own[name], advantage)
        }
        for n in ordered:
            if 3 * n <= len(scores.lengths):
                chosen = draw_groups(len(scores.lengths), n, permutations, rng=generator(seed, name, "groups"))
                for target, one in _products_of_targets(grams, scores, chosen, variants, advantage).items():
                    drawn[target][n][name] = one
        for target, gram in grams.items():
            ends[target, name] = PromptTails.of(
                gram, scores.rewards, scores.lengths, advantage=advantage, max_length=scores.max_length
            )
    for (target, prompts), (k, (found, a)) in itertools.product(targets.items(), enumerate(variants)):
        labels: dict[str, Any] = {"target": target, "rule": found.name, "alpha": a, "advantage": advantage}
        nothing = {name: why for name, s in prompts.items() if (why := _why(s, advantage)) is not None}
        used = {name: s.verified() for name, s in prompts.items() if name not in nothing}
        for name, scores in prompts.items():
            if name not in used:
                none = no_estimate(
                    f"not estimated; {nothing[name]}", n=len(scores.verified().lengths), level=level, seed=seed
                )
                told = {"estimand": THESE_PROMPTS}
                rows.append(
                    TableRow(quantity="cv", estimate=none, prompt_id=name, verdict=nothing[name], **labels, extra=told)
                )
        moments = {n: {name: one[k][0] for name, one in own.items()} for n, own in drawn[target].items()}
        aimed = {n: {name: one[k][1] for name, one in own.items()} for n, own in drawn[target].items()}
        tails: dict[str, LengthTails] = {}
        for name, scores in used.items():
            count = len(scores.lengths)
            tails[name] = ends[target, name].alone((found, a))
            for n in ordered:
                if n <= count and k == 0:
                    share = silent_estimate(scores.rewards, n, level=level, seed=seed)
                    rows.append(
                        TableRow(
                            quantity="silent_share",
                            estimate=share,
                            prompt_id=name,
                            group_size=n,
                            **labels,
                            extra={"estimand": THESE_PROMPTS},
                        )
                    )
        if len(prompts) > 1 and k == 0:
            rows += silent_rows(list(prompts.values()), ordered, labels, level=level, seed=seed)
        pools: list[tuple[str | None, list[str]]] = [(name, [name]) for name in used]
        for name in used:
            if name not in moments[ordered[0]]:
                note = f"not estimated; fewer than {3 * ordered[0]} verified responses"
                none = no_estimate(note, n=len(used[name].lengths), level=level, seed=seed)
                told = {"estimand": THESE_PROMPTS}
                rows.append(
                    TableRow(quantity="cv", estimate=none, prompt_id=name, verdict=UNRESOLVED, **labels, extra=told)
                )
        large = [name for name in used if name in moments[ordered[0]]]
        if large and len(prompts) > 1:
            pools.append((None, large))
        for label, names in pools:
            held = {n: [m[name] for name in names] for n, m in moments.items() if all(name in m for name in names)}
            pointed = {n: [aimed[n][name] for name in names] for n in held}
            limit = _limit({name: len(used[name].lengths) for name in names}, max(held, default=0), ordered)
            for across in (False, True) if label is None else (False,):
                extra = {"estimand": PROMPTS_LIKE_THESE if across else THESE_PROMPTS}
                named = {**labels, "prompt_id": label, "extra": extra}
                shared: dict[str, Any] = {"across": across, "level": level, "seed": seed}
                shared |= {"tails": [tails[name] for name in names], "limit": limit}
                rows += _rows_of_pool(held, ordered, named, **shared)
                rows += _efficiency_rows(pointed, ordered, named, **shared)
    return estimate_table(rows)


def _why(scores: PromptScores, advantage: str) -> str | None:
    """`why_nothing`; a prompt without verified response is silent."""
    return why_nothing(scores, advantage) or (SILENT if np.isnan(scores.rewards).all() else None)


def _limit(counts: Mapping[str, int], largest: int, sizes: Sequence[int]) -> str:
    """Name the prompt that holds three groups of no size beyond the largest, where another one would."""
    if not any(largest < n and 3 * n <= max(counts.values()) for n in sizes):
        return ""
    smallest = min(counts, key=lambda name: counts[name])
    return f", as prompt {smallest} with {counts[smallest]} responses holds three groups of no larger one"


Drawn = dict[str, dict[int, dict[str, list[tuple[GroupMoments, Products]]]]]
"""By target, group size and prompt, one pair a rule."""


def _products_of_targets(
    grams: Mapping[str, Array],
    scores: PromptScores,
    groups: NDArray[np.intp],
    variants: Sequence[tuple[Rule, float | None]],
    advantage: str,
) -> dict[str, list[tuple[GroupMoments, Products]]]:
    """One prompt's moments and products on the same groups for every target."""
    limit = float(scores.max_length) if scores.max_length > 0 else float(scores.lengths.max())
    c = variant_coefficients(groups, scores.rewards, scores.lengths, variants, advantage=advantage, max_length=limit)
    aim = reward_direction(scores.rewards, groups)[None]
    layout = Layout(groups=groups, kinds=np.concatenate([c, aim]), n_responses=len(scores.lengths))
    made: dict[str, list[tuple[GroupMoments, Products]]] = {}
    for target, gram in grams.items():
        every = products(gram, layout, 1)
        moments = moments_of_updates(gram, layout, every, len(variants))
        made[target] = [(one, every.of_updates(slice(k, k + 1))) for k, one in enumerate(moments)]
    return made


def _efficiency_rows(
    held: dict[int, list[Products]],
    sizes: Sequence[int],
    labels: dict[str, Any],
    *,
    tails: Sequence[LengthTails],
    limit: str,
    across: bool,
    level: float,
    seed: int,
) -> list[TableRow]:
    rows: list[TableRow] = []
    if not held:
        return rows
    largest, surest = max(held), 0.0
    known: dict[int, bool] = {}
    for n in sizes:
        far = n > largest
        if n not in held and not far:
            continue
        size = largest if far else n
        parts = held[size]
        method = "permutation groups, delete-one jackknife of log(1 - eta), t, moved by skewness"
        if across:
            way = "delete-one-prompt jackknife of log(1 - eta), t, no narrower than these prompts'"
            method = f"permutation groups, {way}; {PROMPTS_LIKE_THESE}"
        if far:
            method = f"extrapolated from n = {largest}, variance as 1/n{limit}; {method}"
        if across and len(parts) < MINIMUM_PROMPTS:
            note = f"{method}; not given below {MINIMUM_PROMPTS} prompts"
            count = sum(p.responses for p in parts)
            eta = no_estimate(note, n=count, clusters=len(parts), level=level, seed=seed)
        else:
            if size not in known:
                known[size] = is_direction_known(parts, level=level, across=across)
            noise = jackknifed(parts, _noise_at(largest / n if far else 1.0), across=across)
            told: dict[str, Any] = {"across": across, "known": known[size]}
            eta = eta_estimate(parts, noise, 0, level=level, method=method, tails=tails, **told)
            # More responses of the same direction: known at least as well as with fewer.
            if n >= largest and math.isfinite(eta.low):
                eta = replace(eta, low=max(eta.low, surest))
                surest = eta.low
            eta = replace(eta, seed=seed)
        verdict = "unresolved" if math.isnan(eta.value) else "extrapolated" if far else "resolved"
        rows.append(TableRow(quantity="eta", estimate=eta, group_size=n, verdict=verdict, **labels))
    return rows


def _noise_at(share: float) -> Statistic:
    """log(1 - eta) where a share of tr Var(ghat) is left."""

    def statistic(same: Array, cross: Array, mixed: Array, direction: Array) -> Array:
        left = same if share == 1.0 else cross + share * (same - cross)
        return log_noise(left, cross, mixed, direction)

    return statistic


def _rows_of_pool(
    held: dict[int, list[GroupMoments]],
    sizes: Sequence[int],
    labels: dict[str, Any],
    *,
    tails: Sequence[LengthTails],
    limit: str,
    across: bool,
    level: float,
    seed: int,
) -> list[TableRow]:
    rows: list[TableRow] = []
    estimated: dict[int, Estimate] = {}
    for n, parts in held.items():
        rho = replace(pooled_rho(parts, group_size=n, level=level, tails=tails)[int(across)], seed=seed)
        estimated[n], verdict = cv_from_rho(rho), resolution(rho)
        rows += [
            TableRow(quantity=name, estimate=estimate, group_size=n, verdict=verdict, **labels)
            for name, estimate in (("rho", rho), ("cv", estimated[n]))
        ]
    if not estimated:
        return rows
    largest = max(estimated)
    for n in sizes:
        if n > largest:
            note = f"extrapolated from n = {largest}, CV^2 as 1/n, ends as n CV^2 changed{limit}"
            far = extrapolated_cv(estimated, n)
            far = replace(far, method=f"{note}; {far.method}")
            rows.append(TableRow(quantity="cv", estimate=far, group_size=n, verdict=_extrapolated(far), **labels))
    size, needed, verdict = responses_for_cv_1(estimated)
    rows.append(TableRow(quantity="responses_for_cv_1", estimate=needed, group_size=size, verdict=verdict, **labels))
    return rows


def _extrapolated(cv: Estimate) -> str:
    return UNRESOLVED if math.isnan(cv.value) else "extrapolated"


def extrapolated_cv(estimated: Mapping[int, Estimate], n: int) -> Estimate:
    """CV at a group size beyond those estimated, CV^2 as 1/n from the largest, n0.

    That is exact only for weights and advantages that do not depend on the group. With the group's own baseline,
    standard deviation and total weight n CV^2 = a + b/n + ..., b from n0 and the largest size up to its half (sizes
    closer together tell noise): an end that b moves outwards goes along. Without, it was covered 90% at n = 32 where
    ||g||^2 grows like L^2 (N = 512).
    """
    sizes = sorted(estimated)
    last = estimated[sizes[-1]]
    whole, change = sizes[-1] * last.value**2, 0.0
    earlier = [size for size in sizes if 2 * size <= sizes[-1]]
    if earlier and whole > 0.0:
        size = earlier[-1]
        slope = (size * estimated[size].value ** 2 - whole) / (1.0 / size - 1.0 / sizes[-1])
        change = slope * (1.0 / n - 1.0 / sizes[-1]) / whole if math.isfinite(slope) else 0.0
    factor, moved = math.sqrt(sizes[-1] / n), math.sqrt(max(1.0 + change, 0.0))
    return replace(
        last,
        value=last.value * factor,
        low=last.low * factor * min(moved, 1.0),
        high=last.high * factor * max(moved, 1.0),
    )
