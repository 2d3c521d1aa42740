"""The CV in its first two forms: lengths given, with Var = V L (the paper's table 1) or with the measured v(L).

    CV = sqrt(sum_i x_i^2 v_i) / (sum_i x_i ||grad J||)

Only form 3 (`cv`, total, lengths random) is what training sees; the three are never mixed up. The paper's inequality
CV(grpo) = CV(vl_norm 1) <= CV(vl_norm alpha) <= CV(dapo) = CV(dr_grpo), 0 <= alpha <= 1, is proved for form 1 with
E[g | L] constant. Shape letters: N responses of one prompt, K prompts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from gradvar.errors import GradvarError
from gradvar.estimators.advantages import advantages, check_advantage
from gradvar.estimators.aggregation import aggregation_weights, expand_rules
from gradvar.estimators.inputs import arrange, generator, is_silent
from gradvar.estimators.intervals import THESE_PROMPTS, check_level, effective_degrees, t_quantile
from gradvar.estimators.law import fit_variance_law
from gradvar.estimators.quasi import Dependence
from gradvar.estimators.spread import NEIGHBOURS, within_dependence, within_length_variance
from gradvar.runs.records import Estimate, PromptScores, TableRow, estimate_table

Array = NDArray[np.float64]

FORM_1 = "form 1: lengths given, Var = V L"
FORM_2 = "form 2: lengths given, measured v(L)"


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
    rules: Sequence[str] = ("grpo", "dapo", "dr_grpo", "vl_norm"),
    alphas: Sequence[float] = (0.5, 0.75, 1.0, 2.0),
    advantage: str = "grpo",
    neighbours: int = NEIGHBOURS,
    level: float = 0.95,
    seed: int,
) -> pd.DataFrame:
    """Ratios of CVs to GRPO's in forms 1 and 2, and whether the paper's order holds on the measured variances.

    All N responses of a prompt are one scope, their lengths given, so ||grad J|| cancels in a ratio. Quantities:
        "cv_ratio_form_1"   exact, no interval
        "cv_ratio_form_2"   the within-length variances V_i in place of V L_i, jackknifed over responses on the log;
                            `verdict` "higher", "lower" or "undetermined"; column `paper` says what the paper's order
                            asks for (vl_norm with 0 <= alpha < 1, dapo and dr_grpo at least 1) and `holds` whether it
                            does: "holds", "violated", "undetermined", or "by algebra" (equal weights for given
                            lengths), "not claimed" outside the paper's range
    Pooled rows (no prompt_id) average the logs over prompts. Silent prompts are left out.

    Args:
        groups: Prompts by targets; several targets get their sum as well.
        rules: Rules compared with GRPO.
        alphas: Exponents of vl_norm.
        advantage: Kind of `advantages`, over all verified responses of a prompt.
        neighbours: k of the within-length variance.
        level: Nominal coverage.
        seed: Breaks ties between neighbours in length.

    Raises:
        GradvarError: As `expand_rules` and `arrange`.
    """
    check_level(level)
    check_advantage(advantage)
    variants = [(rule, alpha) for rule, alpha in expand_rules(rules, alphas) if rule.name != "grpo"]
    rows: list[TableRow] = []
    for target, prompts in arrange(groups).items():
        logs: dict[tuple[str, float | None], list[tuple[float, Array]]] = {}
        firsts: dict[tuple[str, float | None], list[float]] = {}
        for name, raw in prompts.items():
            scores = raw if advantage == "score" else raw.verified()
            if (advantage not in ("score", "raw") and is_silent(raw)) or len(scores.lengths) < 3:
                continue
            factors = advantages(scores.rewards, advantage, lengths=scores.lengths)
            arguments: dict[str, Any] = {"advantages": factors, "neighbours": neighbours}
            within = within_length_variance(
                scores.gram, scores.lengths, **arguments, rng=generator(seed, name, "neighbours")
            )
            shared = within_dependence(
                scores.gram, scores.lengths, **arguments, rng=generator(seed, name, "neighbours")
            )
            limit = float(scores.max_length) if scores.max_length > 0 else float(scores.lengths.max())
            centre = _centre(scores.lengths, within)
            reference = aggregation_weights("grpo", scores.lengths)
            for rule, alpha in variants:
                x = aggregation_weights(rule.name, scores.lengths, alpha=alpha, max_length=limit)
                value, influence = _log_ratio(x, reference, within, centre, shared)
                first = math.log(
                    conditional_cv(rule.name, scores.lengths, scores.lengths, 1.0, alpha=alpha, max_length=limit)
                    / conditional_cv("grpo", scores.lengths, scores.lengths, 1.0)
                )
                key = (rule.name, alpha)
                logs.setdefault(key, []).append((value, influence))
                firsts.setdefault(key, []).append(first)
                labels = {"target": target, "prompt_id": name, "advantage": advantage}
                rows += _form_rows(key, [(value, influence)], [first], labels, level=level, seed=seed)
        for key, found in logs.items():
            if len(found) > 1:
                labels = {"target": target, "advantage": advantage}
                rows += _form_rows(key, found, firsts[key], labels, level=level, seed=seed)
    return estimate_table(rows)


def _log_ratio(x: Array, reference: Array, v: Array, centre: Array, shared: Dependence) -> tuple[float, Array]:
    """Log of CV(x) / CV(reference) for given lengths, and what each response adds to its error.

    Lengths are given, so what varies is v_i around its centre v(L_i), beside what the others owe to response i.
    """
    top, bottom = float(x**2 @ v), float(reference**2 @ v)
    if top <= 0.0 or bottom <= 0.0:
        return math.nan, np.full(len(v), math.nan)
    value = 0.5 * math.log(top / bottom) - math.log(float(x.sum() / reference.sum()))
    gain = 0.5 * (x**2 / top - reference**2 / bottom)
    n = len(v)
    return value, gain * (v - centre) * math.sqrt(n / (n - 1)) + shared(gain[:, None])[:, 0]


def _centre(lengths: Array, v: Array) -> Array:
    """v(L_i) by the fitted power law; the mean where none can be fitted."""
    try:
        fitted = fit_variance_law(lengths, v).mean(lengths)[0]
    except GradvarError:
        fitted = np.full_like(v, math.nan)
    return fitted if np.isfinite(fitted).all() else np.full_like(v, v.mean())


def _form_rows(
    key: tuple[str, float | None],
    found: list[tuple[float, Array]],
    firsts: list[float],
    labels: dict[str, Any],
    *,
    level: float,
    seed: int,
) -> list[TableRow]:
    rule, alpha = key
    clusters = len(found)
    value = float(np.mean([f[0] for f in found]))
    influence = np.concatenate([f[1] for f in found]) / clusters
    error = float(np.linalg.norm(influence))
    half = t_quantile(level, effective_degrees(influence, len(influence) - clusters)) * error
    none = Estimate(
        value=math.nan,
        low=math.nan,
        high=math.nan,
        level=level,
        method=FORM_1,
        n=len(influence),
        clusters=clusters,
        seed=seed,
    )
    second = replace(
        none,
        value=math.exp(value),
        low=math.exp(value - half),
        high=math.exp(min(value + half, 700.0)),
        method=f"{FORM_2}; jackknife of the log over responses, t; {THESE_PROMPTS}",
    )
    equal = rule == "vl_norm" and alpha == 1.0
    claimed = rule in ("dapo", "dr_grpo") or (rule == "vl_norm" and alpha is not None and 0.0 <= alpha <= 1.0)
    side = "higher" if second.low > 1.0 else "lower" if second.high < 1.0 else "undetermined"
    if equal:
        side, holds = "equal", "by algebra"
    elif not claimed:
        holds = "not claimed"
    else:
        holds = {"higher": "holds", "lower": "violated"}.get(side, "undetermined")
    shared: dict[str, Any] = {**labels, "rule": rule, "alpha": alpha, "scope": "all responses, lengths given"}
    paper = "equal" if equal else "at least 1" if claimed else "nothing"
    return [
        TableRow(
            quantity="cv_ratio_form_1",
            estimate=replace(none, value=math.exp(float(np.mean(firsts)))),
            **shared,
            extra={"paper": paper, "holds": "by algebra" if claimed else "not claimed"},
        ),
        TableRow(
            quantity="cv_ratio_form_2",
            estimate=second,
            verdict=side,
            **shared,
            extra={"paper": paper, "holds": holds},
        ),
    ]
