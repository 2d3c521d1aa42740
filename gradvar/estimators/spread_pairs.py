"""What pairs of responses add to the error of an exponent, which a delete-one jackknife counts twice.

Sums of deviations or of within-length variances are quadratic forms of the gradients, sum_j q_j D_j = sum_ij C_ij
<g_i, g_j>. The noise e = g - E[g | L] of two different responses adds to their variance

    sum_(i < j) (2 C_ij <e_i, e_j>)^2

and a jackknife counts it twice (Efron and Stein 1981): of the difference of the two exponents it is nearly all there
is, and intervals without the surplus taken out covered 99.6%. <e_i, e_j> is that of differences between neighbours in
length (Rice 1984), in which E[g | L] is nearly the same, taken outwards so that no response is in both: with i before j
by length, <g_i - g_(i-1), g_j - g_(j+1)> / 2.
Shape letters: N responses of one prompt, n of them fitted, k neighbours in length.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Form = Callable[[Array], Array]
"""q (n,) to C (n, n)."""


def deviation_form(everyone: int) -> Form:
    """C of sum_j q_j ||g_j - m||^2, m the mean over `everyone`, N responses, of which the rest are left out of C."""
    n = everyone
    return lambda q: np.asarray(np.diag(q) - (q[:, None] + q[None, :]) / n + q.sum() / n**2)


def within_form(near: NDArray[np.intp]) -> Form:
    """C of sum_j q_j V_j, V the within-length variance with the neighbours `near` (n, k)."""
    n, k = near.shape
    apart = np.eye(n)
    apart[np.arange(n)[:, None], near] -= 1.0 / max(k, 1)
    return lambda q: np.asarray(k / (k + 1.0) * (apart.T @ (q[:, None] * apart)))


PAIRS_FROM = 64
"""Responses of a prompt from which on what pairs count twice is taken out: with 16 exponents would be covered 89 to
97%, with 32 their difference 91%."""


def noise_squares(gram: Array, lengths: Array, *, rng: np.random.Generator) -> Array:
    """Squares (n, n) of the products <e_i, e_j> of different responses' noise, without bias; 0 where none is known.

    The shortest and the longest response have no neighbour further out. Of a subset of the responses, its own: with
    neighbours of another reward, whose A is another, pairs were put at half as much again. `rng` orders responses of
    one length.
    """
    order = np.lexsort((rng.random(len(lengths)), lengths))
    rows = np.diff(gram[order], axis=0, prepend=gram[order][:1])[:, order]
    products = 0.5 * np.diff(rows, axis=1, append=rows[:, -1:])
    upper = np.triu(products**2, 1)
    squares = np.zeros_like(gram)
    squares[np.ix_(order, order)] = upper + upper.T
    return squares


def pair_variance(form: Array, squares: Array) -> float:
    """Variance that pairs of responses add, of a form C (n, n) and `noise_squares`."""
    return 2.0 * float((form**2 * squares).sum())
