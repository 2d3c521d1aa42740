"""How well one number of a response predicts another: rank correlation and explained variance, jackknifed.

The interval is a delete-one jackknife of Fisher's z. Advantages come from a baseline of the same responses, so a
replicate leaves its response out of the baseline too: with A^2 held fixed the intervals of proxies that hold it covered
47 to 90%. A^2 bends in the baseline, most where half of the rewards are 1, hence the bias in the error; where it flips
the order of A^2 the jackknife's bias is noise many times the error, so no more than the error itself is taken. R^2 of
values that grow like L^2 rests on the few longest responses, and comes out too high as long as rarer ones are missing:
82 to 88% coverage at N = 512, hence the wider error there (`additive.RARE`).
Shape letters: N responses of one prompt, K prompts, R different replicates.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from gradvar.estimators.additive import Sums, of_these_prompts
from gradvar.estimators.intervals import MINIMUM_PROMPTS
from gradvar.estimators.least_squares import ranks_of
from gradvar.runs.records import Estimate, no_estimate

Array = NDArray[np.float64]

CONSTANT = "constant"
"""Verdict where proxy or truth takes one value: nothing can be explained."""
MINIMUM_RESPONSES = 8
ROUNDING = 1e-20
"""Centred squares below this share of the squares are rounding: the values are one."""
TIE = 40
"""Binary digits that two values share to have one rank: with as many right as wrong A^2 is one value up to rounding."""
LEAST_LEFT = 1e-6
"""Sums of which less than this is left without one response are taken anew: a difference would be rounding."""

_METHOD = "delete-one jackknife of Fisher's z with the baseline, bias in squares, t"


@dataclass(frozen=True, kw_only=True, eq=False)
class Pair:
    """Proxy and truth of one prompt's responses, and what both become when one response is left out."""

    x: Array
    """(N,) proxy."""
    y: Array
    """(N,) truth."""
    codes: NDArray[np.intp]
    """(N,) row of `moved_x` and `moved_y` for the response left out."""
    moved_x: Array
    """(R, N)."""
    moved_y: Array
    """(R, N)."""

    @classmethod
    def of(cls, x: Array, y: Array) -> Pair:
        """Two numbers that no baseline ties together."""
        return cls(x=x, y=y, codes=np.zeros(len(x), dtype=np.intp), moved_x=x[None], moved_y=y[None])

    def among(self, held: NDArray[np.bool_]) -> Pair:
        """Some of the responses."""
        return Pair(
            x=self.x[held],
            y=self.y[held],
            codes=self.codes[held],
            moved_x=self.moved_x[:, held],
            moved_y=self.moved_y[:, held],
        )

    @functools.cached_property
    def known(self) -> Pair:
        """Without responses that lack proxy or truth."""
        return self.among(np.isfinite(self.x) & np.isfinite(self.y))

    @functools.cached_property
    def sums(self) -> Sums:
        """Centred sums of the values, once for the prompt's own rows and the pooled ones."""
        return _sums(self, _values)

    @functools.cached_property
    def rank_sums(self) -> Sums:
        """Centred sums of the ranks likewise."""
        return _sums(self, _ranks)

    @functools.cached_property
    def logs(self) -> Pair:
        """Logs of both, where both are positive in every replicate."""
        positive = (self.x > 0) & (self.y > 0) & (self.moved_x > 0).all(axis=0) & (self.moved_y > 0).all(axis=0)
        kept = self.among(positive)
        return Pair(
            x=np.log(kept.x),
            y=np.log(kept.y),
            codes=kept.codes,
            moved_x=np.log(kept.moved_x),
            moved_y=np.log(kept.moved_y),
        )


def predictions(
    pairs: Sequence[Pair], *, level: float, between: bool = False
) -> list[tuple[str, Estimate, str | None]]:
    """Rank correlation, explained variance and that of the logs of (proxy, truth) inside prompts, a constant each.

    Args:
        pairs: Proxy and truth of every prompt; responses with NaN are left out.
        level: Nominal coverage.
        between: Whether the one pair holds prompts' means: then from 4 on.

    Returns:
        [(quantity, estimate, verdict or None)].
    """
    kept = [p.known for p in pairs]
    logs = [p.logs for p in kept]
    return [
        ("rank_correlation", *_judge(kept, _rank, level=level, between=between)),
        ("explained_variance", *_judge(kept, _explained, level=level, between=between)),
        ("explained_variance_log", *_judge(logs, _explained, level=level, between=between)),
    ]


def _judge(
    pairs: list[Pair], measure: Callable[[list[Pair], float], Estimate], *, level: float, between: bool
) -> tuple[Estimate, str | None]:
    """One measure with its verdict, None where there is a number."""
    kept = [p for p in pairs if len(p.x) > 1]
    n = sum(len(p.x) for p in kept)
    least = MINIMUM_PROMPTS if between else MINIMUM_RESPONSES
    if n == 0 or (between and n < least):
        note = f"not given below {least} prompts" if between else "no two responses with proxy and truth"
        return no_estimate(note, n=n, level=level), "undetermined"
    total = np.sum([_centred(p.x, p.y, np.ones(len(p.x), dtype=bool)) for p in kept], axis=0)
    size = np.array([sum(float(v @ v) for v in side) for side in ([p.x for p in kept], [p.y for p in kept])])
    if (total[[1, 2]] <= ROUNDING * size).any():
        return no_estimate("proxy or truth takes one value", n=n, level=level), CONSTANT
    estimate = measure(kept, level)
    if n < least:
        note = f"{estimate.method}; no interval below {least} responses"
        estimate = replace(estimate, low=math.nan, high=math.nan, method=note)
    return estimate, None


def _rank(pairs: list[Pair], level: float) -> Estimate:
    sums = [p.rank_sums for p in pairs]
    z = of_these_prompts(sums, _fisher, level=level, method=f"Spearman inside prompts, {_METHOD}", curved=True)
    return replace(z, value=math.tanh(z.value), low=math.tanh(z.low), high=math.tanh(z.high))


def _explained(pairs: list[Pair], level: float) -> Estimate:
    sums = [p.sums for p in pairs]
    return _squared(of_these_prompts(sums, _fisher, level=level, method=f"R^2 of a line, {_METHOD}", curved=True))


def _values(values: Array, left_out: NDArray[np.intp]) -> Array:
    """The values themselves, whichever response is left out."""
    return np.broadcast_to(values, (len(left_out), len(values)))


def _ranks(values: Array, left_out: NDArray[np.intp]) -> Array:
    """Ranks among the others, over their number: a smaller one left out moves a rank by 1, an equal one by 1/2."""
    mantissa, exponent = np.frexp(values)
    values = np.ldexp(np.round(np.ldexp(mantissa, TIE)), exponent - TIE)
    ranks = ranks_of(values)
    if len(left_out) == 0:
        return np.asarray(ranks / len(values))[None]
    out = values[left_out][:, None]
    return np.asarray((ranks - (out < values) - 0.5 * (out == values)) / (len(values) - 1))


def _sums(pair: Pair, of: Callable[[Array, NDArray[np.intp]], Array]) -> Sums:
    """Centred sums of xy, xx, yy, whole and without each response."""
    n = len(pair.x)
    nobody = np.zeros(0, dtype=np.intp)
    x, y = (pair.x, pair.y) if of is _values else (of(pair.x, nobody)[0], of(pair.y, nobody)[0])
    without = np.zeros((n, 3))
    for k in range(len(pair.moved_x)):
        rows = np.flatnonzero(pair.codes == k)
        if of is _values and n > 1:
            without[rows], thin = _less_one(pair.moved_x[k], pair.moved_y[k], rows)
            rows = rows[thin]
        if rows.size:
            others = np.ones((len(rows), n), dtype=bool)
            others[np.arange(len(rows)), rows] = False
            without[rows] = _centred(of(pair.moved_x[k], rows), of(pair.moved_y[k], rows), others)
    return Sums(value=_centred(x, y, np.ones(n, dtype=bool)), without=without)


def _less_one(x: Array, y: Array, rows: NDArray[np.intp]) -> tuple[Array, NDArray[np.bool_]]:
    """Centred sums (len(rows), 3) without each of the rows, and where too little is left of them for a difference.

    sum over the others around their own means = whole - n / (n - 1) of the response's own product.
    """
    n = len(x)
    dx, dy = x - x.mean(), y - y.mean()
    own = np.stack([dx * dy, dx**2, dy**2], axis=-1)
    whole = own.sum(axis=0)
    left = whole - n / (n - 1.0) * own[rows]
    one_value = whole[1:] <= ROUNDING * np.array([x @ x, y @ y])
    return left, (one_value | (left[:, 1:] <= LEAST_LEFT * whole[1:])).any(axis=1)


def _centred(x: Array, y: Array, held: NDArray[np.bool_]) -> Array:
    """(..., 3) sums of xy, xx, yy around the means of those held; 0 where those hold one value up to rounding."""
    count = held.sum(axis=-1, keepdims=True)
    dx = (x - (x * held).sum(axis=-1, keepdims=True) / count) * held
    dy = (y - (y * held).sum(axis=-1, keepdims=True) / count) * held
    xx, yy = (dx**2).sum(axis=-1), (dy**2).sum(axis=-1)
    flat_x, flat_y = (own <= ROUNDING * (values**2 * held).sum(axis=-1) for own, values in ((xx, x), (yy, y)))
    xy = np.where(flat_x | flat_y, 0.0, (dx * dy).sum(axis=-1))
    return np.stack([xy, np.where(flat_x, 0.0, xx), np.where(flat_y, 0.0, yy)], axis=-1)


def _fisher(parts: Array) -> Array:
    correlation = parts[..., 0] / np.sqrt(parts[..., 1] * parts[..., 2])
    # A perfect line keeps a finite z: R^2 is 1 to rounding.
    return np.asarray(np.arctanh(np.clip(correlation, -1 + 1e-15, 1 - 1e-15)))


def _squared(z: Estimate) -> Estimate:
    low, high = math.tanh(z.low), math.tanh(z.high)
    ends = sorted((low**2, high**2))
    least = 0.0 if low < 0.0 < high else ends[0]
    if math.isnan(z.low):
        least, ends = math.nan, [math.nan, math.nan]
    return replace(z, value=math.tanh(z.value) ** 2, low=least, high=ends[1])
