"""How far each response's gradient lies from the others: deviation from the mean, and variance given the length.

Shape letters: N responses of one prompt, k neighbours in length.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradvar.errors import GradvarError

Array = NDArray[np.float64]

NEIGHBOURS = 5
"""Default k of the within-length variance."""
ALIKE = 16
"""Responses whose values tell the spread at one length: coverage is the same with 12 and 24."""
ALIKE_CARRYING = 4
"""Of them that carry the noise, on average, where few do."""


def weighted_gram(gram: Any, advantages: Any | None = None) -> Array:
    """Gram G = (A A') * S (N, N) of the sample gradients g_i = A_i s_i; S itself where A is None.

    Raises:
        GradvarError: The Gram is not a square matrix of finite numbers, or the advantages do not fit it.
    """
    matrix = np.asarray(gram, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.shape[0] == 0:
        raise GradvarError(f"gram must be a square matrix of inner products, received shape {matrix.shape}")
    if not np.isfinite(matrix).all():
        raise GradvarError("gram holds NaN or infinity: measure these responses again")
    if advantages is None:
        return matrix
    factors = np.asarray(advantages, dtype=np.float64)
    if factors.shape != (matrix.shape[0],):
        raise GradvarError(f"{matrix.shape[0]} responses in the gram, but advantages of shape {factors.shape}")
    if not np.isfinite(factors).all():
        raise GradvarError("advantages must be finite: leave unverified responses out (PromptScores.verified)")
    return matrix * np.outer(factors, factors)


def deviations(gram: Any, advantages: Any | None = None) -> Array:
    """Deviations D_i = ||g_i - m||^2 (N,), m = mean_j g_j, from the Gram alone (paper, figures 4, 10, 11).

    D_i = G_ii - (2/N) sum_j G_ij + (1/N^2) sum_jk G_jk with G = (A A') * S. m includes g_i, so
    E D_i = (1 - 2/N) v_i + vbar/N: `fit_variance_law` carries that in its mean. A negative rounding error of a
    squared norm that is zero (repeated responses) is returned as 0.

    Args:
        gram: (N, N) inner products of score gradients.
        advantages: (N,) factors A_i; None studies the score itself.

    Returns:
        (N,) squared distances. One response gives 0.

    Raises:
        GradvarError: The Gram is not square and finite, or the advantages do not fit it.
    """
    matrix = weighted_gram(gram, advantages)
    means = matrix.mean(axis=1)
    values: Array = np.diagonal(matrix) - 2.0 * means + means.mean()
    return np.maximum(values, 0.0)


def nearest_in_length(lengths: Any, k: int, *, rng: np.random.Generator) -> NDArray[np.intp]:
    """Indices (N, k) of each response's k nearest others in length, ties in random order.

    Raises:
        GradvarError: k below 1.
    """
    values = np.asarray(lengths, dtype=np.float64)
    if k < min(1, len(values) - 1):
        raise GradvarError(f"neighbours must be at least 1, received {k}")
    distance = np.abs(values[:, None] - values[None, :])
    np.fill_diagonal(distance, np.inf)
    ties = rng.random(distance.shape)
    if len(values) <= k or not (values == np.round(values)).all():
        return np.lexsort((ties, distance), axis=-1)[:, :k]
    # Whole numbers of tokens: one key holds distance and tie, and only the k nearest are put in order.
    keys = distance + ties
    nearest = np.argpartition(keys, k - 1, axis=-1)[:, :k]
    order = np.argsort(np.take_along_axis(keys, nearest, axis=-1), axis=-1)
    return np.asarray(np.take_along_axis(nearest, order, axis=-1))


def within_length_variance(
    gram: Any,
    lengths: Any,
    *,
    advantages: Any | None = None,
    neighbours: int = NEIGHBOURS,
    rng: np.random.Generator,
) -> Array:
    """Within-length variance V_i = k/(k+1) ||g_i - mean of its k nearest in length||^2 (N,).

    Estimates v(L) = E||g - E[g | L]||^2, the variance given the length, where the deviation estimates
    v(L) + ||E[g | L] - E g||^2. The factor k/(k+1) takes out the noise of the neighbours' mean.

    Args:
        gram: (N, N) inner products of score gradients.
        lengths: (N,) lengths in tokens.
        advantages: (N,) factors A_i; None studies the score itself.
        neighbours: k; at most N - 1 are used.
        rng: Breaks ties between equally near responses.

    Returns:
        (N,) estimates of v(L_i).

    Raises:
        GradvarError: Fewer than two responses, k below 1, or shapes that do not fit.
    """
    matrix = weighted_gram(gram, advantages)
    n = matrix.shape[0]
    if np.shape(lengths) != (n,):
        raise GradvarError(f"{n} responses in the gram, but lengths of shape {np.shape(lengths)}")
    if n < 2:
        raise GradvarError("the within-length variance compares a response with its neighbours: expected at least 2")
    return variance_among(matrix, nearest_in_length(lengths, min(neighbours, n - 1), rng=rng))


def deviation_dependence(
    gram: Any, advantages: Any | None = None, *, subset: NDArray[np.bool_] | None = None
) -> Callable[[Array], Array]:
    """How deviations share the mean gradient, for `fit_variance_law`.

    Taking response i away moves the mean by (g_i - m)/(N - 1), so D_j falls by -2 <g_j - m, g_i - m>/(N - 1), up to
    terms of order 1/N^2.

    Args:
        gram: (N, N) inner products of score gradients.
        advantages: (N,) factors A_i.
        subset: (N,) True for the responses that are fitted; the mean is over all N.

    Returns:
        q (n, p) to sum over j != i of q_j (D_j - D_j without i), (n, p).
    """
    matrix = weighted_gram(gram, advantages)
    means = matrix.mean(axis=1)
    centred = matrix - means[:, None] - means[None, :] + means.mean()
    np.fill_diagonal(centred, 0.0)
    n = matrix.shape[0]
    if subset is not None:
        centred = centred[np.ix_(subset, subset)]
    return lambda q: (-2.0 / (n - 1)) * (centred @ q)


def within_dependence(
    gram: Any,
    lengths: Any,
    *,
    advantages: Any | None = None,
    neighbours: int = NEIGHBOURS,
    rng: np.random.Generator,
) -> Callable[[Array], Array]:
    """How within-length variances share neighbours, for `fit_variance_law`.

    Where response i is one of j's neighbours and is taken away, j has one neighbour less; letting the next nearest
    step in would count the neighbours' noise twice (standard errors 1.2 to 1.3 times too wide, measured). Give the
    arguments, and a generator in the state, that `within_length_variance` was given: ties are then broken the same way.

    Returns:
        q (N, p) to sum over j != i of q_j (V_j - V_j without i), (N, p).
    """
    matrix = weighted_gram(gram, advantages)
    near = nearest_in_length(lengths, min(neighbours, len(matrix) - 1), rng=rng)
    return dependence_among(matrix, near)


def local_moments(
    lengths: Any, values: Array, centre: Array, *, carrying: NDArray[np.bool_] | None = None, rng: np.random.Generator
) -> tuple[Array, Array]:
    """Standard deviations and skewness (N,) of values, from those of responses alike in length.

    At most `ALIKE` responses, and half of all, itself among them, or where few carry the noise as many as hold 4 such
    on average (one in ten right: ratios were covered 85 to 91% without). Each is divided by a
    fitted law so that its slope does not count as spread. Their own level stands in for the law's: where E[g | L] moves
    with L, v(L) rises again at the short end and a power law lies at half of it, with half the relative spread.
    Skewness is a Gamma's, 2 sd / mean.

    Args:
        lengths: (N,) tokens.
        values: (N,) at least 0.
        centre: (N,) the law.
        carrying: (N,) which responses carry the noise where they are few (`carrying.few_that_carry`).
        rng: Breaks ties in length.
    """
    n = len(values)
    alike = max(2, min(ALIKE, n // 2))
    if carrying is not None and carrying.any():
        alike = min(max(alike, math.ceil(ALIKE_CARRYING / float(carrying.mean()))), n)
    near = nearest_in_length(lengths, alike - 1, rng=rng)
    relative = values / np.where(centre > 0.0, centre, 1.0)
    beside = np.column_stack([relative, relative[near]])
    mean, deviation = centre * beside.mean(axis=1), centre * beside.std(axis=1, ddof=1)
    return deviation, 2.0 * deviation / np.where(mean > 0.0, mean, 1.0)


def variance_among(matrix: Array, near: NDArray[np.intp]) -> Array:
    """`within_length_variance` (N,) of a weighted Gram (N, N), given each response's neighbours (N, k)."""
    k = near.shape[1]
    to_near = np.take_along_axis(matrix, near, axis=1).mean(axis=1)
    among = matrix[near[:, :, None], near[:, None, :]].mean(axis=(1, 2))
    values: Array = (k / (k + 1)) * (np.diagonal(matrix) - 2.0 * to_near + among)
    return np.maximum(values, 0.0)


def dependence_among(matrix: Array, near: NDArray[np.intp]) -> Callable[[Array], Array]:
    """`within_dependence` likewise."""
    n, k = near.shape
    change = np.zeros((n, n))
    rows = np.arange(n)
    full = variance_among(matrix, near)
    for left in range(k):
        others = np.delete(near, left, axis=1)
        reduced = variance_among(matrix, others) if k > 1 else full
        change[near[:, left], rows] = full - reduced
    return lambda q: change @ q
