"""The variance law: how a response's deviation grows with its length, with interval and verdict.

Families for the mean of a deviation given the length L (tokens), each with one constant per prompt when pooled:

    constant v = c,   proportional v = c L,   affine v = a + b L,   power v = c L^beta

Deviations are skewed with a spread proportional to their mean, so the mean law is fitted by Gamma quasi-likelihood
with a leverage-corrected sandwich (`quasi`). The finite-N correction sits in the mean:

    mu_i = (1 - 2/N) v(L_i) + vbar/N

with N and vbar of the responses that the mean gradient was taken over, also where a subset of them is fitted.
Shape letters: n responses fitted, N responses averaged, K prompts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from gradvar.errors import GradvarError
from gradvar.estimators.intervals import (
    MINIMUM_PROMPTS,
    PROMPTS_LIKE_THESE,
    THESE_PROMPTS,
    check_level,
    decide_from_margin,
    effective_degrees,
    n_to_decide,
    t_quantile,
)
from gradvar.estimators.quasi import Dependence, QuasiFit, Shape, fit_quasi
from gradvar.runs.records import Estimate

Array = NDArray[np.float64]

PROPORTIONAL = "proportional to length"
NOT_PROPORTIONAL = "not proportional"
UNDETERMINED = "undetermined"

MINIMUM_RESPONSES = 16
"""Fewer responses than this get an exponent without interval: its coverage was not measured below."""


@dataclass(frozen=True, kw_only=True)
class FamilyFit:
    """One family of the law."""

    name: str
    """constant, proportional, affine or power."""
    parameters: dict[str, float]
    """By name, per token where L enters; for K > 1 the constants' geometric mean."""
    deviance: float
    """Gamma quasi-deviance: smaller fits better."""
    explained: float
    """1 - deviance / deviance of the constant family."""
    converged: bool
    """False where the fit ran to the edge of what the family allows."""


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
    influence: Array = field(repr=False)
    """(n,) what each response adds to the exponent's error."""

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
        """Fitted v(L) with its pointwise band: (value, low, high), each shaped as `lengths` (tokens)."""
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

    Returns:
        The law. Where the power law does not converge its numbers are NaN and the verdict "undetermined".

    Raises:
        GradvarError: Shapes that differ, fewer than 4 responses (3 plus one a prompt), lengths that are not positive
            or all equal inside every prompt, deviations that are negative, not finite, or all 0 in a prompt, or an
            n_centred below 3.
    """
    data = _checked(lengths, deviations, clusters, n_centred, mean_deviation, margin, level)
    x, y, codes = data.x, data.y, data.codes
    power = _fit_power(data, dependence)
    centred = data.log_length - data.centre
    fits = {
        "constant": data.fit(_offset(0.0 * x)),
        "proportional": data.fit(_offset(centred)),
        "affine": data.fit(_affine(x / x.mean() - 1.0), 0.0),
        "power": power,
    }
    curved = data.fit(_curved(centred), power.shape[0] if power.converged else 1.0, 0.0, dependence=dependence)
    scale, level_at, reference = _scales(power, data.centre, level)
    slope, slope_r2, _ = _least_squares(
        data.log_length, np.log(np.where(y > 0, y, 1.0)), codes, y > 0, level, "log-log"
    )
    line, line_r2, intercept = _least_squares(x, y, codes, np.ones_like(y, dtype=bool), level, "line")
    return VarianceLaw(
        **_exponents(power, margin, level),
        scale=scale,
        level_at_reference=level_at,
        reference_length=reference,
        families=_families(fits, x, data.centre),
        curvature=_curvature(curved, level),
        loglog_slope=slope,
        loglog_r2=slope_r2,
        line_slope=line,
        line_intercept=intercept,
        line_r2=line_r2,
        rank_correlation=rank_correlation(x, y, codes, level),
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
) -> ExponentFit:
    """Fit the power law's exponent alone; arguments, numbers and errors as in `fit_variance_law`."""
    data = _checked(lengths, deviations, clusters, n_centred, mean_deviation, margin, level)
    return ExponentFit(**_exponents(_fit_power(data, dependence), margin, level))


@dataclass(frozen=True, kw_only=True, eq=False)
class _Data:
    """Checked observations with the finite-N correction: mu = a v + b."""

    x: Array
    y: Array
    codes: NDArray[np.intp]
    a: Array
    b: Array
    log_length: Array
    centre: float

    def fit(self, shape: Shape, *start: float, dependence: Dependence | None = None) -> QuasiFit:
        return fit_quasi(self.y, self.codes, self.a, self.b, shape, np.array(start), dependence)


def _fit_power(data: _Data, dependence: Dependence | None) -> QuasiFit:
    return data.fit(_power(data.log_length - data.centre), 1.0, dependence=dependence)


def _exponents(power: QuasiFit, margin: float, level: float) -> dict[str, Any]:
    exponent = _exponent(power, level)
    verdict, n_needed = _verdict(exponent, margin)
    return {
        "exponent": exponent,
        "exponent_across": _exponent_across(power, level),
        "verdict": verdict,
        "n_needed": n_needed,
        "influence": power.shape_influence[:, 0],
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
    usable = [f for f in fits if math.isfinite(f.exponent.low)]
    method = "DerSimonian-Laird over prompts, no interval"
    n = sum(f.exponent.n for f in fits)
    if len(usable) < 2:
        return _estimate(math.nan, math.nan, level, method + "; fewer than 2 prompts", n, len(usable)), math.nan
    beta = np.array([f.exponent.value for f in usable])
    weight = np.array([1.0 / float(f.influence @ f.influence) for f in usable])
    centre = float(weight @ beta / weight.sum())
    q = float(weight @ (beta - centre) ** 2)
    excess = (q - (len(usable) - 1)) / (weight.sum() - (weight**2).sum() / weight.sum())
    p = float(stats.chi2.sf(q, len(usable) - 1))
    return _estimate(math.sqrt(max(float(excess), 0.0)), math.nan, level, method, n, len(usable)), p


def _verdict(exponent: Estimate, margin: float) -> tuple[str, float]:
    interval = (exponent.value, exponent.low, exponent.high, 1 - margin, 1 + margin)
    verdict = {1: PROPORTIONAL, -1: NOT_PROPORTIONAL, 0: UNDETERMINED}[decide_from_margin(*interval)]
    return verdict, n_to_decide(exponent.n, *interval)


def _checked(
    lengths: Any,
    deviations: Any,
    clusters: Any | None,
    n_centred: Any | None,
    mean_deviation: Any | None,
    margin: float,
    level: float,
) -> _Data:
    check_level(level)
    if not margin > 0:
        raise GradvarError(f"margin must be positive, for example 0.25, received {margin!r}")
    x = np.asarray(lengths, dtype=np.float64)
    y = np.asarray(deviations, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise GradvarError(f"lengths {x.shape} and deviations {y.shape} must be two rows of the same responses")
    labels = np.zeros(len(x), dtype=np.intp) if clusters is None else np.asarray(clusters)
    if labels.shape != x.shape:
        raise GradvarError(f"clusters must label every response: {len(x)} lengths, labels of shape {labels.shape}")
    codes = np.unique(labels, return_inverse=True)[1].astype(np.intp) if len(x) else labels
    count = int(codes.max()) + 1 if len(x) else 1
    if len(x) < count + 3:
        raise GradvarError(f"a variance law of {count} prompt(s) needs at least {count + 3} responses, got {len(x)}")
    if not (np.isfinite(x).all() and (x > 0).all()):
        raise GradvarError("lengths must be positive numbers of tokens")
    if not (np.isfinite(y).all() and (y >= 0).all()):
        raise GradvarError("deviations must be finite and not negative (they are squared distances)")
    empty = np.flatnonzero(np.bincount(codes, weights=y) == 0)
    if empty.size:
        raise GradvarError(
            f"all deviations are 0 in {empty.size} prompt(s) (identical responses, or an advantage of 0 everywhere): "
            "there is no variance to fit; leave such prompts out"
        )
    if all(np.ptp(x[codes == k]) == 0 for k in range(count)):
        raise GradvarError("all responses have one length: an exponent needs at least two different lengths")
    a, b = _correction(y, codes, n_centred, mean_deviation)
    log_length = np.log(x)
    return _Data(x=x, y=y, codes=codes, a=a, b=b, log_length=log_length, centre=float(log_length.mean()))


def _correction(y: Array, codes: NDArray[np.intp], n_centred: Any | None, mean: Any | None) -> tuple[Array, Array]:
    if n_centred is None:
        return np.ones_like(y), np.zeros_like(y)
    n = np.broadcast_to(np.asarray(n_centred, dtype=np.float64), y.shape)
    if not (n >= 3).all():
        raise GradvarError("n_centred must be at least 3: with fewer the deviations do not tell responses apart")
    if mean is None:
        means = (np.bincount(codes, weights=y) / np.bincount(codes))[codes]
    else:
        means = np.broadcast_to(np.asarray(mean, dtype=np.float64), y.shape)
        if not (np.isfinite(means).all() and (means >= 0).all()):
            raise GradvarError("mean_deviation must be finite and not negative")
    # sum_i D_i = (N - 1) vbar in expectation.
    vbar = means * n / (n - 1)
    return 1.0 - 2.0 / n, vbar / n


def _offset(log_shape: Array) -> Shape:
    return lambda s: (log_shape, np.zeros((len(log_shape), 0)))


def _power(x: Array) -> Shape:
    return lambda s: (s[0] * x, x[:, None])


def _curved(x: Array) -> Shape:
    basis = np.stack([x, x**2], axis=1)
    return lambda s: (basis @ s, basis)


def _affine(x: Array) -> Shape:
    def shape(s: Array) -> tuple[Array, Array]:
        factor = 1.0 + s[0] * x
        allowed = np.where(factor > 0, factor, np.nan)
        return np.log(allowed), (x / allowed)[:, None]

    return shape


def _estimate(value: float, half: float, level: float, method: str, n: int, clusters: int) -> Estimate:
    return Estimate(
        value=value, low=value - half, high=value + half, level=level, method=method, n=n, clusters=clusters, seed=None
    )


def _half_width(influence: Array, fit: QuasiFit, level: float) -> float:
    quantile = t_quantile(level, effective_degrees(influence, fit.degrees))
    return quantile * float(np.linalg.norm(influence))


def _exponent(fit: QuasiFit, level: float) -> Estimate:
    n, clusters = len(fit.shape_influence), len(fit.constants)
    method = f"Gamma quasi-likelihood, HC3 sandwich, t; {THESE_PROMPTS}"
    if not fit.converged:
        return _estimate(math.nan, math.nan, level, method + "; did not converge", n, clusters)
    half = _half_width(fit.shape_influence[:, 0], fit, level)
    if n < MINIMUM_RESPONSES:
        half, method = math.nan, method + f"; no interval below {MINIMUM_RESPONSES} responses"
    return _estimate(float(fit.shape[0]), half, level, method, n, clusters)


def _exponent_across(fit: QuasiFit, level: float) -> Estimate:
    n, clusters = len(fit.shape_influence), len(fit.constants)
    method = f"Gamma quasi-likelihood, delete-one-prompt jackknife, t; {PROMPTS_LIKE_THESE}"
    if not fit.converged or clusters < MINIMUM_PROMPTS:
        note = f"; not given below {MINIMUM_PROMPTS} prompts" if clusters < MINIMUM_PROMPTS else "; did not converge"
        return _estimate(math.nan, math.nan, level, method + note, n, clusters)
    information = fit.cluster_information[:, 0, 0]
    moved = -fit.cluster_scores[:, 0] / (information.sum() - information)
    if not np.isfinite(moved).all():
        return _estimate(math.nan, math.nan, level, method + "; one prompt holds all the lengths", n, clusters)
    variance = (clusters - 1) / clusters * float(((moved - moved.mean()) ** 2).sum())
    half = t_quantile(level, clusters - 1) * math.sqrt(variance)
    return _estimate(float(fit.shape[0]), half, level, method, n, clusters)


def _scales(fit: QuasiFit, centre: float, level: float) -> tuple[Estimate, Estimate, float]:
    n, clusters = len(fit.shape_influence), len(fit.constants)
    method = f"Gamma quasi-likelihood, HC3 sandwich on the log, t; {THESE_PROMPTS}"
    if not fit.converged:
        none = _estimate(math.nan, math.nan, level, method + "; did not converge", n, clusters)
        return none, none, math.nan
    slope_influence = fit.shape_influence[:, 0]
    constant_influence = fit.constants_influence.mean(axis=1)
    spread = float(slope_influence @ slope_influence)
    pivot = -float(constant_influence @ slope_influence) / spread if spread > 0 else 0.0

    # The exponent's degrees of freedom serve the whole band, so that its pieces fit together.
    quantile = t_quantile(level, effective_degrees(slope_influence, fit.degrees))

    def at(log_length: float) -> Estimate:
        log_value = float(fit.constants.mean()) + float(fit.shape[0]) * log_length
        half = quantile * float(np.linalg.norm(constant_influence + log_length * slope_influence))
        if n < MINIMUM_RESPONSES:
            half = math.nan
        with np.errstate(over="ignore"):
            value, low, high = (float(np.exp(log_value + step)) for step in (0.0, -half, half))
        return Estimate(value=value, low=low, high=high, level=level, method=method, n=n, clusters=clusters, seed=None)

    return at(-centre), at(pivot), _exp(centre + pivot)


def _curvature(fit: QuasiFit, level: float) -> Estimate:
    n, clusters = len(fit.shape_influence), len(fit.constants)
    method = "Gamma quasi-likelihood, HC3 sandwich, t; coefficient of log(L)^2"
    if not fit.converged or n < MINIMUM_RESPONSES:
        return _estimate(math.nan, math.nan, level, method + "; not determined", n, clusters)
    half = _half_width(fit.shape_influence[:, 1], fit, level)
    return _estimate(float(fit.shape[1]), half, level, method, n, clusters)


def _exp(value: float) -> float:
    """Exponential that overflows to infinity, as a fit without a finite scale deserves."""
    with np.errstate(over="ignore"):
        return float(np.exp(value))


def _families(fits: dict[str, QuasiFit], x: Array, centre: float) -> dict[str, FamilyFit]:
    base = fits["constant"].deviance

    def parameters(name: str, fit: QuasiFit) -> dict[str, float]:
        constant = float(fit.constants.mean())
        if name == "constant":
            return {"c": _exp(constant)}
        if name == "proportional":
            return {"c": _exp(constant - centre)}
        if name == "affine":
            value, s = _exp(constant), float(fit.shape[0])
            return {"a": value * (1.0 - s), "b": value * s / float(x.mean())}
        return {"c": _exp(constant - float(fit.shape[0]) * centre), "beta": float(fit.shape[0])}

    return {
        name: FamilyFit(
            name=name,
            parameters=parameters(name, fit),
            deviance=fit.deviance,
            explained=1.0 - fit.deviance / base if base > 0 else math.nan,
            converged=fit.converged,
        )
        for name, fit in fits.items()
    }


def _least_squares(
    x: Array, y: Array, codes: NDArray[np.intp], keep: NDArray[np.bool_], level: float, what: str
) -> tuple[Estimate, Estimate, Estimate]:
    """Ordinary least squares with a constant per cluster: slope (HC3, t), R^2 inside clusters, mean intercept."""
    x, y, codes = x[keep], y[keep], codes[keep]
    present, codes = np.unique(codes, return_inverse=True)
    n, clusters = len(x), len(present)
    method = f"least squares ({what}), HC3, t"
    sizes = np.bincount(codes)
    x_mean, y_mean = np.bincount(codes, weights=x) / sizes, np.bincount(codes, weights=y) / sizes
    dx, dy = x - x_mean[codes], y - y_mean[codes]
    total = float(dx @ dx)
    degrees = n - clusters - 1
    if degrees < 1 or total <= 1e-24 * float(x @ x):
        none = _estimate(math.nan, math.nan, level, method + "; not determined", n, clusters)
        return none, none, none
    slope = float(dx @ dy) / total
    residual = dy - slope * dx
    freed = residual / np.maximum(1.0 - 1.0 / sizes[codes] - dx**2 / total, 1e-12)
    quantile = t_quantile(level, degrees)
    slope_influence = dx / total * freed
    shares = freed / sizes[codes] / clusters
    intercept_influence = shares - float(x_mean.mean()) * slope_influence
    all_y = float(dy @ dy)
    r2 = 1.0 - float(residual @ residual) / all_y if all_y > 0 else math.nan
    intercept = float(y_mean.mean()) - slope * float(x_mean.mean())
    return (
        _estimate(slope, quantile * float(np.linalg.norm(slope_influence)), level, method, n, clusters),
        _estimate(r2, math.nan, level, f"least squares ({what}), no interval", n, clusters),
        _estimate(intercept, quantile * float(np.linalg.norm(intercept_influence)), level, method, n, clusters),
    )


def rank_correlation(x: Array, y: Array, codes: NDArray[np.intp], level: float) -> Estimate:
    """Spearman's correlation inside clusters, ranks scaled to the cluster; interval by Bonett and Wright (2000)."""
    clusters = int(codes.max()) + 1
    ranks = []
    for values in (x, y):
        scaled = np.empty_like(values)
        for k in range(clusters):
            inside = codes == k
            ordered = stats.rankdata(values[inside])
            scaled[inside] = (ordered - ordered.mean()) / len(ordered)
        ranks.append(scaled)
    length = float(np.linalg.norm(ranks[0]) * np.linalg.norm(ranks[1]))
    n = len(x)
    method = "Spearman inside prompts, Fisher z with the Bonett-Wright error"
    if length == 0.0 or n - clusters < 3:
        return _estimate(math.nan, math.nan, level, method + "; not determined", n, clusters)
    value = float(np.clip(ranks[0] @ ranks[1] / length, -1.0, 1.0))
    if abs(value) > 1 - 1e-12:
        return _estimate(value, math.nan, level, method + "; no interval at 1", n, clusters)
    half = float(stats.norm.ppf(0.5 + level / 2)) * math.sqrt((1 + value**2 / 2) / (n - clusters - 2))
    z = math.atanh(value)
    return Estimate(
        value=value,
        low=math.tanh(z - half),
        high=math.tanh(z + half),
        level=level,
        method=method,
        n=n,
        clusters=clusters,
        seed=None,
    )
