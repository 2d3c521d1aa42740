"""How the squared score grows inside a response, beside how it grows between responses.

    within    ||s_i^(1..l)||^2 = c_i l^gamma        along one response, a constant each
    between   ||s_i||^2        = c   L_i^beta       over whole responses

Both by least squares of logs, so that they compare. gamma = 1 where token gradients are uncorrelated and equally large
along the response, 2 where they all point one way. Shape letters: N responses, k prefixes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradvar.errors import GradvarError
from gradvar.estimators.additive import Sums, of_these_prompts
from gradvar.estimators.intervals import check_level
from gradvar.runs.records import Estimate

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class PrefixGrowth:
    """Exponents of growth, log-log least squares, delete-one-response jackknife."""

    within: Estimate
    """gamma, along responses."""
    between: Estimate
    """beta, over whole responses; NaN where all have one length."""
    difference: Estimate
    """within minus between, paired."""


def prefix_growth(prefix_squares: Any, prefix_lengths: Any, *, level: float = 0.95) -> PrefixGrowth:
    """Fit the growth inside responses and between them.

    Args:
        prefix_squares: (N, k) squared norms of the scores of prefixes, the last of the whole response. Zeros and NaN
            are left out.
        prefix_lengths: (N, k) their lengths in tokens, rising.
        level: Nominal coverage.

    Returns:
        The exponents; NaN where no response has two lengths (within) or all are equally long (between), without
        interval where one response carries everything.

    Raises:
        GradvarError: Shapes that differ or hold fewer than two prefixes, lengths below 1 or falling, negative squares.
    """
    check_level(level)
    squares = np.asarray(prefix_squares, dtype=np.float64)
    lengths = np.asarray(prefix_lengths, dtype=np.float64)
    if squares.shape != lengths.shape or squares.ndim != 2 or squares.shape[1] < 2 or squares.shape[0] < 1:
        raise GradvarError(
            f"prefix norms {squares.shape} and lengths {lengths.shape} must both be (responses, prefixes), "
            "at least two prefixes"
        )
    if not (np.isfinite(lengths).all() and (lengths >= 1).all() and (np.diff(lengths, axis=1) >= 0).all()):
        raise GradvarError("prefix lengths must be numbers of tokens, at least 1, rising along each response")
    if (squares < 0).any() or np.isinf(squares).any():
        raise GradvarError("prefix norms must be squared norms: finite, none negative")
    held = squares > 0
    x, y = np.log(lengths), np.log(np.where(held, squares, 1.0))
    counts = np.maximum(held.sum(axis=1, keepdims=True), 1)
    dx = np.where(held, x - (x * held).sum(axis=1, keepdims=True) / counts, 0.0)
    dy = np.where(held, y - (y * held).sum(axis=1, keepdims=True) / counts, 0.0)
    inside = np.stack([(dx * dy).sum(axis=1), (dx**2).sum(axis=1)], axis=1)
    whole = held[:, -1]
    n = max(int(whole.sum()), 1)
    ex = np.where(whole, x[:, -1] - x[whole, -1].sum() / n, 0.0)
    ey = np.where(whole, y[:, -1] - y[whole, -1].sum() / n, 0.0)
    outside = np.stack([ex * ey, ex**2], axis=1)
    total = np.concatenate([inside.sum(axis=0), outside.sum(axis=0)])
    # Rounding of equal lengths is no spread; without a response the centred sums lose n/(n - 1) of its product.
    total[[1, 3]] = np.where(total[[1, 3]] > 1e-20 * (x**2).sum(), total[[1, 3]], 0.0)
    gone = np.concatenate([inside, outside * (n / max(n - 1, 1))], axis=1)
    left = total - gone
    left[:, [1, 3]] = np.where(left[:, [1, 3]] > 1e-12 * total[[1, 3]], left[:, [1, 3]], 0.0)
    sums = Sums(value=total, without=left)

    def slope(parts: Array, k: int) -> Array:
        return np.asarray(parts[..., k] / np.where(parts[..., k + 1] > 0, parts[..., k + 1], np.nan))

    method = "log-log least squares, delete-one-response jackknife, t"
    return PrefixGrowth(
        within=of_these_prompts([sums], lambda p: slope(p, 0), level=level, method=f"along responses, {method}"),
        between=of_these_prompts([sums], lambda p: slope(p, 2), level=level, method=f"over responses, {method}"),
        difference=of_these_prompts(
            [sums], lambda p: slope(p, 0) - slope(p, 2), level=level, method=f"along minus over responses, {method}"
        ),
    )
