"""What readers expect beside the law: the ordinary line, its R^2 and the rank correlation, inside prompts.

Shape letters: n responses, K prompts (clusters), each with a constant of its own.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy import special

from gradvar.estimators.intervals import (
    symmetric,
    t_quantile,
)
from gradvar.runs.records import Estimate

Array = NDArray[np.float64]


def least_squares(
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
        none = symmetric(math.nan, math.nan, level, method + "; not determined", n, clusters)
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
        symmetric(slope, quantile * float(np.linalg.norm(slope_influence)), level, method, n, clusters),
        symmetric(r2, math.nan, level, f"least squares ({what}), no interval", n, clusters),
        symmetric(intercept, quantile * float(np.linalg.norm(intercept_influence)), level, method, n, clusters),
    )


def rank_correlation(x: Array, y: Array, codes: NDArray[np.intp], level: float) -> Estimate:
    """Spearman's correlation inside clusters, ranks scaled to the cluster; interval by Bonett and Wright (2000)."""
    clusters = int(codes.max()) + 1
    ranks = []
    for values in (x, y):
        scaled = np.empty_like(values)
        for k in range(clusters):
            inside = codes == k
            ordered = ranks_of(values[inside])
            scaled[inside] = (ordered - ordered.mean()) / len(ordered)
        ranks.append(scaled)
    length = float(np.linalg.norm(ranks[0]) * np.linalg.norm(ranks[1]))
    n = len(x)
    method = "Spearman inside prompts, Fisher z with the Bonett-Wright error"
    if length == 0.0 or n - clusters < 3:
        return symmetric(math.nan, math.nan, level, method + "; not determined", n, clusters)
    value = float(np.clip(ranks[0] @ ranks[1] / length, -1.0, 1.0))
    if abs(value) > 1 - 1e-12:
        return symmetric(value, math.nan, level, method + "; no interval at 1", n, clusters)
    half = float(special.ndtri(0.5 + level / 2)) * math.sqrt((1 + value**2 / 2) / (n - clusters - 2))
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


def ranks_of(values: Array) -> Array:
    """Ranks from 1, ties sharing their mean: scipy's rankdata without its checks, which cost ten times as much."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2.0)[place])
