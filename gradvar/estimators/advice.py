"""Which alpha, in one sentence: what to use, for which updates, what it rests on, or that the data cannot tell."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from gradvar.estimators.cv import SILENT
from gradvar.estimators.intervals import PROMPTS_LIKE_THESE
from gradvar.estimators.paper_order import HIGHER, LOWER, ROUNDING, UNDETERMINED
from gradvar.runs.records import counted, target_label

PAPER = (0.75, 1.0)
"""The paper's alphas."""
SMALL = 0.01
"""A loss of efficiency below this share is said to be small."""
EXPONENT = "within_exponent"
"""Row of the table `alpha` that holds the fitted law's exponent of the within-length variance."""


def recommendation(table: pd.DataFrame, *, target: str) -> str:
    """One sentence: the alpha to use, what it rests on, or that the data cannot tell.

    Args:
        table: From `alpha_table`, with the rows "within_exponent" of `law_table` (all responses, the same advantage)
            where the fitted exponent is to be said beside it.
        target: Target to speak of, "sum" for all together.

    Returns:
        A sentence for people. It names the advantage and the group size, the efficiency that the paper's alphas lose
        against the best where they are told apart from it, and any other rule that is not told apart from the best
        vl_norm, or is better.
    """
    mine = table[(table["target"] == target) & (table["estimand"] != PROMPTS_LIKE_THESE)]
    mine = mine[mine["prompt_id"].isna()] if mine["prompt_id"].isna().any() else mine
    star = mine[mine["quantity"] == "alpha_star_eta"]
    fitted = _fitted(mine)
    updates = target_label(target)
    one = (star if len(star) else table).iloc[0] if len(table) else None
    if one is not None and pd.notna(one["group_size"]):
        updates += f", {one['advantage']} advantages in groups of {int(one['group_size'])}"
    if star.empty and len(reasons := _reasons(table, target)):
        return f"No alpha can be recommended for {updates}: {reasons}{fitted}."
    if star.empty or not math.isfinite(star.iloc[0]["value"]):
        return f"The data cannot tell which alpha is best for {updates}: no signal above the noise{fitted}."
    best = star.iloc[0]
    grid = mine[(mine["quantity"] == "eta") & (mine["rule"] == "vl_norm")]["alpha"]
    first, last = float(grid.min()), float(grid.max())
    ratios = mine[mine["quantity"] == "eta_ratio"]
    others = ratios[ratios["alpha"].isna()]
    near = _not_apart(others)
    span = f"{best['low']:g} to {best['high']:g}"
    better = others[others["verdict"] == HIGHER].sort_values("value", ascending=False)
    if best["low"] <= first and best["high"] >= last and better.empty:
        return f"The data cannot tell one alpha from another for {updates} ({span} all fit){near}{fitted}."
    prompts = int(best["clusters"])
    resting = f"efficiency on {counted(prompts, 'prompt')}, {int(best['n'])} responses"
    fits = f"{span} fit as well{_open(best, first, last)}"
    if len(better):
        rule = better.iloc[0]
        advice = (
            f"Use {rule['rule']} for {updates}: its efficiency is {_times(rule)} times that of vl_norm at its best "
            f"alpha = {best['value']:g} ({fits})"
        )
    else:
        advice = f"Use vl_norm with alpha = {best['value']:g} ({fits}) for {updates}"
    return f"{advice}; {_paper(best, ratios)}{near}; rests on {resting}{fitted}."


def _reasons(table: pd.DataFrame, target: str) -> str:
    """Say why no prompt has an efficiency."""
    rows = table[(table["target"] == target) & (table["quantity"] == "eta") & table["rule"].isna()]
    why = rows["method"].str.removeprefix("not estimated; ")
    counts = why.value_counts(sort=False)
    if list(counts.index) == [SILENT]:
        of = "the one prompt" if len(why) == 1 else f"each of the {len(why)} prompts"
        return f"in {of} all verified rewards are equal, so no response is better than another"
    return "; ".join(f"{counted(count, 'prompt')} {reason}" for reason, count in counts.items())


def _fitted(mine: pd.DataFrame) -> str:
    row = mine[mine["quantity"] == EXPONENT]
    if row.empty or not math.isfinite(row.iloc[0]["value"]):
        return ""
    beta = row.iloc[0]
    said = f"; least-variance weights by the fitted law would be L^-{beta['value']:.2f}"
    return said + (f" ({beta['low']:.2f} to {beta['high']:.2f})" if math.isfinite(beta["low"]) else "")


def _open(best: Any, first: float, last: float) -> str:
    """Say which ends of the interval lie on the grid's, where nothing is known of what is beyond."""
    ends = [f"from {first:g}"] * bool(best["low"] <= first) + [f"to {last:g}"] * bool(best["high"] >= last)
    return f", open at the end: alphas were tried {' '.join(ends)} only" if ends else ""


def _paper(best: Any, ratios: pd.DataFrame) -> str:
    """Say of the paper's alphas whether they are told apart from the best one, and what they lose."""
    inside = [a for a in PAPER if best["low"] <= a <= best["high"]]
    said = []
    if inside:
        said.append(f"the paper's {' and '.join(f'{a:g}' for a in inside)} cannot be told apart from it")
    for alpha in PAPER:
        if alpha not in inside:
            row = ratios[(ratios["rule"] == "vl_norm") & (ratios["alpha"] == alpha)]
            said.append(f"the paper's {alpha:g} {_loss(row.iloc[0] if len(row) else None)}")
    return ", ".join(said)


def _loss(row: Any) -> str:
    """Say how much an alpha outside the best one's interval loses: the curve's slope may tell it, its height not."""
    if row is None or not math.isfinite(row["value"]):
        return "lies outside"
    least, loss, most = (100.0 * (1.0 - row[end]) for end in ("high", "value", "low"))
    figures = f"{loss:.2g}% of efficiency [{least:.2g}%, {most:.2g}%]"
    if row["verdict"] != LOWER:
        return f"lies outside, without a measurable loss ({figures})"
    if most < 100.0 * SMALL:
        return f"is measurably worse, but by less than {100 * SMALL:g}% ({figures})"
    return f"is measurably worse, by {figures}"


def _not_apart(others: pd.DataFrame) -> str:
    rows = others[others["verdict"].isin([UNDETERMINED, "equal"])]
    said = [f"{row['rule']} ({_times(row)})" for _, row in rows.iterrows()]
    return f"; not told apart from the best vl_norm, by efficiency over its: {', '.join(said)}" if said else ""


def _times(row: Any) -> str:
    return f"{_beside_one(row['value'])} [{_beside_one(row['low'])}, {_beside_one(row['high'])}]"


def _beside_one(ratio: float) -> str:
    """Return a ratio without rounding it onto 1."""
    shown = f"{ratio:.3g}"
    return f"{ratio:.6g}" if shown == "1" and abs(ratio - 1.0) > ROUNDING else shown
