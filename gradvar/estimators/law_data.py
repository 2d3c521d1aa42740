"""The observations of a variance law, checked, with the finite-N correction, and the shapes that are fitted to them.

Shape letters: n responses fitted, N responses averaged, K prompts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradvar.errors import GradvarError
from gradvar.estimators.intervals import (
    check_level,
)
from gradvar.estimators.quasi import Dependence, QuasiFit, Shape, fit_quasi

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class LawData:
    """Checked observations with the finite-N correction: mu = a v + b."""

    x: Array
    y: Array
    codes: NDArray[np.intp]
    a: Array
    b: Array
    log_length: Array
    centre: float
    near: NDArray[np.intp] | None
    """(n, k) neighbours of within-length variances, -1 for none."""

    def fit(self, shape: Shape, *start: float, dependence: Dependence | None = None) -> QuasiFit:
        """Fit one shape of the law, starting at its parameters."""
        return fit_quasi(self.y, self.codes, self.a, self.b, self.seen(shape), np.array(start), dependence)

    def seen(self, shape: Shape) -> Shape:
        """The shape of what is fitted, from that of the law: beside neighbours, where there are such."""
        return shape if self.near is None else beside_neighbours(shape, self.near)


def checked_data(
    lengths: Any,
    deviations: Any,
    clusters: Any | None,
    n_centred: Any | None,
    mean_deviation: Any | None,
    margin: float,
    level: float,
    near: Any | None = None,
) -> LawData:
    """Check and correct what `fit_variance_law` is given; arguments and errors as there."""
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
    if near is not None and n_centred is not None:
        raise GradvarError("near is for within-length variances, n_centred for deviations: give one of them")
    a, b = _correction(y, codes, n_centred, mean_deviation)
    log_length = np.log(x)
    centre = float(log_length.mean())
    others = None if near is None else _neighbours(near, codes)
    return LawData(x=x, y=y, codes=codes, a=a, b=b, log_length=log_length, centre=centre, near=others)


def _neighbours(near: Any, codes: NDArray[np.intp]) -> NDArray[np.intp]:
    found = np.asarray(near)
    if found.ndim != 2 or len(found) != len(codes) or not np.issubdtype(found.dtype, np.integer):
        received = f"of {len(codes)} responses, received {found.dtype} {found.shape}"
        raise GradvarError(f"near must hold whole numbers (n, k), the rows of the neighbours {received}")
    if found.size and not (found.min() >= -1 and found.max() < len(codes)):
        raise GradvarError(f"near must hold rows of the {len(codes)} responses, or -1 for none")
    held = found >= 0
    if (found == np.arange(len(codes))[:, None]).any():
        raise GradvarError("near must hold other responses: one is named as its own neighbour")
    if (codes[np.where(held, found, 0)] != codes[:, None])[held].any():
        raise GradvarError("near must hold neighbours among the responses to the same prompt")
    return found.astype(np.intp)


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


def weights_behind(data: LawData) -> Array:
    """Share (n,) of each response in the deviations once length is accounted for: t_i / sum t, 0 where y = 0.

    t_i is the deviation over what the log-log line, a constant a prompt, expects at its length. The line hardly moves
    with one outlier, while the fitted law runs through it and leaves nothing to see in its residuals or influences.
    """
    held = data.y > 0
    codes = data.codes[held]
    sizes = np.maximum(np.bincount(codes), 1)

    def inside(values: Array) -> Array:
        return np.asarray(values - (np.bincount(codes, weights=values) / sizes)[codes])

    x, y = inside(data.log_length[held]), inside(np.log(data.y[held]))
    square = float(x @ x)
    residual = y - (float(x @ y) / square if square > 0 else 0.0) * x
    t = np.exp(residual - residual.max())
    shares = np.zeros_like(data.y)
    shares[held] = t / t.sum()
    return shares


def responses_behind(data: LawData) -> float:
    """Responses that carry the deviations once length is accounted for: (sum t)^2 / sum t^2 of `weights_behind`."""
    return 1.0 / float((weights_behind(data) ** 2).sum())


def without_response(data: LawData, left_out: int, dependence: Dependence | None) -> LawData | None:
    """The observations without one response, what the others owe to it taken back; None where too little is left.

    An outlier raises the within-length variances of its neighbours and the mean that deviations are taken from, so
    leaving its own observation out is not enough.
    """
    y = data.y.copy()
    mine = np.flatnonzero(data.codes == data.codes[left_out])
    if dependence is not None:
        # Only responses to the same prompt share anything: what each of them loses without this one.
        units = np.zeros((len(y), len(mine)))
        units[mine, np.arange(len(mine))] = 1.0
        y[mine] = np.maximum(y[mine] - dependence(units)[left_out], 0.0)
    kept = np.arange(len(y)) != left_out
    others = mine[mine != left_out]
    if len(others) < 3 or not y[others].sum() > 0 or np.ptp(data.x[others]) == 0:
        return None
    b = data.b.copy()
    # The mean deviation of the set falls with it.
    b[mine] *= float(y[others].mean()) / float(data.y[mine].mean())
    near = data.near
    if near is not None:
        near = near[kept]
        near = np.where(near == left_out, -1, near - (near > left_out))
    return replace(
        data,
        near=near,
        x=data.x[kept],
        y=y[kept],
        codes=data.codes[kept],
        a=data.a[kept],
        b=b[kept],
        log_length=data.log_length[kept],
    )


def constant_shape(log_shape: Array) -> Shape:
    """Return a shape without parameters: its log, given."""
    return lambda s: (log_shape, np.zeros((len(log_shape), 0)))


def power_shape(x: Array) -> Shape:
    """Return s x: the power law where x is the centred log length."""
    return lambda s: (s[0] * x, x[:, None])


def curved_shape(x: Array) -> Shape:
    """Return s_0 x + s_1 x^2: the power law with curvature."""
    basis = np.stack([x, x**2], axis=1)
    return lambda s: (basis @ s, basis)


def beside_neighbours(shape: Shape, near: NDArray[np.intp]) -> Shape:
    """Return the shape of E V_i = k/(k + 1) (v(L_i) + (1/k^2) sum_j v(L_j)), from that of v, over k neighbours j.

    The neighbours' mean has their noise, not that at length L_i. Near an end of the lengths all neighbours lie on one
    side, and taken for v(L_i) alone their part flattens the law: exponents came out 0.03 too low (N = 64, k = 5).
    """
    held = near >= 0
    count = np.maximum(held.sum(axis=1), 1)
    places = np.where(held, near, 0)

    def seen(s: Array) -> tuple[Array, Array]:
        law, slope = shape(s)
        share = np.where(held, np.exp(law[places] - law[:, None]), 0.0) / count[:, None]
        total = np.where(held.any(axis=1), share.sum(axis=1), 1.0)
        moved = np.einsum("ij,ijm->im", share, slope[places] - slope[:, None])
        return law + np.log((count + total) / (count + 1.0)), slope + moved / (count + total)[:, None]

    return seen


def affine_shape(x: Array) -> Shape:
    """Return log(1 + s x): the affine law where x is length / mean - 1."""

    def shape(s: Array) -> tuple[Array, Array]:
        factor = 1.0 + s[0] * x
        allowed = np.where(factor > 0, factor, np.nan)
        return np.log(allowed), (x / allowed)[:, None]

    return shape
