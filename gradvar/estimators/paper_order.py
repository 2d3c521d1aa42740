"""The paper's order of CVs, and what it asks of the ratio of any two rules.

    CV(grpo) = CV(vl_norm 1) <= CV(vl_norm alpha) <= CV(dapo) = CV(dr_grpo),   0 <= alpha <= 1

It is proved with lengths given, Var = V L and E[g | L] constant; on measured variances and on the total CV it is a
question to the data.
"""

from __future__ import annotations

import math

from gradvar.estimators.aggregation import Rule

Variant = tuple[Rule, float | None]
"""A rule with its alpha, None where it takes none."""

EQUAL = "equal"
AT_LEAST = "at least 1"
AT_MOST = "at most 1"
NOTHING = "nothing"

HOLDS = "holds"
VIOLATED = "violated"
UNDETERMINED = "undetermined"
NOT_CLAIMED = "not claimed"
BY_ALGEBRA = "by algebra"


def claim(variant: Variant, reference: Variant) -> str:
    """What the order says of CV(variant) / CV(reference): "equal", "at least 1", "at most 1" or "nothing"."""
    one, two = _place(variant), _place(reference)
    if math.isnan(one) or math.isnan(two):
        return NOTHING
    return EQUAL if one == two else AT_LEAST if one > two else AT_MOST


def judge(claimed: str, low: float, high: float) -> str:
    """Whether a ratio's interval bears a claim out: "holds", "violated", "undetermined" or "not claimed".

    An equality can only be refuted.
    """
    if claimed == NOTHING:
        return NOT_CLAIMED
    above, below = low > 1.0, high < 1.0
    if claimed == EQUAL:
        return VIOLATED if above or below else UNDETERMINED
    if claimed == AT_LEAST:
        return HOLDS if above else VIOLATED if below else UNDETERMINED
    return HOLDS if below else VIOLATED if above else UNDETERMINED


def whole_order(verdicts: list[str]) -> str:
    """Verdict on the order from those on its ratios: violated by one, held by all inequalities, else undetermined."""
    told = [v for v in verdicts if v not in (NOT_CLAIMED, BY_ALGEBRA)]
    if VIOLATED in told:
        return VIOLATED
    return HOLDS if told and all(v == HOLDS for v in told) else UNDETERMINED


def _place(variant: Variant) -> float:
    """Place in the order from 0 (least CV) to 1; NaN outside of it."""
    rule, alpha = variant
    if rule.name == "grpo":
        return 0.0
    if rule.name in ("dapo", "dr_grpo"):
        return 1.0
    if rule.name == "vl_norm" and alpha is not None and 0.0 <= alpha <= 1.0:
        return 1.0 - alpha
    return math.nan
