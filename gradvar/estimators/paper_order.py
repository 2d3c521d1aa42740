"""The paper's order of CVs, and what it asks of the ratio of any two rules.

    CV(grpo) = CV(vl_norm 1) <= CV(vl_norm alpha) <= CV(dapo) = CV(dr_grpo),   0 <= alpha <= 1

It is proved with lengths given, Var = V L and E[g | L] constant; on measured variances and on the total CV it is a
question to the data. An equality is judged with a margin, `EQUALITY_MARGIN`.
"""

from __future__ import annotations

import math

from gradvar.estimators.aggregation import Rule
from gradvar.runs.config import EQUALITY_MARGIN
from gradvar.runs.records import Estimate

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
NOT_TESTED = "not tested"
HIGHER = "higher"
LOWER = "lower"

ROUNDING = 1e-9
"""Equal lengths make every ratio 1 to rounding, and a theorem is not violated by rounding."""


def claim(variant: Variant, reference: Variant) -> str:
    """What the order says of CV(variant) / CV(reference): "equal", "at least 1", "at most 1" or "nothing"."""
    one, two = _place(variant), _place(reference)
    if math.isnan(one) or math.isnan(two):
        return NOTHING
    return EQUAL if one == two else AT_LEAST if one > two else AT_MOST


def judge(claimed: str, low: float, high: float, *, margin: float = EQUALITY_MARGIN) -> str:
    """Whether a ratio's interval bears a claim out: "holds", "violated", "undetermined" or "not claimed".

    No data show that two CVs are equal to the last digit, so an equality holds where the whole interval lies inside
    [1 / (1 + margin), 1 + margin] and is violated where it lies wholly outside. "At least" and "at most" allow 1
    itself. A ratio that is 1 up to rounding bears out all three.
    """
    if claimed == NOTHING:
        return NOT_CLAIMED
    if claimed == EQUAL:
        least, most = 1.0 / (1.0 + margin), 1.0 + margin
        inside = low >= least - ROUNDING and high <= most + ROUNDING
        outside = low > most + ROUNDING or high < least - ROUNDING
        return HOLDS if inside else VIOLATED if outside else UNDETERMINED
    above, below = low >= 1.0 - ROUNDING, high <= 1.0 + ROUNDING
    if above and below:
        return HOLDS
    if claimed == AT_LEAST:
        return HOLDS if above else VIOLATED if high < 1.0 - ROUNDING else UNDETERMINED
    return HOLDS if below else VIOLATED if low > 1.0 + ROUNDING else UNDETERMINED


def needed_to_judge(claimed: str, ratio: Estimate, *, margin: float = EQUALITY_MARGIN) -> float:
    """Responses a prompt that would decide an undetermined claim; NaN where it is decided, unclaimed or unresolved.

    n (half-width / distance)^2 on the log scale, the distance to 1 or to the equality's nearer margin; the half-width
    of the side that has to come in.
    """
    if judge(claimed, ratio.low, ratio.high, margin=margin) != UNDETERMINED or not ratio.value > 0.0:
        return math.nan
    if not (math.isfinite(ratio.high) and ratio.low > 0.0):
        return math.nan
    value, low, high = (math.log(end) for end in (ratio.value, ratio.low, ratio.high))
    ends = (-math.log1p(margin), math.log1p(margin)) if claimed == EQUAL else (0.0, 0.0)
    crossed = [
        half / abs(value - end) if value != end else math.inf
        for end in ends
        if low < end < high
        for half in (high - value if value < end else value - low,)
    ]
    each = ratio.n / max(ratio.clusters, 1)
    return float(math.ceil(each * max(crossed) ** 2)) if crossed and math.isfinite(max(crossed)) else math.inf


def side(low: float, high: float) -> str:
    """On which side of 1 a ratio lies: "equal" (1 up to rounding), "higher", "lower" or "undetermined"."""
    if abs(low - 1.0) <= ROUNDING and abs(high - 1.0) <= ROUNDING:
        return EQUAL
    return HIGHER if low > 1.0 + ROUNDING else LOWER if high < 1.0 - ROUNDING else UNDETERMINED


def whole_order(verdicts: list[str]) -> str:
    """Verdict on the relations tested: violated by one, held by all (some by algebra), else undetermined.

    "not tested" where none was: no two rules of the order are compared.
    """
    told = [v for v in verdicts if v != NOT_CLAIMED]
    if not told:
        return NOT_TESTED
    if VIOLATED in told:
        return VIOLATED
    return HOLDS if all(v in (HOLDS, BY_ALGEBRA) for v in told) else UNDETERMINED


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
