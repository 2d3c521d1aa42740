"""The CV in its first two forms: lengths given, with Var = V L (the paper's table 1) or with the measured v(L).

    CV = sqrt(sum_i x_i^2 v_i) / (sum_i x_i ||grad J||)

Only form 3 (`cv`, total, lengths random) is what training sees; the three are never mixed up. The paper's inequality
CV(grpo) = CV(vl_norm 1) <= CV(vl_norm alpha) <= CV(dapo) = CV(dr_grpo), 0 <= alpha <= 1, is proved for form 1 with
E[g | L] constant. Shape letters: N responses of one prompt, K prompts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from gradvar.errors import GradvarError
from gradvar.estimators.advantages import advantages, check_advantage
from gradvar.estimators.aggregation import aggregation_weights, expand_rules
from gradvar.estimators.carrying import LEAST_CARRYING, effective_carrying, few_that_carry, unless_few
from gradvar.estimators.form_cvs import (
    CV_FORMS,
    GivenLengths,
    Measured,
    form_cv_rows,
    form_moments,
    no_form_cv_rows,
    no_update,
)
from gradvar.estimators.form_ratios import LogRatio, log_ratio
from gradvar.estimators.inputs import arrange, generator, why_nothing
from gradvar.estimators.intervals import (
    MINIMUM_PROMPTS,
    PROMPTS_LIKE_THESE,
    THESE_PROMPTS,
    at_least_as_wide,
    check_level,
    reach_of_sum,
    t_quantile,
)
from gradvar.estimators.law import fitted_means
from gradvar.estimators.noise_scale import LEAST
from gradvar.estimators.paper_order import (
    BY_ALGEBRA,
    EQUAL,
    Variant,
    claim,
    judge,
    needed_to_judge,
    side,
)
from gradvar.estimators.spread import (
    NEIGHBOURS,
    dependence_among,
    local_moments,
    nearest_in_length,
    variance_among,
    weighted_gram,
)
from gradvar.runs.config import ALPHAS, EQUALITY_MARGIN, RULES
from gradvar.runs.records import Estimate, PromptScores, TableRow, estimate_table

Array = NDArray[np.float64]

FORM_1 = "form 1: lengths given, Var = V L"  # any V: it cancels
FORM_2 = CV_FORMS["cv_form_2"]


def conditional_cv(
    rule: str,
    lengths: Any,
    variances: Any,
    gradient_norm: float,
    *,
    alpha: float | None = None,
    max_length: float | None = None,
) -> float:
    """CV of one update given the lengths: sqrt(sum x_i^2 v_i) / (sum x_i ||grad J||).

    With variances V L this is the paper's table 1 (form 1), with a measured law form 2. E[g | L] is taken as constant.

    Args:
        rule: Name for `aggregation_weights`.
        lengths: (n,) lengths of the responses in scope, in tokens.
        variances: (n,) v(L_i).
        gradient_norm: ||grad J||.
        alpha: Exponent of vl_norm.
        max_length: M in tokens.

    Raises:
        GradvarError: As `aggregation_weights`, or variances or a norm that are not positive.
    """
    x = aggregation_weights(rule, lengths, alpha=alpha, max_length=max_length)
    v = np.asarray(variances, dtype=np.float64)
    if v.shape != np.shape(x) or not (np.isfinite(v).all() and (v >= 0).all()):
        raise GradvarError(f"variances must be {len(x)} numbers, none negative, received shape {v.shape}")
    if not gradient_norm > 0:
        raise GradvarError(f"gradient_norm must be positive, received {gradient_norm!r}")
    return math.sqrt(float((x**2) @ v)) / (float(x.sum()) * gradient_norm)


def form_table(
    groups: Sequence[PromptScores],
    *,
    rules: Sequence[str] = RULES,
    alphas: Sequence[float] = ALPHAS,
    reference: str = "grpo",
    further_references: Sequence[str] = (),
    group_size: int = 8,
    advantage: str = "grpo",
    neighbours: int = NEIGHBOURS,
    level: float = 0.95,
    equality_margin: float = EQUALITY_MARGIN,
    seed: int,
) -> pd.DataFrame:
    """CVs in forms 1 and 2, ratios to a reference rule's, and whether the paper's order holds on measured variances.

    All N responses of a prompt are one scope, their lengths given, so ||grad J|| cancels in a ratio. Quantities:
        "cv_form_1"         CV of a group of `group_size` with the prompt's mix of lengths, V L_i fitted
        "cv_form_2"         the same with V_i; `verdict`, `n_needed`, NaN where unresolved, pooling over prompts, and
                            one row without rule for a prompt that is silent, without gradient or too small, as the
                            "cv" of `cv_table`
        "cv_ratio_form_1"   exact, no interval
        "cv_ratio_form_2"   the within-length variances V_i in place of V L_i, jackknifed over responses on the log;
                            `verdict` "higher", "lower", "equal" (1 up to rounding) or "undetermined"
    Column `against` names the reference, `paper` what the paper's order asks of the ratio ("equal", "at least 1",
    "at most 1", "nothing") and `holds` whether it does: "holds", "violated", "undetermined", "by algebra" (equal
    weights for given lengths) or "not claimed"; `holds_needs`, responses a prompt that would
    decide an undetermined one.
    Pooled ratios (no prompt_id) average the logs over prompts, form 2 for both estimands (`estimand`). Prompts that are
    silent or without gradient are left out of them, of form 2 also those that few responses carry (`carrying`), which
    have no interval of their own.

    Args:
        groups: Prompts by targets; several targets get their sum as well.
        rules: Rules compared.
        alphas: Exponents of vl_norm.
        reference: The rule they are compared with; one that takes no alpha.
        further_references: Further rules likewise.
        group_size: n of "cv_form_1" and "cv_form_2", responses of one update.
        advantage: Kind of `advantages`, over all verified responses of a prompt.
        neighbours: k of the within-length variance.
        level: Nominal coverage.
        equality_margin: CVs count as equal where their ratio's interval lies within [1 / (1 + margin), 1 + margin].
        seed: Breaks ties between neighbours in length.

    Raises:
        GradvarError: As `expand_rules` and `arrange`.
    """
    check_level(level)
    check_advantage(advantage)
    references = expand_rules((reference, *further_references), ())
    variants = expand_rules(rules, alphas)
    pairs = [(variant, one) for one in references for variant in variants if variant != one]
    options: dict[str, Any] = {"group_size": group_size, "level": level, "seed": seed}
    rows: list[TableRow] = []
    for target, prompts in arrange(groups).items():
        logs: dict[tuple[Variant, Variant], list[LogRatio]] = {}
        firsts: dict[tuple[Variant, Variant], list[float]] = {}
        moments: dict[str, dict[tuple[Variant, str], GivenLengths]] = {}
        sizes: dict[str, int] = {}
        for name, raw in prompts.items():
            scores = raw if advantage == "score" else raw.verified()
            labels = {"target": target, "prompt_id": name, "advantage": advantage}
            why, sizes[name] = why_nothing(raw, advantage), len(scores.lengths)
            if why is not None or sizes[name] < LEAST:
                rows += no_form_cv_rows(why, sizes[name], labels, **options)
            if why is not None or sizes[name] < 3:
                continue
            measured = _measured(scores, advantage, neighbours, seed)
            if sizes[name] >= LEAST:
                moments[name] = form_moments(measured, variants, group_size)
                for (variant, form), own in moments[name].items():
                    rows += form_cv_rows([own], variant, form, labels, **options)
            for pair in pairs:
                (rule, alpha), compared = pair
                limit = measured.max_length
                base = aggregation_weights(compared[0].name, scores.lengths, max_length=limit)
                x = aggregation_weights(rule.name, scores.lengths, alpha=alpha, max_length=limit)
                ratio = log_ratio(x, base, measured)
                first = math.log(
                    conditional_cv(rule.name, scores.lengths, scores.lengths, 1.0, alpha=alpha, max_length=limit)
                    / conditional_cv(compared[0].name, scores.lengths, scores.lengths, 1.0, max_length=limit)
                )
                logs.setdefault(pair, []).append(ratio)
                firsts.setdefault(pair, []).append(first)
                rows += _form_rows(*pair, [ratio], [first], labels, level=level, margin=equality_margin, seed=seed)
        if len(prompts) < 2:
            continue
        labels = {"target": target, "advantage": advantage}
        pool = _pooled_prompts(moments, sizes, group_size)
        for key in next(iter(moments.values()), {}):
            mine = [moments[name][key] if name in moments else no_update(sizes[name]) for name in pool]
            rows += form_cv_rows(mine, *key, labels, **options, pooled=True)
        for pair, found in logs.items():
            rows += _form_rows(*pair, found, firsts[pair], labels, level=level, margin=equality_margin, seed=seed)
    return estimate_table(rows)


def _measured(scores: PromptScores, advantage: str, neighbours: int, seed: int) -> Measured:
    """Within-length variances of one prompt, with what they depend on.

    Near an end of the lengths their neighbours' noise is not that of their own length, and weights that fall with the
    length rest on that end: vl_norm 2's CV over grpo's came out 1.3 times too large where 1% of the responses had 2
    tokens. So V_i is brought to its own length by the fitted law, v(L_i) / E V_i.
    """
    factors = advantages(scores.rewards, advantage, lengths=scores.lengths)

    def ties() -> np.random.Generator:
        return generator(seed, scores.prompt_id, "neighbours")

    near = nearest_in_length(scores.lengths, min(neighbours, len(factors) - 1), rng=ties())

    def within(added: float) -> Array:
        return variance_among(weighted_gram(scores.gram, factors + added), near)

    values = within(0.0)
    centre, seen = _centre(scores.lengths, values, near)
    straight = centre / seen
    values = straight * values
    shared = dependence_among(weighted_gram(scores.gram, factors), near)
    few = few_that_carry(factors)
    spread, skewness = local_moments(scores.lengths, values, centre, carrying=few, rng=ties())
    step = float(np.abs(factors).max())  # V is quadratic in A: any step gives the derivative
    return Measured(
        gram=scores.gram,
        rewards=scores.rewards,
        lengths=scores.lengths,
        advantage=advantage,
        factors=factors,
        within=values,
        centre=centre,
        spread=spread,
        skewness=skewness,
        shared=lambda q: shared(straight[:, None] * q),
        carrying=effective_carrying(factors),
        slope=straight * (within(step) - within(-step)) / (2.0 * step) if step > 0.0 else np.zeros_like(values),
        max_length=float(scores.max_length) if scores.max_length > 0 else float(scores.lengths.max()),
    )


def _pooled_prompts(moments: Mapping[str, Any], sizes: Mapping[str, int], group_size: int) -> list[str]:
    """Prompts that count together, as in form 3: those with three groups where there are any, silent ones too."""
    enough = [name for name, size in sizes.items() if size >= LEAST]
    large = [name for name in enough if sizes[name] >= 3 * group_size]
    return large if any(name in moments for name in large) else enough


def _centre(lengths: Array, v: Array, near: NDArray[np.intp]) -> tuple[Array, Array]:
    """v(L_i) and E V_i by the fitted power law; the mean V for both where none can be fitted."""
    alike = np.full_like(v, v.mean() if v.any() else 1.0)
    try:
        fitted, seen = fitted_means(lengths, v, near)
    except GradvarError:
        return alike, alike
    ratio = fitted / seen
    return (fitted, seen) if np.isfinite(fitted).all() and np.isfinite(ratio).all() else (alike, alike)


def _form_rows(
    key: Variant,
    compared: Variant,
    found: list[LogRatio],
    firsts: list[float],
    labels: dict[str, Any],
    *,
    level: float,
    margin: float,
    seed: int,
) -> list[TableRow]:
    rule, alpha = key
    # Every prompt's log counts alike, so one that a handful of responses carries would set the interval of all.
    held = [f for f in found if f.carrying >= LEAST_CARRYING] or found
    left, clusters = len(found) - len(held), len(held)
    method = f"{FORM_2}; without {left} of {len(found)} prompts, which few responses carry" if left else FORM_2
    value = float(np.mean([f.value for f in held]))
    influence = np.concatenate([f.influence for f in held]) / clusters
    spread = np.concatenate([f.spread for f in held]) / clusters
    skewness, most = np.concatenate([f.skewness for f in held]), len(influence) - clusters
    below, above = reach_of_sum(influence, spread, skewness, most=most, level=level)
    none = Estimate(
        value=math.nan,
        low=math.nan,
        high=math.nan,
        level=level,
        method=FORM_1,
        n=sum(len(f.influence) for f in found),
        clusters=len(found),
        seed=seed,
    )
    second = replace(
        none,
        n=len(influence),
        clusters=clusters,
        value=math.exp(value),
        low=math.exp(value - below),
        high=math.exp(min(value + above, 700.0)),
        method=f"{method}; jackknife of the log over responses, t; {THESE_PROMPTS}",
    )
    if second.low < second.high:  # proportional weights make equal CVs, whoever carries the noise
        second = unless_few(second, min(f.carrying for f in held))
    paper = claim(key, compared)
    equal = paper == EQUAL
    first = math.exp(float(np.mean(firsts)))
    common: dict[str, Any] = {**labels, "rule": rule.name, "alpha": alpha, "scope": "all responses, lengths given"}
    across = _across_prompts(second, np.array([f.value for f in held]), method, level)

    def told(estimand: str, ratio: Estimate) -> dict[str, Any]:
        return {
            "paper": paper,
            "against": compared[0].name,
            "estimand": estimand,
            "holds": BY_ALGEBRA if equal else judge(paper, ratio.low, ratio.high, margin=margin),
            "holds_needs": math.nan if equal else needed_to_judge(paper, ratio, margin=margin),
        }

    return [
        TableRow(
            quantity="cv_ratio_form_1",
            estimate=replace(none, value=first),
            **common,
            # Exact arithmetic: the order is a theorem here, told as what these lengths make of it.
            extra=told(THESE_PROMPTS, replace(none, value=first, low=first, high=first)),
        ),
        TableRow(
            quantity="cv_ratio_form_2",
            estimate=second,
            verdict=EQUAL if equal else side(second.low, second.high),
            **common,
            extra=told(THESE_PROMPTS, second),
        ),
        *(
            [
                TableRow(
                    quantity="cv_ratio_form_2",
                    estimate=across,
                    verdict=EQUAL if equal else side(across.low, across.high),
                    **common,
                    extra=told(PROMPTS_LIKE_THESE, across),
                )
            ]
            if clusters > 1
            else []
        ),
    ]


def _across_prompts(second: Estimate, logs: Array, words: str, level: float) -> Estimate:
    """Form 2 for prompts like these: mean of the prompts' logs, t over K - 1."""
    method = f"{words}; mean of the prompts' logs, t; {PROMPTS_LIKE_THESE}"
    if len(logs) < MINIMUM_PROMPTS:
        note = f"{method}; not given below {MINIMUM_PROMPTS} prompts"
        return replace(second, value=math.nan, low=math.nan, high=math.nan, method=note)
    half = t_quantile(level, len(logs) - 1) * float(logs.std(ddof=1)) / math.sqrt(len(logs))
    low, high = math.exp(logs.mean() - half), math.exp(min(logs.mean() + half, 700.0))
    across = replace(second, value=math.exp(logs.mean()), low=low, high=high, method=method)
    return at_least_as_wide(across, second)


def total_cv_form(cv: pd.DataFrame) -> pd.DataFrame:
    """Form 3 itself: the "cv" rows of `cv_table`, as "cv_form_3"."""
    return cv[cv["quantity"] == "cv"].assign(quantity="cv_form_3")


def total_form(cv: pd.DataFrame) -> pd.DataFrame:
    """Ratios of form 3 for the same table: the "cv_ratio" rows of `cv_table`, lengths random, as "cv_ratio_form_3"."""
    rows = cv[cv["quantity"] == "cv_ratio"]
    return rows.assign(quantity="cv_ratio_form_3")
