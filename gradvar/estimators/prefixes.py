"""How the squared score grows inside a response, beside how it grows between responses.

    within    ||s_i^(1..l)||^2 = c_i l^gamma        along one response, a constant each
    between   ||s_i||^2        = c   L_i^beta       over whole responses

Both by least squares of logs, so that they compare. gamma = 1 where token gradients are uncorrelated and equally large
along the response, 2 where they all point one way. Shape letters: N responses, k prefixes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from gradvar.errors import GradvarError
from gradvar.estimators.additive import Sums, of_prompts_like_these, of_these_prompts
from gradvar.estimators.inputs import SUM_TARGET
from gradvar.estimators.intervals import PROMPTS_LIKE_THESE, THESE_PROMPTS, check_level
from gradvar.runs.records import Estimate, TableRow, estimate_table

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
    return growth_of([prefix_sums(prefix_squares, prefix_lengths)], level=level)


def prefix_sums(prefix_squares: Any, prefix_lengths: Any) -> Sums:
    """Sums of products and squares of the centred logs, along responses and over them; arguments as `prefix_growth`."""
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
    return Sums(value=total, without=left)


def growth_of(prompts: Sequence[Sums], *, level: float) -> PrefixGrowth:
    """Growth over one prompt or several, between responses with a constant a prompt."""
    method = "log-log least squares, delete-one-response jackknife, t"
    one, two, both = (
        of_these_prompts(prompts, statistic, level=level, method=f"{where}, {method}")
        for where, statistic in _STATISTICS.values()
    )
    return PrefixGrowth(within=one, between=two, difference=both)


def prefix_table(
    prefixes: Mapping[tuple[str, str], tuple[Any, Any]],
    targets: Sequence[str],
    *,
    level: float = 0.95,
    seed: int,
) -> pd.DataFrame:
    """Growth inside responses and between them, for every prompt and target, their sum, and over prompts.

    Quantities: "prefix_within", "prefix_between" and "prefix_difference" (within minus between, paired); pooled rows
    for these prompts and for prompts like these (`estimand`).

    Args:
        prefixes: (prompt_id, target) to (squared norms, lengths), each (N, k), NaN norms where left out.
        targets: Targets in their order. Norms of disjoint parameters add: where a prompt has all of several targets at
            the same lengths, it has the "sum" too.
        level: Nominal coverage.
        seed: For the record; nothing is random here.

    Raises:
        GradvarError: As `prefix_growth`.
    """
    check_level(level)
    held: dict[str, dict[str, Sums]] = {}
    names = list(dict.fromkeys(name for name, _ in prefixes))
    for name in names:
        parts = [prefixes[name, target] for target in targets if (name, target) in prefixes]
        for target in targets:
            if (name, target) in prefixes:
                held.setdefault(target, {})[name] = prefix_sums(*prefixes[name, target])
        if len(parts) == len(targets) > 1 and all(np.array_equal(one[1], parts[0][1]) for one in parts):
            held.setdefault(SUM_TARGET, {})[name] = prefix_sums(np.sum([one[0] for one in parts], axis=0), parts[0][1])
    rows: list[TableRow] = []
    for target in [*[t for t in targets if t in held], *([SUM_TARGET] if SUM_TARGET in held else [])]:
        own = held[target]
        pools: list[tuple[str | None, list[Sums]]] = [(name, [one]) for name, one in own.items()]
        if len(own) > 1:
            pools.append((None, list(own.values())))
        for name_or_none, pool in pools:
            found = growth_of(pool, level=level)
            estimates = [(found.within, found.between, found.difference, THESE_PROMPTS)]
            if name_or_none is None:
                across = [
                    of_prompts_like_these(pool, statistic, level=level, method=f"{where}, log-log least squares")
                    for where, statistic in _STATISTICS.values()
                ]
                estimates.append((across[0], across[1], across[2], PROMPTS_LIKE_THESE))
            for *three, estimand in estimates:
                rows += [
                    TableRow(
                        quantity=quantity,
                        estimate=replace(estimate, seed=seed),
                        target=target,
                        prompt_id=name_or_none,
                        advantage="score",
                        extra={"estimand": estimand},
                    )
                    for quantity, estimate in zip(_STATISTICS, three, strict=True)
                ]
    return estimate_table(rows)


def _slope(parts: Array, k: int) -> Array:
    return np.asarray(parts[..., k] / np.where(parts[..., k + 1] > 0, parts[..., k + 1], np.nan))


_STATISTICS: dict[str, tuple[str, Callable[[Array], Array]]] = {
    "prefix_within": ("along responses", lambda p: _slope(p, 0)),
    "prefix_between": ("over responses", lambda p: _slope(p, 2)),
    "prefix_difference": ("along minus over responses", lambda p: _slope(p, 0) - _slope(p, 2)),
}
