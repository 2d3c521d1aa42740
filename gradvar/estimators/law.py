"""The variance law: how a response's deviation grows with its length, with interval and verdict.

Families for the mean of a deviation given the length L (tokens), each with one constant per prompt when pooled:

    constant v = c,   proportional v = c L,   affine v = a + b L,   power v = c L^beta

Deviations are skewed with a spread proportional to their mean, so the mean law is fitted by Gamma quasi-likelihood
with a leverage-corrected sandwich (`quasi`). The finite-N correction sits in the mean:

    mu_i = (1 - 2/N) v(L_i) + vbar/N

with N and vbar of the responses that the mean gradient was taken over, also where a subset of them is fitted; so does
the noise of the k neighbours j in length that a within-length variance is taken from:

    mu_i = k/(k + 1) (v(L_i) + (1/k^2) sum_j v(L_j))

Shape letters: n responses fitted, N responses averaged, K prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special

from gradvar.estimators.carrying import LEAST_CARRYING, least_under_a_line, unless_few
from gradvar.estimators.intervals import (
    decide_from_margin,
    n_to_decide,
    symmetric,
)
from gradvar.estimators.law_data import (
    LawData,
    affine_shape,
    checked_data,
    constant_shape,
    curved_shape,
    power_shape,
    weights_behind,
    without_response,
)
from gradvar.estimators.law_estimates import (
    FEWEST_BEHIND,
    LARGEST_SHARE,
    MINIMUM_RESPONSES,
    NO_PAIRS,
    FamilyFit,
    curvature_of,
    error_of,
    exponent_across_of,
    exponent_of,
    families_of,
    following,
    moved_by_one,
    resting_on,
    scales_of,
)
from gradvar.estimators.least_squares import Spread, least_squares, owed, rank_correlation
from gradvar.estimators.quasi import Dependence, QuasiFit
from gradvar.estimators.spread_pairs import PairPart, Weights
from gradvar.runs.records import Estimate

Array = NDArray[np.float64]
Pairs = Callable[[Weights], PairPart]

PROPORTIONAL = "proportional to length"
NOT_PROPORTIONAL = "not proportional"
UNDETERMINED = "undetermined"


@dataclass(frozen=True, kw_only=True, eq=False)
class ExponentFit:
    """The exponent alone, and how sure it is."""

    exponent: Estimate
    """beta, for these prompts (responses drawn again)."""
    exponent_across: Estimate
    """beta, for prompts like these (Student t over K - 1); without interval below 4 prompts."""
    verdict: str
    """"proportional to length", "not proportional" or "undetermined"."""
    n_needed: float
    """Responses that would settle the verdict; the n used where it is settled."""
    n_needed_at_least: bool
    """Whether that is only how many an interval takes at least: there is none."""
    influence: Array = field(repr=False)
    """(n,) what each response adds to the exponent's error."""
    weights: Weights = field(repr=False)
    """By how much the exponent changes with each response's deviation."""
    pairs: PairPart = NO_PAIRS
    """Variance that pairs of responses add, and what the influences' squares have of it (`spread_pairs`)."""
    outlier: int | None = None
    """Row of the response with the most of the deviations, where it was suspect enough to be left out once."""
    exponent_without: float = math.nan
    """beta without it."""
    error_without: float = math.nan
    """Standard error of that; with it, it may make the error as large as what it moves."""

    @property
    def error(self) -> float:
        """Standard error of the exponent."""
        return error_of(self.influence, self.pairs)

    @property
    def rests_on(self) -> int | None:
        """Row of a response without which beta lies more than a standard error away; None where there is none."""
        return self.outlier if abs(self.exponent.value - self.exponent_without) > self.error_without else None

    def verdict_across(self, margin: float = 0.25) -> tuple[str, float]:
        """Verdict for prompts like these, and the responses it would take if prompts came in the same proportion."""
        return _verdict(self.exponent_across, margin)


@dataclass(frozen=True, kw_only=True, eq=False)
class VarianceLaw(ExponentFit):
    """What the deviations say about v(L) = c L^beta."""

    scale: Estimate
    """c: variance at one token, far outside the data; for several prompts the geometric mean."""
    level_at_reference: Estimate
    """v at `reference_length`, where its error is uncorrelated with the exponent's: log v(L) has the half-width
    sqrt(h_level^2 + h_beta^2 log(L / reference_length)^2)."""
    reference_length: float
    """Tokens."""
    families: dict[str, FamilyFit]
    """The four families by name."""
    curvature: Estimate
    """Coefficient of log(L)^2 beside the power law: an interval without 0 is lack of fit."""
    loglog_slope: Estimate
    """Least squares of log deviation on log length, deviations of 0 left out."""
    loglog_r2: Estimate
    """Its R^2."""
    line_slope: Estimate
    """Least squares of deviation on length."""
    line_intercept: Estimate
    """Its intercept; for several prompts the mean of theirs."""
    line_r2: Estimate
    """Its R^2."""
    rank_correlation: Estimate
    """Spearman's, within prompts."""

    def mean(self, lengths: Any) -> tuple[Array, Array, Array]:
        """Fitted v(L) with its pointwise band: (value, low, high), each shaped as `lengths` (tokens).

        Within-length variances of the shortest lie above it on average: they hold their neighbours' noise.
        """
        x = np.log(np.asarray(lengths, dtype=np.float64) / self.reference_length)
        middle = math.log(self.level_at_reference.value) + self.exponent.value * x
        level_half = math.log(self.level_at_reference.high / self.level_at_reference.value)
        half = np.hypot(level_half, (self.exponent.high - self.exponent.value) * x)
        return np.exp(middle), np.exp(middle - half), np.exp(middle + half)


def fit_variance_law(
    lengths: Any,
    deviations: Any,
    *,
    n_centred: Any | None = None,
    mean_deviation: Any | None = None,
    clusters: Any | None = None,
    margin: float = 0.25,
    level: float = 0.95,
    dependence: Dependence | None = None,
    pairs: Pairs | None = None,
    carrying: float | None = None,
    near: Any | None = None,
) -> VarianceLaw:
    """Fit how deviations (or within-length variances) grow with length.

    Args:
        lengths: (n,) response lengths in tokens.
        deviations: (n,) squared distances, from `deviations` (then give n_centred) or `within_length_variance`
            (then do not).
        n_centred: N of the set whose mean the deviations were taken from; a number, or (n,) for several prompts.
            None: no finite-N correction.
        mean_deviation: Mean deviation of that set, a number or (n,); None: the mean of `deviations` in each prompt,
            right where the whole set is fitted.
        clusters: (n,) labels of prompts, each with a constant of its own; None: one prompt.
        margin: The exponent is called 1 where its interval lies in [1 - margin, 1 + margin].
        level: Nominal coverage of the intervals.
        dependence: What the observations owe to each other (`spread.deviation_dependence`,
            `spread.within_dependence`), which turns the sandwich into a full delete-one jackknife. Without it the
            observations count as independent: harmless for deviations, not for within-length variances, which share
            neighbours.
        pairs: What pairs of responses add to the variance of a weighted sum of y, and to a jackknife's, which counts it
            twice or oftener (`spread_pairs`); the surplus is taken out of the exponent's. None: it stays.
        carrying: Effective number of the responses that carry the noise (`carrying.together`). Below
            `carrying.LEAST_CARRYING` nothing has an interval, below `carrying.least_under_a_line` no line. None: all.
        near: (n, k) rows of the neighbours that within-length variances were taken from, -1 for none, whose noise the
            mean then carries (`spread.nearest_in_length`, from a generator in the state that `within_length_variance`
            was given). None: it is taken for that at the response's own length.

    Returns:
        The law. Where the power law does not converge its numbers are NaN and the verdict "undetermined"; where fewer
        than two responses carry the deviations beyond what length explains (one huge outlier), one that is left out
        moves the exponent by more than its half-width, or few carry the noise (`carrying`), the exponent has no
        interval, hence the same verdict, and its method says so; scale, level and curvature follow it. `rests_on` names
        a response that moves it by more than a standard error without it.

    Raises:
        GradvarError: Shapes that differ, fewer than 4 responses (3 plus one a prompt), lengths that are not positive
            or all equal inside every prompt, deviations that are negative, not finite, or all 0 in a prompt, an
            n_centred below 3, or neighbours that are none.
    """
    data = checked_data(lengths, deviations, clusters, n_centred, mean_deviation, margin, level, near)
    x, y, codes = data.x, data.y, data.codes
    power = _fit_power(data, dependence)
    centred = data.log_length - data.centre
    fits = {
        "constant": data.fit(constant_shape(0.0 * x)),
        "proportional": data.fit(constant_shape(centred)),
        "affine": data.fit(affine_shape(x / x.mean() - 1.0), 0.0),
        "power": power,
    }
    curved = data.fit(curved_shape(centred), power.shape[0] if power.converged else 1.0, 0.0, dependence=dependence)
    exponents = _exponents(data, power, margin, level, dependence, carrying, pairs)
    scale, level_at, reference = scales_of(power, data.centre, level, exponents["pairs"])
    shared = owed(codes, dependence)
    slope, slope_r2, _ = least_squares(x, y, codes, shared, level, logs=True)
    line, line_r2, intercept = least_squares(x, y, codes, shared, level, spread=_spread(data, power))
    line, intercept = (
        unless_few(one, carrying, max(LEAST_CARRYING, least_under_a_line(len(x)))) for one in (line, intercept)
    )
    return VarianceLaw(
        **exponents,
        scale=following(scale, exponents["exponent"]),
        level_at_reference=following(level_at, exponents["exponent"]),
        reference_length=reference,
        families=families_of(fits, x, data.centre),
        curvature=following(curvature_of(curved, level), exponents["exponent"]),
        loglog_slope=unless_few(slope, carrying),
        loglog_r2=slope_r2,
        line_slope=line,
        line_intercept=intercept,
        line_r2=line_r2,
        rank_correlation=unless_few(rank_correlation(x, y, codes, shared, level), carrying),
    )


def fit_exponent(
    lengths: Any,
    deviations: Any,
    *,
    n_centred: Any | None = None,
    mean_deviation: Any | None = None,
    clusters: Any | None = None,
    margin: float = 0.25,
    level: float = 0.95,
    dependence: Dependence | None = None,
    pairs: Pairs | None = None,
    carrying: float | None = None,
    near: Any | None = None,
) -> ExponentFit:
    """Fit the power law's exponent alone; arguments, numbers and errors as in `fit_variance_law`."""
    data = checked_data(lengths, deviations, clusters, n_centred, mean_deviation, margin, level, near)
    power = _fit_power(data, dependence)
    return ExponentFit(**_exponents(data, power, margin, level, dependence, carrying, pairs))


def fitted_means(lengths: Any, deviations: Any, near: Any | None = None) -> tuple[Array, Array]:
    """Means v(L) (n,) of one prompt by the power law at the lengths fitted, and of what is fitted, E V_i with `near`.

    NaN where it does not converge. As `VarianceLaw.mean`, without all that stands beside it; arguments and errors as in
    `fit_variance_law`.
    """
    data = checked_data(lengths, deviations, None, None, None, margin=1.0, level=0.5, near=near)
    power = _fit_power(data, None)
    if not power.converged:
        none = np.full_like(data.x, math.nan)
        return none, none
    shape = power_shape(data.log_length - data.centre)
    v, seen = (np.exp(power.constants[0] + one(power.shape)[0]) for one in (shape, data.seen(shape)))
    return np.asarray(v), np.asarray(seen)


def _fit_power(data: LawData, dependence: Dependence | None) -> QuasiFit:
    return data.fit(power_shape(data.log_length - data.centre), 1.0, dependence=dependence)


def _spread(data: LawData, power: QuasiFit) -> Spread | None:
    """Spread of the observations, proportional to the power law's means; None without one."""
    if not power.converged:
        return None
    law = data.seen(power_shape(data.log_length - data.centre))(power.shape)[0]
    mean = data.a * np.exp(power.constants[data.codes] + law) + data.b
    if not float(mean.max()) < 1e6 * float(data.y.max()):
        return None  # ran through one response, to where no observation is
    relative = math.sqrt(float(((data.y / mean - 1.0) ** 2).sum()) / max(power.degrees, 1))
    return np.asarray(mean * relative), relative


def _exponents(
    data: LawData,
    power: QuasiFit,
    margin: float,
    level: float,
    dependence: Dependence | None,
    carrying: float | None,
    pairs: Pairs | None,
) -> dict[str, Any]:
    shares = weights_behind(data)
    behind, largest = 1.0 / float((shares**2).sum()), int(shares.argmax())
    outlier, without, error = None, math.nan, math.nan
    if shares[largest] > LARGEST_SHARE and power.converged:
        outlier = largest
        less = without_response(data, largest, dependence)
        fitted = None if less is None else _fit_power(less, None)
        if fitted is not None and fitted.converged:
            without, error = float(fitted.shape[0]), float(np.linalg.norm(fitted.shape_influence[:, 0]))

    def judged(estimate: Estimate) -> Estimate:
        return moved_by_one(unless_few(resting_on(estimate, behind), carrying), without)

    gain = power.shape_gain[:, 0]
    weights = Weights(gain, power.shape_own[:, 0], gain if power.shared else np.zeros_like(gain))
    part = pairs(weights) if pairs is not None and power.shared else NO_PAIRS
    part = part if math.isfinite(sum(part)) else NO_PAIRS
    exponent = judged(exponent_of(power, level, part))
    verdict, n_needed = _verdict(exponent, margin)
    if math.isnan(exponent.low):
        n_needed = _more(exponent.n, behind, carrying)
    return {
        "exponent": exponent,
        "exponent_across": judged(exponent_across_of(power, level, part)),
        "verdict": verdict,
        "n_needed": n_needed,
        "n_needed_at_least": math.isnan(exponent.low),
        "influence": power.shape_influence[:, 0],
        "weights": weights,
        "pairs": part,
        "outlier": outlier,
        "exponent_without": without,
        "error_without": error,
    }


def heterogeneity(fits: Sequence[ExponentFit], level: float) -> tuple[Estimate, float]:
    """How much the exponent differs between prompts beyond what responses explain (DerSimonian and Laird).

    Args:
        fits: One fit a prompt.
        level: For the record; no interval is given.

    Returns:
        (tau, the standard deviation of the prompts' own exponents: sqrt of the moment estimate of tau^2, 0 where that
        is not positive; the p value of Cochran's Q, chi-square with K - 1 degrees). NaN below two usable fits.
    """
    # A law without any scatter has an exponent without error, which would outweigh everything.
    usable = [f for f in fits if math.isfinite(f.exponent.low) and f.error > 1e-8]
    method = "DerSimonian-Laird over prompts, no interval"
    n = sum(f.exponent.n for f in usable)
    if len(usable) < len(fits):
        method += f"; {len(usable)} of {len(fits)} prompts' exponents have an interval"
    if len(usable) < 2:
        return symmetric(math.nan, math.nan, level, method + "; fewer than 2 prompts", n, len(usable)), math.nan
    beta = np.array([f.exponent.value for f in usable])
    weight = np.array([1.0 / f.error**2 for f in usable])
    centre = float(weight @ beta / weight.sum())
    q = float(weight @ (beta - centre) ** 2)
    excess = (q - (len(usable) - 1)) / (weight.sum() - (weight**2).sum() / weight.sum())
    p = float(special.chdtrc(len(usable) - 1, q))
    return symmetric(math.sqrt(max(float(excess), 0.0)), math.nan, level, method, n, len(usable)), p


def _more(n: int, behind: float, carrying: float | None) -> float:
    """How many responses an exponent takes at least that has no interval among n."""
    shares = FEWEST_BEHIND / behind, LEAST_CARRYING / carrying if carrying is not None else 0.0
    return float(max(MINIMUM_RESPONSES, n + 1, *(math.ceil(n * share) for share in shares)))


def _verdict(exponent: Estimate, margin: float) -> tuple[str, float]:
    interval = (exponent.value, exponent.low, exponent.high, 1 - margin, 1 + margin)
    verdict = {1: PROPORTIONAL, -1: NOT_PROPORTIONAL, 0: UNDETERMINED}[decide_from_margin(*interval)]
    return verdict, n_to_decide(exponent.n, *interval)
