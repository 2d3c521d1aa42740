"""The paper's claims that gradients can test (arXiv 2509.07558): supported, rejected or undetermined on this run.

A claim is supported where its interval lies inside what it says (with the margin named), rejected where wholly outside.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analyses.script import advantage_of, main, overall, whole_target
from analyses.table_01 import compute as weights_on_lengths
from gradvar import Run, advantages
from gradvar.estimators.intervals import t_quantile
from gradvar.runs import PromptScores, target_label

COSINE_MARGIN = 0.05
"""A rule counts as unbiased in direction where cos(E ghat, grad J) is above 1 less this."""

SUPPORTED, REJECTED, UNDETERMINED = "supported", "rejected", "undetermined"

HOLDS = {"holds": SUPPORTED, "by algebra": SUPPORTED, "violated": REJECTED}

Row = dict[str, Any]


def compute(run: Run) -> pd.DataFrame:
    """Return one row a test: claim, statement, tested_by, where, value, low, high, expected, verdict."""
    rows = [
        *_variance(run),
        *_everywhere(run),
        *_order(run),
        *_best_alpha(run),
        *_unbiased(run),
        *_long_responses(run),
    ]
    return pd.DataFrame(rows, columns=["claim", "statement", "tested_by", "where", *_NUMBERS, "expected", "verdict"])


_NUMBERS = ("value", "low", "high")


def _law(run: Run, target: str, quantity: str, kind: str) -> pd.DataFrame:
    law = run.table("law")
    rows = law[(law["target"] == target) & (law["quantity"] == quantity) & (law["advantage"] == kind)]
    return overall(rows[rows["scope"] == "all responses"])


def _variance(run: Run) -> list[Row]:
    margin = run.options("fit").margin
    found = []
    for quantity, words in (
        ("deviation_exponent", "deviation from the mean"),
        ("within_exponent", "variance within length"),
    ):
        for kind in dict.fromkeys(("score", advantage_of(run))):
            for _, row in _law(run, whole_target(run), quantity, kind).head(1).iterrows():
                found.append(
                    {
                        "claim": 1,
                        "statement": "Var(g_i) grows linearly with length",
                        "tested_by": f"exponent of the {words}, "
                        + ("score" if kind == "score" else f"{kind} advantages"),
                        "where": "all targets and prompts",
                        **{name: row[name] for name in _NUMBERS},
                        "expected": f"within {margin:g} of 1",
                        "verdict": _inside(row, 1 - margin, 1 + margin),
                    }
                )
    return found


def _everywhere(run: Run) -> list[Row]:
    margin = run.options("fit").margin
    found: list[Row] = []
    for target in run.targets:
        for _, row in _law(run, target, "deviation_exponent", advantage_of(run)).head(1).iterrows():
            found.append(
                {
                    "claim": 2,
                    "statement": "it does so in every layer and projection",
                    "tested_by": f"exponent of the deviation from the mean, {advantage_of(run)} advantages",
                    "where": target_label(target),
                    **{name: row[name] for name in _NUMBERS},
                    "expected": f"within {margin:g} of 1",
                    "verdict": _inside(row, 1 - margin, 1 + margin),
                }
            )
    verdicts = [row["verdict"] for row in found]
    count = f"{verdicts.count(SUPPORTED)} of {len(verdicts)} targets supported, {verdicts.count(REJECTED)} rejected"
    all_of_them = REJECTED if REJECTED in verdicts else SUPPORTED if set(verdicts) == {SUPPORTED} else UNDETERMINED
    return [
        {
            "claim": 2,
            "statement": "it does so in every layer and projection",
            "tested_by": count,
            "where": "each measured target",
            **dict.fromkeys(_NUMBERS, math.nan),
            "expected": "every target supported",
            "verdict": all_of_them,
        },
        *found,
    ]


def _order(run: Run) -> list[Row]:
    statement = "CV(grpo) = CV(vl_norm 1) <= CV(vl_norm alpha) <= CV(dapo) = CV(dr_grpo), 0 <= alpha <= 1"
    forms = {
        "cv_ratio_form_2": "ratio of CVs, lengths given, measured v(L)",
        "cv_ratio_form_3": "ratio of total CVs",
    }
    table = run.table("forms")
    found = []
    for quantity, words in forms.items():
        rows = overall(table[(table["target"] == whole_target(run)) & (table["quantity"] == quantity)])
        twice = (rows["rule"] == "grpo") & (rows["against"] == "dapo")  # dapo against grpo is there
        for _, row in rows[rows["paper"].isin(["equal", "at least 1", "at most 1"]) & ~twice].iterrows():
            found.append(
                {
                    "claim": 3,
                    "statement": statement,
                    "tested_by": words,
                    "where": f"{_name(row)} over {row['against']}",
                    **{end: row[end] for end in _NUMBERS},
                    "expected": "1" if row["paper"] == "equal" else row["paper"],
                    "verdict": HOLDS.get(str(row["holds"]), UNDETERMINED),
                }
            )
    return found


def _best_alpha(run: Run) -> list[Row]:
    table = run.table("alpha")
    rows = overall(table[(table["target"] == whole_target(run)) & (table["quantity"] == "alpha_star_cv")])
    found = []
    for _, row in rows.head(1).iterrows():
        low, high = row["low"], row["high"]
        if math.isnan(row["value"]):
            verdict = UNDETERMINED
        elif not low <= 1 <= high:
            verdict = REJECTED
        else:
            verdict = SUPPORTED if low >= 0.75 and high <= 1.25 else UNDETERMINED
        found.append(
            {
                "claim": 4,
                "statement": "alpha = 1 has the least variance",
                "tested_by": "alpha of the least total CV, with those not told apart from it",
                "where": "all targets and prompts",
                **{end: row[end] for end in _NUMBERS},
                "expected": "1, alone within 0.25",
                "verdict": verdict,
            }
        )
    return found


def _unbiased(run: Run) -> list[Row]:
    """The paper's bias, a total weight that varies with the lengths, and whether the direction turns too."""
    found = []
    for _, row in weights_on_lengths(run).iterrows():
        fixed = row["rule"] in ("vl_norm", "dr_grpo")
        found.append(
            {
                "claim": 5,
                "statement": "sum x_i varies with the lengths under GRPO and DAPO (biased), not VL Norm, Dr. GRPO",
                "tested_by": "spread of the total weight sum x_i between groups over its mean",
                "where": _name(row),
                "value": row["total_weight_cv"],
                "low": math.nan,
                "high": math.nan,
                "expected": "0" if fixed else "above 0",
                "verdict": SUPPORTED if fixed == (row["total_weight_cv"] == 0) else REJECTED,
            }
        )
    table = run.table("alpha")
    rows = overall(table[(table["target"] == whole_target(run)) & (table["quantity"] == "cosine")])
    bound = 1 - COSINE_MARGIN
    for _, row in rows[rows["alpha"].isna() | rows["alpha"].isin([0.75, 1.0])].iterrows():
        claimed = row["rule"] in ("vl_norm", "dr_grpo")
        aligned = SUPPORTED if row["low"] > bound else REJECTED if row["high"] < bound else UNDETERMINED
        found.append(
            {
                "claim": 5,
                "statement": "VL Norm and Dr. GRPO are unbiased: E ghat points along grad J",
                "tested_by": "cos(E ghat, grad J)",
                "where": _name(row),
                **{end: row[end] for end in _NUMBERS},
                "expected": f"above {bound:g}" if claimed else "nothing",
                "verdict": aligned if claimed else "not claimed",
            }
        )
    return found


def _name(row: pd.Series) -> str:
    return str(row["rule"]) if math.isnan(row["alpha"]) else f"{row['rule']} alpha {row['alpha']:g}"


def _long_responses(run: Run) -> list[Row]:
    """Share of each prompt's longer half in sum_i ||x_i g_i||^2, alpha 0.75 less alpha 1, jackknifed over responses."""
    groups = [scores.verified() for scores in run.scores(whole_target(run))]
    groups = [scores for scores in groups if len(scores.lengths) > 2 and np.ptp(scores.rewards) > 0]
    if not groups:
        return []
    config = run.options("cv")
    less, more = (_long_share(groups, config.advantage, alpha) for alpha in (0.75, 1.0))
    value = less[0] - more[0]
    spread = 0.0
    for one, other in zip(less[1], more[1], strict=True):
        left_out = one - other
        n = len(left_out)
        spread += (n - 1) / n * float(np.square(left_out - left_out.mean()).sum())
    half = t_quantile(config.level, sum(len(scores.lengths) - 1 for scores in groups)) * math.sqrt(spread)
    return [
        {
            "claim": 6,
            "statement": "alpha < 1 lets long responses count for more",
            "tested_by": "share of the longer half of responses in sum ||x_i g_i||^2: alpha 0.75 less alpha 1",
            "where": "all targets and prompts",
            "value": value,
            "low": value - half,
            "high": value + half,
            "expected": "above 0",
            "verdict": SUPPORTED if value > half else REJECTED if value < -half else UNDETERMINED,
        }
    ]


def _long_share(groups: Sequence[PromptScores], kind: str, alpha: float) -> tuple[float, list[NDArray[np.float64]]]:
    """Return the share under one alpha, and by prompt its delete-one replicates (N,)."""
    parts = []
    for scores in groups:
        weight = scores.lengths**-alpha
        squares = weight**2 * advantages(scores.rewards, kind, lengths=scores.lengths) ** 2 * np.diag(scores.gram)
        long = squares * (scores.lengths > np.median(scores.lengths))
        parts.append((weight, squares, long))
    totals = np.array([[squares.sum(), long.sum()] / weight.sum() ** 2 for weight, squares, long in parts])
    whole = totals.sum(axis=0)
    replicates = []
    for own, (weight, squares, long) in zip(totals, parts, strict=True):
        left = (weight.sum() - weight) ** 2
        every, longer = (whole - own)[:, None] + np.stack([squares.sum() - squares, long.sum() - long]) / left
        replicates.append(longer / every)
    return float(whole[1] / whole[0]), replicates


def _inside(row: pd.Series, low: float, high: float) -> str:
    if math.isnan(row["low"]):
        return UNDETERMINED
    if low <= row["low"] and row["high"] <= high:
        return SUPPORTED
    return REJECTED if row["high"] < low or row["low"] > high else UNDETERMINED


if __name__ == "__main__":
    main(__file__, __doc__, compute)
