"""How many responses carry what is measured with advantages, and what has no interval where they are few.

With one response in ten right A^2 of a right one is 81 times that of a wrong one: the noise is what a handful of
gradients make it, and no interval from a handful covers as it says. Shape letters: n responses.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from gradvar.runs.records import Estimate

Array = NDArray[np.float64]

LEAST_CARRYING = 6.0
"""Effective number of responses below which exponents, slopes, rank correlations and form 2 have no interval: of 64
responses with 2 to 5 right ones (2.1 to 5.9) within-length exponents were covered 43 to 85%, with 6 (7.3) 91 to 93%."""
FEW_CARRYING = 0.25
"""Share of all responses below which those that carry the noise are few among many (right ones: below 0.16)."""
LEAST_UNDER_A_LINE = 20.0
"""The least for a straight line where they are few among many: it leans on where these happen to lie (76 to 92% covered
with 3 to 15); and of responses at all."""


def effective_carrying(factors: Array) -> float:
    """Effective number of the responses that carry the noise, (sum A^2)^2 / sum A^4 (Kish 1965).

    n where A^2 is one value; with few right among many near their number.

    Args:
        factors: (n,) A.
    """
    squares = np.square(factors / max(float(np.abs(factors).max(initial=0.0)), 1e-300))
    total = float(squares.sum())
    return total**2 / float(squares @ squares) if total > 0.0 else float(len(squares))


def few_that_carry(factors: Array) -> NDArray[np.bool_] | None:
    """Which responses (n,) carry the noise, those of A^2 above its mean, where they are few among many; else None.

    Args:
        factors: (n,) A.
    """
    if effective_carrying(factors) >= FEW_CARRYING * len(factors):
        return None
    squares = np.square(factors)
    return np.asarray(squares > squares.mean())


def together(numbers: Iterable[float]) -> float:
    """Effective number behind what prompts have in common, from theirs: each spends one on its own constant."""
    return 1.0 + sum(number - 1.0 for number in numbers)


def unless_few(estimate: Estimate, number: float | None, least: float = LEAST_CARRYING) -> Estimate:
    """Return the estimate without interval where fewer than `least` responses, effectively, carry the noise."""
    if number is None or number >= least or math.isnan(estimate.low):
        return estimate
    return replace(estimate, low=math.nan, high=math.nan, method=f"{estimate.method}; {few_words(number, least)}")


def few_words(number: float, least: float = LEAST_CARRYING) -> str:
    """Say why there is no interval."""
    return f"no interval, {number:.1f} responses carry the noise ((sum A^2)^2 / sum A^4), fewer than {least:g}"


def least_under_a_line(n: int) -> float:
    """The least for a straight line through n responses."""
    return min(LEAST_UNDER_A_LINE, FEW_CARRYING * n)
