"""Table 1: bias, variance and CV of each rule: the formulas, their values on the observed lengths, and as measured.

The formulas are the paper's, for a group of n with E[g | L] = grad J and Var(g_i) = V L_i; L_max is written M.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from analyses.script import main, overall, whole_target
from gradvar import Run, aggregation_weights
from gradvar.estimators import find_rule
from gradvar.estimators.groups import draw_groups
from gradvar.runs import EstimateConfig

DRAWS = 64
"""Permutations of a prompt's responses whose groups the formulas are evaluated on."""

FORMULAS = {
    "grpo": ("(1/n) sum 1/L_i", "(V/n^2) sum 1/L_i", "sqrt(V / sum 1/L_i)"),
    "dapo": ("n / sum L_i", "V / sum L_i", "sqrt(V sum L_i) / n"),
    "dr_grpo": ("1/M", "V sum L_i / (n M)^2", "sqrt(V sum L_i) / n"),
    "vl_norm": (
        "1/M",
        "V sum L_i^(1 - 2 alpha) / (M sum L_i^-alpha)^2",
        "sqrt(V sum L_i^(1 - 2 alpha)) / sum L_i^-alpha",
    ),
}
"""By rule: E ghat over grad J, Var ghat, CV times ||grad J||."""


def compute(run: Run) -> pd.DataFrame:
    """Return one row a rule and alpha.

    Columns: rule, alpha, formula_mean, formula_variance, formula_cv; on observed lengths total_weight (mean over groups
    of sum x_i, times M), total_weight_cv (its spread between groups over its mean: not 0 is the bias the paper speaks
    of), variance (mean over groups of M^2 sum x_i^2 L_i) and cv_form_1 (mean over groups of CV over grpo's); as
    measured cv, cosine and eta, each with low and high.
    """
    config = run.options("cv")
    target = whole_target(run)
    cv, alpha_table = (overall(table[table["target"] == target]) for table in (run.table("cv"), run.table("alpha")))
    measured = cv[(cv["quantity"] == "cv") & cv["rule"].notna()]
    groups = run.scores(target)
    rows = []
    for _, row in measured.iterrows():
        rule, alpha = str(row["rule"]), None if math.isnan(row["alpha"]) else float(row["alpha"])
        found = {name: _cell(alpha_table, name, rule, row["alpha"]) for name in ("cosine", "eta")}
        rows.append(
            {
                "rule": rule,
                "alpha": row["alpha"],
                **dict(
                    zip(("formula_mean", "formula_variance", "formula_cv"), FORMULAS.get(rule, ("",) * 3), strict=True)
                ),
                **_on_lengths(rule, alpha, [scores.lengths for scores in groups], groups[0].max_length, config),
                "cv": row["value"],
                "cv_low": row["low"],
                "cv_high": row["high"],
                **{f"{name}{end}": value for name, cell in found.items() for end, value in cell.items()},
            }
        )
    return pd.DataFrame(rows)


def _cell(table: pd.DataFrame, quantity: str, rule: str, alpha: float) -> dict[str, float]:
    same = table["alpha"].isna() if math.isnan(alpha) else table["alpha"] == alpha
    rows = table[(table["quantity"] == quantity) & (table["rule"] == rule) & same]
    ends = (("", "value"), ("_low", "low"), ("_high", "high"))
    return {end: float(rows[name].iloc[0]) if len(rows) else math.nan for end, name in ends}


def _on_lengths(
    rule: str, alpha: float | None, prompts: list[np.ndarray], limit: float, config: EstimateConfig
) -> dict[str, float]:
    """Return the formulas' values on groups of observed lengths, averaged over groups and prompts."""
    rng = np.random.default_rng([config.seed, 1])
    totals, variances, ratios = [], [], []
    for lengths in prompts:
        drawn = draw_groups(len(lengths), config.group_size, DRAWS, rng=rng).reshape(-1, config.group_size)
        for chosen in lengths[drawn]:
            x = _weights(rule, chosen, alpha, limit)
            grpo = _weights("grpo", chosen, None, limit)
            totals.append(limit * x.sum())
            variances.append(limit**2 * float(x**2 @ chosen))
            ratios.append(_cv(x, chosen) / _cv(grpo, chosen))
    total = np.array(totals)
    return {
        "total_weight": float(total.mean()),
        "total_weight_cv": round(
            float(total.std() / total.mean()), 12
        ),  # 0 but for rounding where weights have a fixed sum
        "variance": float(np.mean(variances)),
        "cv_form_1": float(np.mean(ratios)),
    }


def _weights(rule: str, lengths: np.ndarray, alpha: float | None, limit: float) -> np.ndarray:
    given = {"max_length": limit} if find_rule(rule).takes_max_length else {}
    return np.asarray(aggregation_weights(rule, lengths, alpha=alpha, **given))


def _cv(x: np.ndarray, lengths: np.ndarray) -> float:
    return float(np.sqrt(x**2 @ lengths) / x.sum())


if __name__ == "__main__":
    main(__file__, __doc__, compute)
