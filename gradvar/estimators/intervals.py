"""From replicates and standard errors to intervals, verdicts and the number of responses that would decide.

Shape letters: N responses, K prompts.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special

from gradvar.errors import GradvarError
from gradvar.runs.records import Estimate

Array = NDArray[np.float64]

MINIMUM_PROMPTS = 4
"""Below this many prompts nothing is said about prompts like these."""

THESE_PROMPTS = "these prompts"
PROMPTS_LIKE_THESE = "prompts like these"


def check_level(level: float) -> None:
    """Refuse a confidence level outside (0, 1).

    Raises:
        GradvarError: The level is no probability.
    """
    if not 0.0 < level < 1.0:
        raise GradvarError(f"level must lie between 0 and 1, for example 0.95, received {level!r}")


def t_quantile(level: float, degrees: float) -> float:
    """Two-sided Student quantile; NaN without a degree of freedom."""
    return float(special.stdtrit(degrees, 0.5 + level / 2)) if degrees > 0 else math.nan


def wilson(count: int, n: int, level: float) -> tuple[float, float]:
    """Wilson's interval for a share of which `count` of n were seen (statsmodels' takes a second to import).

    With a Poisson's end where 1 to 3 are on one side, to 2 up to n = 50 (Brown, Cai and DasGupta 2001): shares near
    1/(6 n) are covered 84% without, at least 92% with.
    """
    square = float(special.ndtri(0.5 + level / 2.0)) ** 2
    share = count / n
    middle = share + square / (2.0 * n)
    half = math.sqrt(square * (share * (1.0 - share) / n + square / (4.0 * n**2)))
    low, high = (middle - half) / (1.0 + square / n), (middle + half) / (1.0 + square / n)
    few = 2 if n <= 50 else 3
    if 1 <= count <= few:
        low = min(low, float(special.gammaincinv(count, 1.0 - level)) / n)
    if 1 <= n - count <= few:
        high = max(high, 1.0 - float(special.gammaincinv(n - count, 1.0 - level)) / n)
    return max(low, 0.0), min(high, 1.0)


def jackknife_variance(replicates: Array) -> Any:
    """Delete-one jackknife variance (n - 1)/n sum (theta_(-i) - mean)^2 over the first axis, NaN if one is infinite."""
    n = replicates.shape[0]
    with np.errstate(invalid="ignore"):  # inf - inf
        centred = replicates - replicates.mean(axis=0)
    return (n - 1) / n * (centred**2).sum(axis=0)


LEAST_LEFT = 0.25
"""At least this share of a jackknife variance is left: its surplus is estimated too."""


def without_surplus(variance: Any, noise: Any, pairs: Any = 0.0) -> Any:
    """Jackknife variance less what is too much in it; what is left is the sampling variance to within some percent.

    Args:
        variance: Of the jackknife.
        noise: Its part from the choice of permutations.
        pairs: The sampling variance that pairs of responses add, which a jackknife counts twice; what remains is never
            below it. NaN counts as 0, as for `noise`.
    """
    chance, twice = (np.where(np.isfinite(part), part, 0.0) for part in (noise, pairs))
    return np.maximum(np.maximum(variance - chance - twice, LEAST_LEFT * variance), twice)


def effective_degrees(influence: Array, most: float) -> float:
    """Degrees of freedom of a variance sum u_i^2, from how unevenly the u_i contribute, at most `most`.

    A sum of squares estimates its expectation with variance about sum u^4 - (sum u^2)^2 / n; matched to a chi-square
    (Satterthwaite) that is 2 (sum u^2)^2 / variance degrees: n for normal u, few where some responses carry most.
    """
    largest = float(np.abs(influence).max(initial=0.0))
    scaled = influence / largest if 0.0 < largest < math.inf else influence  # fourth powers overflow
    return degrees_of_squares(scaled**2, most)


def quantiles_of_columns(influences: Array, level: float, most: float) -> Array:
    """`t_quantile` of the `effective_degrees` of every column of (n, F)."""
    squares = influences**2
    total = squares.sum(axis=0)
    with np.errstate(all="ignore"):
        variance = (squares**2).sum(axis=0) - total**2 / len(squares)
        degrees = np.clip(2.0 * total**2 / variance, 1.0, most)
        degrees = np.where((total > 0.0) & (variance > 0.0) & (len(squares) > 1), degrees, most)
        found = special.stdtrit(degrees, 0.5 + level / 2)
    return np.where(degrees > 0.0, found, np.nan)


def degrees_of_squares(squares: Array, most: float) -> float:
    """`effective_degrees` from the u_i^2, or from estimates of them without bias, which only lowers it.

    Estimates whose sum is not positive tell nothing of the variance: one degree.
    """
    total = float(squares.sum())
    if len(squares) < 2 or not squares.any():
        return most
    if total <= 0.0:
        return min(most, 1.0)
    variance = float((squares**2).sum()) - total**2 / len(squares)
    return float(min(most, max(1.0, 2.0 * total**2 / variance))) if variance > 0 else most


NEAR_BEND, FAR_BEND = (0.1, 0.3), (0.05, 0.8)
"""From which bend on the nearer and the farther end move, and by how much at most: what else skews is as large below
the first, and a first-order correction goes too far beyond the second."""


def bent_quantiles(bend: float, quantile: float) -> tuple[float, float]:
    """Quantiles (low, high) of (estimate - truth) / error where pairs of responses skew the estimate.

    -+quantile - bend (quantile^2 + 1)/2, the Edgeworth expansion of a studentised U-statistic (Callaert and Veraverbeke
    1981), bend = sum_ij u_i w_ij u_j / (sum u^2)^(3/2) with influences u and second differences w. The end brought
    nearer moves within `NEAR_BEND`, the farther within `FAR_BEND`: where E g lies along the noise the standard error
    grows with the estimate, and an end as little moved as the nearer missed up to 14% alone.
    """
    size = abs(bend) if math.isfinite(bend) else 0.0
    curve = (quantile**2 + 1.0) / 2.0
    near, far = (curve * min(max(size - least, 0.0), most) for least, most in (NEAR_BEND, FAR_BEND))
    near = min(near, quantile)  # an interval holds its estimate
    return (-quantile - far, quantile - near) if bend > 0.0 else (near - quantile, quantile + far)


def reach_of_skewed(influence: Array, error: float, quantile: float, level: float) -> tuple[float, float]:
    """How far (below, above) an interval reaches where the influences (n,) are skewed: Hall's (1992) correction.

    -+q - skewness (2 z^2 + 1)/6 with the skewness of their sum, z the normal quantile (at one of few degrees of freedom
    an end would pass the estimate): the farther end moves by all of it, the one brought nearer within `NEAR_BEND`.
    Where rare long responses make the noise an estimate that lacks them is both too high and too sure: efficiencies
    over the best one's were covered 92 to 94% without, nearly all misses on one side.
    """
    square = float(influence @ influence)
    if not (0.0 < square < math.inf and error > 0.0):
        return quantile * error, quantile * error
    scaled = influence / math.sqrt(square)
    normal = float(special.ndtri(0.5 + level / 2.0))
    moved = float((scaled**3).sum()) * (2.0 * normal**2 + 1.0) / 6.0
    near, far = quantile - _brought_nearer(moved, normal), quantile + abs(moved)
    return (near * error, far * error) if moved > 0.0 else (far * error, near * error)


def _brought_nearer(moved: float, normal: float) -> float:
    """By how much the nearer end moves, in standard errors, where the farther one moves by `moved`."""
    return normal - float(min(np.abs(bent_quantiles(2.0 * moved / (normal**2 + 1.0), normal))))


def reach_of_sum(influence: Array, spread: Array, skewness: Any, *, most: float, level: float) -> tuple[float, float]:
    """How far (below, above) the interval of a sum of skewed observations reaches, their places given.

    Two estimates of its error, of which the wider interval holds: by the observations' own residuals, and by the spread
    of a law fitted to all of them, which has all their degrees of freedom, however few carry the sum. The first misses
    where those few happen to lie low together, since their residuals are then small too; the second where the law does
    not fit them. That likelier miss moves both ends by Hall's (1992) correction, -+q - skewness (2 q^2 + 1)/6: the
    farther one by all of it, the one brought nearer within `NEAR_BEND`.

    Args:
        influence: (n,) what each observation adds to the error.
        spread: (n,) standard deviations of what they add, by the law.
        skewness: Of each, by the law: a number or (n,).
        most: Degrees of freedom at most.
        level: Nominal coverage.
    """
    own, error = float(np.linalg.norm(influence)), float(np.linalg.norm(spread))
    degrees = effective_degrees(influence, most)
    if not error > 0.0:
        return t_quantile(level, degrees) * own, t_quantile(level, degrees) * own
    half = max(t_quantile(level, degrees) * own, t_quantile(level, most) * error)
    normal = float(special.ndtri(0.5 + level / 2.0))
    moved = float((skewness * (spread / error) ** 3).sum()) * (2.0 * normal**2 + 1.0) / 6.0
    near, far = half - _brought_nearer(moved, normal) * error, half + abs(moved) * error
    return (near, far) if moved > 0.0 else (far, near)


def symmetric(value: float, half: float, level: float, method: str, n: int, clusters: int) -> Estimate:
    """Estimate with the interval value +- half."""
    return Estimate(
        value=value, low=value - half, high=value + half, level=level, method=method, n=n, clusters=clusters, seed=None
    )


def at_least_as_wide(across: Estimate, here: Estimate) -> Estimate:
    """Estimate for prompts like these, its ends no nearer than those for these prompts, where both have an interval.

    Prompts drawn again vary at least as much as responses drawn again.
    """
    if math.isnan(across.value) or math.isnan(here.value) or math.isnan(across.low) or math.isnan(here.low):
        return across
    return replace(across, low=min(across.low, here.low), high=max(across.high, here.high))


def decide_from_margin(value: float, low: float, high: float, margin_low: float, margin_high: float) -> int:
    """Say where an interval lies: 1 inside the margin, -1 wholly outside, 0 across an edge or without interval."""
    if not (math.isfinite(value) and math.isfinite(low) and math.isfinite(high)):
        return 0
    if margin_low <= low and high <= margin_high:
        return 1
    if high < margin_low or low > margin_high:
        return -1
    return 0


def n_to_decide(n: int, value: float, low: float, high: float, margin_low: float, margin_high: float) -> float:
    """Responses that would settle a verdict: N (half-width / distance to the nearer margin)^2, rounded up.

    A half-width shrinks like 1/sqrt(N). Where the interval decides already the N used is returned; where the value
    sits on the margin no N would do and inf is returned; without an interval NaN.
    """
    if not (math.isfinite(value) and math.isfinite(low) and math.isfinite(high)):
        return math.nan
    if decide_from_margin(value, low, high, margin_low, margin_high) != 0:
        return float(n)
    distance = min(abs(value - margin_low), abs(value - margin_high))
    if distance == 0.0:
        return math.inf
    # The side that has to move is the one that crosses the nearer edge.
    nearer_below = abs(value - margin_low) < abs(value - margin_high)
    inside = margin_low <= value <= margin_high
    half_width = (value - low) if nearer_below == inside else (high - value)
    return float(math.ceil(n * max(1.0, (half_width / distance) ** 2) - 1e-9 * n))
