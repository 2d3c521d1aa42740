"""Gamma quasi-likelihood for a mean law with one constant per cluster, and its leverage-corrected sandwich.

Pure mathematics, no knowledge of gradients. The model: y_i with mean mu_i and spread proportional to it,

    mu_i = a_i v_i + b_i,    log v_i = eta_(cluster of i) + f_i(s),    Var y_i proportional to mu_i^2,

a and b known, eta and s solved from sum_i (y_i - mu_i) / mu_i^2 dmu_i = 0, which needs the mean to be right and
nothing else. statsmodels' GLM takes cov_type="HC3" and silently gives HC0 (seen in 0.14 and 0.15), hence a sandwich
of our own. The constants are profiled out, so a fit costs O(n) a step however many clusters there are. Leverages and
pulls are those of the observed information, which make the sandwich a delete-one jackknife by one Newton step: where a
tenth of the responses is right A^2 is 81 times the others', they alone carry the fit, and with the expected information
exponents were covered 73 to 89% (p = 0.1, 0.2 and 0.9, N = 64), with the observed one 91 to 99%.
Shape letters: n observations, K clusters, m shape parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Dependence = Callable[[Array], Array]
"""q (n, p) to sum_j q_j (y_j - y_j without observation i) (n, p), over j other than i."""
Shape = Callable[[Array], tuple[Array, Array]]
"""s (m,) to (f (n,), df/ds (n, m)); NaN in f where s is not allowed."""

MAXIMUM_STEPS = 100
TOLERANCE = 1e-8
"""Largest last step of a converged fit, in units of log v."""


@dataclass(frozen=True, kw_only=True, eq=False)
class QuasiFit:
    """A fitted mean law. The influences' sums of squares are the HC3 variances."""

    shape: Array
    """(m,) s."""
    constants: Array
    """(K,) eta."""
    shape_influence: Array
    """(n, m): what observation i adds to the error of s."""
    constants_influence: Array
    """(n, K): the same for eta."""
    shape_gain: Array
    """(n, m): by how much s changes with observation i."""
    shape_own: Array
    """(n, m): what the influence makes of that, over 1 - leverage."""
    shared: bool
    """Whether the influence on the first of s holds what the others owe to an observation (`dependence`)."""
    cluster_scores: Array
    """(K, m): each cluster's part of the profiled score of s."""
    cluster_information: Array
    """(K, m, m): each cluster's part of the profiled information on s."""
    deviance: float
    """Gamma quasi-deviance 2 sum((y - mu)/mu - log(y/mu)), the log left out where y = 0."""
    degrees: int
    """n - K - m."""
    converged: bool
    """False where no root was reached, or s is not determined."""


def fit_quasi(
    y: Array,
    codes: NDArray[np.intp],
    a: Array,
    b: Array,
    shape: Shape,
    start: Array,
    dependence: Dependence | None = None,
) -> QuasiFit:
    """Solve the quasi-score by Newton steps with halving.

    The curvature is the observed one, kept positive: Fisher scoring oscillates where one observation dominates.

    Args:
        y: (n,) observations, at least 0, with a positive sum in every cluster.
        codes: (n,) cluster of each observation, 0 to K - 1, none empty.
        a: (n,) known factor, positive.
        b: (n,) known addend, at least 0.
        shape: The law inside a cluster.
        start: (m,) first s.
        dependence: How observations change when another one is taken away, where they share something.

    Returns:
        The fit; `converged` says whether it is one.
    """
    count = int(codes.max()) + 1
    shape_now = np.array(start, dtype=np.float64)

    def per_cluster(values: Array) -> Array:
        return np.asarray(np.bincount(codes, weights=values, minlength=count), dtype=np.float64)

    with np.errstate(all="ignore"):
        law, slope = shape(shape_now)
        eta = np.log(per_cluster(y) / per_cluster(a * np.exp(law)))
        rise = a * np.exp(eta[codes] + law)
        mu = rise + b
        loss = float((np.log(mu) + y / mu).sum()) / len(y)
        converged = False
        for _ in range(MAXIMUM_STEPS):
            eta_step, shape_step = _newton_step(y, codes, mu, rise, slope, per_cluster)
            length = 1.0
            while length > 1e-10:
                trial_shape, trial_eta = shape_now + length * shape_step, eta + length * eta_step
                trial_law, trial_slope = shape(trial_shape)
                trial_rise = a * np.exp(trial_eta[codes] + trial_law)
                trial_mu = trial_rise + b
                trial_loss = float((np.log(trial_mu) + y / trial_mu).sum()) / len(y)
                if trial_loss <= loss + 1e-13 * (1.0 + abs(loss)):
                    break
                length /= 2
            else:
                break
            shape_now, eta, loss = trial_shape, trial_eta, trial_loss
            rise, mu, slope = trial_rise, trial_mu, trial_slope
            largest = max(np.abs(length * shape_step).max(initial=0.0), np.abs(length * eta_step).max())
            if largest < TOLERANCE:
                converged = True
                break
        return _finish(y, codes, mu, rise, slope, shape_now, eta, converged, per_cluster, dependence)


def _centres(weight: Array, slope: Array, per_cluster: Callable[[Array], Array]) -> Array:
    """Weighted mean (K, m) of the slope inside each cluster."""
    total = per_cluster(weight)
    found = np.empty((len(total), slope.shape[1]))
    for j, column in enumerate(slope.T):
        found[:, j] = per_cluster(weight * column) / total
    return found


def _curvature(y: Array, mu: Array, w: Array) -> Array:
    """Observed curvature (n,) of the quasi-likelihood in log v, kept positive; w = dlog mu / dlog v."""
    return np.maximum(w * ((2.0 * w - 1.0) * y / mu + 1.0 - w), 0.05 * w**2)


def _newton_step(
    y: Array, codes: NDArray[np.intp], mu: Array, rise: Array, slope: Array, per_cluster: Callable[[Array], Array]
) -> tuple[Array, Array]:
    """Steps in eta and s; rise is dmu/deta."""
    w = rise / mu
    r = (y - mu) / mu
    curvature = _curvature(y, mu, w)
    middle = _centres(curvature, slope, per_cluster)
    inner = slope - middle[codes]
    shape_step = _solve(inner.T @ (curvature[:, None] * inner), inner.T @ (w * r))
    eta_step: Array = per_cluster(w * r) / per_cluster(curvature) - middle @ shape_step
    return eta_step, shape_step


def _solve(information: Array, score: Array) -> Array:
    """Newton step for m parameters; no step in a direction that the data do not determine."""
    if len(score) == 1:
        return score / information[0] if information[0, 0] > 0 else np.zeros(1)
    if len(score) == 0:
        return np.zeros(0)
    if not (np.isfinite(information).all() and np.isfinite(score).all()):  # LAPACK would print to the terminal
        return np.full(len(score), np.nan)  # ends the fit, which did not converge
    return np.asarray(np.linalg.lstsq(information, score, rcond=1e-12)[0], dtype=np.float64)


def _finish(
    y: Array,
    codes: NDArray[np.intp],
    mu: Array,
    rise: Array,
    slope: Array,
    shape_now: Array,
    eta: Array,
    converged: bool,
    per_cluster: Callable[[Array], Array],
    dependence: Dependence | None,
) -> QuasiFit:
    n, m = slope.shape
    count = len(eta)
    w, r = rise / mu, (y - mu) / mu
    middle = _centres(w**2, slope, per_cluster)
    z = w[:, None] * (slope - middle[codes])
    total = z.T @ z
    # The residual sum of squares of z against the clusters' constants says whether the data determine s at all.
    size = (w[:, None] * slope).T @ (w[:, None] * slope)
    determined = m == 0 or (
        bool(np.isfinite(total).all())
        and bool((np.diagonal(total) > 1e-12 * np.diagonal(size)).all())
        and (m == 1 or np.linalg.cond(total / np.sqrt(np.outer(np.diagonal(total), np.diagonal(total)))) < 1e12)
    )
    converged = converged and determined and bool(np.isfinite(eta).all())
    if converged:
        c = _curvature(y, mu, w)
        each = per_cluster(c)
        centre = _centres(c, slope, per_cluster)
        inner = slope - centre[codes]
        pulled = np.linalg.solve(inner.T @ (c[:, None] * inner), inner.T).T if m else inner
        leverage = c * (1.0 / each[codes] + (inner * pulled).sum(axis=1))
        left = np.maximum(1.0 - leverage, 1e-12)
        pulled = w[:, None] * pulled
        own = np.zeros((n, count))
        own[np.arange(n), codes] = w / each[codes]
        gain = np.hstack([pulled, own - pulled @ centre.T])
        influence = gain * (r / left)[:, None]
        shared = False
        if dependence is not None:
            # The jackknife's other half: what the others' observations owe to this one. It may only widen: with heavy
            # tails it shrank the spread of deviations' exponents by chance and coverage fell from .94 to .92.
            whole = influence + dependence(gain / mu[:, None])
            wider = np.linalg.norm(whole, axis=0) >= np.linalg.norm(influence, axis=0)
            influence = np.where(wider, whole, influence)
            shared = bool(wider[0])
        shape_influence, constants_influence = influence[:, :m], influence[:, m:]
        shape_gain = gain[:, :m] / mu[:, None]
        shape_own = shape_gain / left[:, None]
    else:
        shape_influence, shape_gain, shape_own = (np.full((n, m), np.nan) for _ in range(3))
        shared = False
        constants_influence = np.full((n, count), np.nan)
    positive = y > 0
    deviance = 2.0 * float(r.sum() - np.log(y[positive] / mu[positive]).sum())
    scores, pieces = np.zeros((count, m)), np.zeros((count, m, m))
    for j, column in enumerate(z.T):
        scores[:, j] = per_cluster(column * r)
        pieces[:, j] = np.stack([per_cluster(column * other) for other in z.T], axis=1)
    return QuasiFit(
        shape=shape_now,
        constants=eta,
        shape_influence=shape_influence,
        constants_influence=constants_influence,
        shape_gain=shape_gain,
        shape_own=shape_own,
        shared=shared,
        cluster_scores=scores,
        cluster_information=pieces,
        deviance=deviance,
        degrees=n - count - m,
        converged=converged,
    )
