"""Which alpha: efficiency, bias and pressure of every rule, and curves over alpha. The advice is in `advice`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from gradvar.errors import GradvarError
from gradvar.estimators.advantages import check_advantage
from gradvar.estimators.aggregation import Rule, expand_rules, find_rule
from gradvar.estimators.best_alpha import best_of_curve
from gradvar.estimators.bias import (
    cosine,
    estimate_of,
    eta_estimate,
    gated,
    inner_product,
    jackknifed,
    log_efficiency,
    log_noise,
    log_rho,
    pressure,
    scale,
    what_is_known,
)
from gradvar.estimators.cosines import cosine_estimate
from gradvar.estimators.cv import NO_GRADIENT, SILENT, UNRESOLVED
from gradvar.estimators.eta_ratios import eta_ratios
from gradvar.estimators.group_products import Layout
from gradvar.estimators.groups import PERMUTATIONS, draw_groups, variant_coefficients
from gradvar.estimators.inputs import arrange, generator, has_gradient, is_silent
from gradvar.estimators.intervals import MINIMUM_PROMPTS, PROMPTS_LIKE_THESE, THESE_PROMPTS, check_level
from gradvar.estimators.pairs import pair_covariance
from gradvar.estimators.paper_order import side
from gradvar.estimators.surplus import of_log_efficiency, of_log_rho
from gradvar.estimators.tails import PromptTails
from gradvar.estimators.update_products import (
    Array,
    Products,
    entropy_direction,
    length_direction,
    products,
    reward_direction,
)
from gradvar.runs.records import Estimate, PromptScores, TableRow, estimate_table

ALPHA_GRID = tuple(np.arange(13) * 0.25)
"""0 to 3 by quarters."""

_JACKKNIFE = f"permutation groups, delete-one jackknife, t, moved by skewness; {THESE_PROMPTS}"
_ACROSS = f"permutation groups, delete-one-prompt jackknife, t, no narrower than these prompts'; {PROMPTS_LIKE_THESE}"


@dataclass(frozen=True, kw_only=True, eq=False)
class _Studied:
    """One prompt and target."""

    products: Products
    pairs: Array
    """(2 R, 2 R) `pair_covariance` of all kinds of update."""
    tails: PromptTails


def alpha_table(
    groups: Sequence[PromptScores],
    *,
    rules: Sequence[str] = ("grpo", "dapo", "dr_grpo"),
    grid: Sequence[float] = ALPHA_GRID,
    further: Sequence[float] = (),
    group_size: int = 8,
    advantage: str = "grpo",
    level: float = 0.95,
    permutations: int = PERMUTATIONS,
    seed: int,
) -> pd.DataFrame:
    """Efficiency, bias and pressure of rules and of VL Norm over a grid of alpha, per prompt and pooled.

    Quantities, for every target; pooled rows sum the inner products over prompts (an equal-prompt summary),
    for these prompts and, from 4 on, for prompts like these (`estimand`):
        "eta"                  efficiency cos^2 rho; 1 - eta is the least relative squared error of one update
        "cosine", "scale"      of E ghat against grad J (rloo, unbiased); these, eta and pressures are "unresolved"
                               where what they are divided by is not told apart from 0
        "length_product"       <E ghat, grad E[L]>; verdict "up", "down"
        "length_pressure"      the same over <E ghat, grad J>, which makes rules of any scale comparable: tokens of
                               E[L] gained for one unit of expected reward along E ghat; the same verdict
        "entropy_product", "entropy_pressure"   likewise of entropy in nats, where log-probabilities were measured
        "alpha_star_eta"       argmax of eta over the grid's range, between its points too; low and high the alphas
                               around it at which the curve's slope is not told apart from 0; an end on the grid's first
                               or last alpha is open, which `method` says
        "alpha_star_cv"        argmin of the CV likewise
        "eta_ratio"            eta over that of VL Norm at its best alpha by eta, paired (`eta_ratios`); `against` and
                               `against_alpha` name the reference; verdict "lower", "higher", "equal" (1 up to
                               rounding), "undetermined" or "unresolved"

    Args:
        groups: Prompts by targets; several targets get their sum as well.
        rules: Rules beside VL Norm.
        grid: Alphas of VL Norm, ascending.
        further: Alphas of VL Norm that have rows too and take no part in the argmax.
        group_size: n, responses of one update.
        advantage: Kind of `advantages`, computed inside each group.
        level: Nominal coverage.
        permutations: Random permutations a prompt; the same as `cv_table`'s at the same seed.
        seed: Of the permutations.

    Returns:
        The table. Prompts with equal rewards, without gradient, or with fewer than 3 group_size verified responses, are
        left out of the pooled rows and get one "eta" row that says why; there may be no others.

    Raises:
        GradvarError: Unknown rule or advantage, fewer than two alphas, or no prompt with two groups.
    """
    check_level(level)
    check_advantage(advantage)
    if len(grid) < 2 or sorted(set(grid)) != list(grid):
        raise GradvarError(f"grid must hold at least two ascending alphas, received {list(grid)}")
    beside = expand_rules(("vl_norm",), further) if further else []
    curve = expand_rules(("vl_norm",), grid)
    variants = [*expand_rules(rules, grid), *(variant for variant in beside if variant not in curve), *curve]
    targets = arrange(groups)
    everyone = {name: scores for prompts in targets.values() for name, scores in prompts.items()}
    rows: list[TableRow] = []
    made_of: dict[tuple[str, str], _Studied] = {}
    reasons: dict[str, str] = {}
    for name, raw in everyone.items():
        scores = raw.verified()
        n = len(scores.lengths)
        if is_silent(raw):
            reasons[name] = SILENT
        elif n < 3 * group_size:
            reasons[name] = f"{UNRESOLVED}: fewer than {3 * group_size} verified responses"
        else:
            chosen = draw_groups(n, group_size, permutations, rng=generator(seed, name, "groups"))
            limit = float(scores.max_length) if scores.max_length > 0 else float(scores.lengths.max())
            updates = variant_coefficients(
                chosen, scores.rewards, scores.lengths, variants, advantage=advantage, max_length=limit
            )
            aims = [reward_direction(scores.rewards, chosen), length_direction(scores.lengths, chosen)]
            if scores.log_probs is not None:
                aims.append(entropy_direction(scores.log_probs, chosen))
            layout = Layout(groups=chosen, kinds=np.concatenate([updates, aims]), n_responses=n)
            first = len(updates)
            # All targets of a prompt at once, so that only one prompt's groups are held at a time.
            for target, prompts in targets.items():
                if name in prompts:
                    gram = prompts[name].verified().gram
                    made_of[target, name] = _Studied(
                        products=products(gram, layout, len(aims)),
                        pairs=pair_covariance(gram, layout.means[:first], layout.means[first]),
                        tails=PromptTails.of(
                            gram,
                            scores.rewards,
                            scores.lengths,
                            advantage=advantage,
                            max_length=scores.max_length,
                        ),
                    )
    if max(len(scores.verified().lengths) for scores in everyone.values()) < 2 * group_size and SILENT not in (
        reasons.values()
    ):
        raise GradvarError(
            f"group size {group_size} needs at least {2 * group_size} verified responses to a prompt: "
            "sample more, or ask for a smaller group"
        )
    for target, prompts in targets.items():
        found: dict[str, _Studied] = {}
        for name, scores in prompts.items():
            why = NO_GRADIENT if not has_gradient(scores) else reasons.get(name)
            if why is not None:
                estimate = Estimate(
                    value=math.nan,
                    low=math.nan,
                    high=math.nan,
                    level=level,
                    method=f"not estimated; {why}",
                    n=len(scores.verified().lengths),
                    clusters=1,
                    seed=seed,
                )
                rows.append(
                    TableRow(
                        quantity="eta",
                        estimate=estimate,
                        target=target,
                        prompt_id=name,
                        advantage=advantage,
                        group_size=group_size,
                        verdict=UNRESOLVED if why.startswith(UNRESOLVED) else why,
                        extra={"estimand": THESE_PROMPTS},
                    )
                )
                continue
            found[name] = made_of[target, name]
        ways: list[tuple[str | None, list[str], bool]] = [(name, [name], False) for name in found]
        if found and len(prompts) > 1:
            ways.append((None, list(found), False))
        if len(found) >= MINIMUM_PROMPTS:
            ways.append((None, list(found), True))
        for name_or_none, names, across in ways:
            written = _rows_of_pool(
                [found[name] for name in names],
                variants,
                grid,
                group_size=group_size,
                level=level,
                across=across,
            )
            rows += [
                replace(
                    row,
                    estimate=replace(row.estimate, seed=seed),
                    target=target,
                    prompt_id=name_or_none,
                    advantage=advantage,
                    scope="prompt group",
                    group_size=group_size,
                    extra={
                        "against": None,
                        "against_alpha": math.nan,
                        **row.extra,
                        "estimand": PROMPTS_LIKE_THESE if across else THESE_PROMPTS,
                    },
                )
                for row in written
            ]
    return estimate_table(rows)


def _rows_of_pool(
    studied: Sequence[_Studied],
    variants: Sequence[tuple[Rule, float | None]],
    grid: Sequence[float],
    *,
    group_size: int,
    level: float,
    across: bool,
) -> list[TableRow]:
    way = _ACROSS if across else _JACKKNIFE
    pool = [s.products for s in studied]
    with_entropy = all(p.direction.shape[1] > 2 for p in pool)
    pool = pool if with_entropy else [p.of_directions(2) for p in pool]
    noise, angle, along, gained = (
        jackknifed(pool, statistic, across=across) for statistic in (log_noise, cosine, scale, inner_product(0))
    )
    pushes = [
        (name, jackknifed(pool, inner_product(which), across=across), jackknifed(pool, pressure(which), across=across))
        for which, name in enumerate(("length", "entropy")[: 1 + with_entropy], start=1)
    ]
    known = what_is_known(pool, level=level, across=across)
    rows = []
    for k, variant in enumerate(variants):
        noisier, turning = [s.tails.alone(variant) for s in studied], [s.tails.angle(variant) for s in studied]
        labels: dict[str, Any] = {"target": "", "rule": variant[0].name, "alpha": variant[1]}
        spoken: dict[str, Any] = {"level": level, "across": across}
        way_of_eta = f"{way} of log(1 - eta)"
        eta = eta_estimate(pool, noise, k, method=way_of_eta, tails=noisier, known=known.direction, **spoken)
        upward = estimate_of(gained, k, level=level, method=way)
        for name, estimate in (
            ("eta", eta),
            ("cosine", cosine_estimate(pool, angle, k, method=way, tails=turning, known=known, **spoken)),
            ("scale", gated(estimate_of(along, k, level=level, method=way), known.direction)),
        ):
            verdict = UNRESOLVED if math.isnan(estimate.value) else "resolved"
            rows.append(TableRow(quantity=name, estimate=estimate, verdict=verdict, **labels))
        for name, product, per_reward in pushes:
            raw = estimate_of(product, k, level=level, method=way)
            towards = "up" if raw.low > 0 else "down" if raw.high < 0 else "undetermined"
            rows.append(TableRow(quantity=f"{name}_product", estimate=raw, verdict=towards, **labels))
            found = gated(estimate_of(per_reward, k, level=level, method=way), upward.low > 0.0 or upward.high < 0.0)
            rows.append(TableRow(quantity=f"{name}_pressure", estimate=found, verdict=towards, **labels))
    columns = slice(len(variants) - len(grid), len(variants))
    alone = [p.of_updates(columns) for p in pool]
    pairs = np.sum([s.pairs for s in studied], axis=0)
    mine = np.append(np.arange(len(variants))[columns], len(variants) + np.arange(len(variants))[columns])
    for name, statistic, part in (
        ("alpha_star_eta", log_efficiency, of_log_efficiency),
        ("alpha_star_cv", log_rho, of_log_rho),
    ):
        curve = jackknifed(alone, statistic, across=across)
        with np.errstate(all="ignore"):
            twice = part(alone, pairs[np.ix_(mine, mine)], group_size)
        ends = [s.tails for s in studied]
        star = best_of_curve(curve, grid, level=level, method=f"argmax, slope 0; {way}", pairs=twice, tails=ends)
        verdict = UNRESOLVED if math.isnan(star.value) else "resolved"
        rows.append(TableRow(quantity=name, estimate=star, target="", rule=find_rule("vl_norm").name, verdict=verdict))
        if name == "alpha_star_eta":
            tails = [s.tails for s in studied]
            with np.errstate(all="ignore"):
                every = of_log_efficiency(pool, pairs, group_size)
            rows += _ratio_rows(pool, tails, star, variants, grid, pairs=every, level=level, across=across)
    return rows


def _ratio_rows(
    pool: Sequence[Products],
    prompts: Sequence[PromptTails],
    star: Estimate,
    variants: Sequence[tuple[Rule, float | None]],
    grid: Sequence[float],
    *,
    pairs: Array,
    level: float,
    across: bool,
) -> list[TableRow]:
    method = f"eta over vl_norm's at its best alpha, same groups; {_ACROSS if across else _JACKKNIFE} of the log"
    if math.isnan(star.value):
        none = replace(star, low=math.nan, high=math.nan, method=f"{method}; unresolved: no best alpha")
        ratios = [none] * len(variants)
    else:
        best = find_rule("vl_norm"), star.value
        tails = [[prompt.beside(variant, best) for prompt in prompts] for variant in variants]
        ratios = eta_ratios(pool, grid, star.value, level=level, method=method, across=across, pairs=pairs, tails=tails)
    return [
        TableRow(
            quantity="eta_ratio",
            estimate=ratio,
            target="",
            rule=rule.name,
            alpha=alpha,
            verdict=UNRESOLVED if math.isnan(ratio.value) else side(ratio.low, ratio.high),
            extra={"against": "vl_norm", "against_alpha": star.value},
        )
        for (rule, alpha), ratio in zip(variants, ratios, strict=True)
    ]
