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
from typing import Any, NamedTuple

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
MINIMUM_FOR_LOGS = 20
"""For R^2 of logs inside prompts, which A^2 raises: 90 to 92% covered with 16."""
ROUNDING = 1e-20
"""Centred squares below this share of the squares are rounding: the values are one."""
TIE = 40
"""Binary digits that two values share to have one rank: with as many right as wrong A^2 is one value up to rounding."""
LEAST_LEFT = 1e-6
"""Sums of which less than this is left without one response are taken anew: a difference would be rounding."""

_METHOD = "delete-one jackknife of Fisher's z with the baseline, bias in squares, t"


class Deviations(NamedTuple):
    """Numbers around the mean of those that are held."""

    around: Array
    """(..., N) 0 for those not held."""
    squares: Array
    """(...) their sum of squares; 0 where those held are one value up to rounding."""

    @classmethod
    def of(cls, values: Array, held: Any = True) -> Deviations:
        """From values (..., N) and which of them (..., N) are held."""
        kept = np.broadcast_to(held, values.shape)
        count = kept.sum(axis=-1, keepdims=True)
        around = (values - (values * kept).sum(axis=-1, keepdims=True) / count) * kept
        squares = (around**2).sum(axis=-1)
        flat = squares <= ROUNDING * (values**2 * kept).sum(axis=-1)
        return cls(around, np.where(flat, 0.0, squares))

    def sums(self, other: Deviations) -> Array:
        """(..., 3) sums of xy, xx, yy."""
        some = (self.squares > 0.0) & (other.squares > 0.0)
        xy = np.where(some, (self.around * other.around).sum(axis=-1), 0.0)
        return np.stack([xy, self.squares, other.squares], axis=-1)


@dataclass(frozen=True, kw_only=True, eq=False)
class Numbers:
    """One number of every response of a prompt, and what it becomes when one response is left out.

    What does not depend on the number beside it is found once for all pairs.
    """

    values: Array
    """(N,)."""
    codes: NDArray[np.intp]
    """(N,) row of `moved` for the response left out."""
    moved: Array
    """(R, N)."""

    def among(self, held: NDArray[np.bool_]) -> Numbers:
        """Some of the responses; the same object where it is all."""
        if held.all():
            return self
        return Numbers(values=self.values[held], codes=self.codes[held], moved=self.moved[:, held])

    @functools.cached_property
    def known(self) -> NDArray[np.bool_]:
        """(N,) which are not missing."""
        return np.isfinite(self.values)

    @functools.cached_property
    def positive(self) -> NDArray[np.bool_]:
        """(N,) which are positive in every replicate."""
        return np.asarray((self.values > 0) & (self.moved > 0).all(axis=0))

    @functools.cached_property
    def logs(self) -> Numbers:
        """Their logs."""
        return Numbers(values=np.log(self.values), codes=self.codes, moved=np.log(self.moved))

    @functools.cached_property
    def whole(self) -> Deviations:
        """Of all values."""
        return Deviations.of(self.values)

    @functools.cached_property
    def replicates(self) -> Deviations:
        """(R, N) of every replicate, nobody left out."""
        return Deviations.of(self.moved)

    @functools.cached_property
    def square(self) -> float:
        """Sum of squares around 0."""
        return float(self.values @ self.values)

    def without(self, rows: NDArray[np.intp]) -> Deviations:
        """(len(rows), N) of the others without each of the rows."""
        return Deviations.of(self.moved[self.codes[rows]], _others(len(self.values))[rows])

    @functools.cached_property
    def whole_ranks(self) -> Deviations:
        """Of the ranks of all values, over their number."""
        return Deviations.of(ranks_of(_tied(self.values)) / len(self.values))

    def ranks_without(self) -> Deviations:
        """(N, N) of the ranks among the others without each response, over their number; not kept, for its size.

        A smaller one left out moves a rank by 1, an equal one by 1/2.
        """
        n, (values, ranks) = len(self.values), self._moved_ranks
        own = values[self.codes, np.arange(n)][:, None]
        # The others' ranks are 1 to n - 1, of mean n / 2.
        around = ranks[self.codes] - 0.5 * (np.sign(values[self.codes] - own) + 1.0) - 0.5 * n
        np.fill_diagonal(around, 0.0)
        around /= n - 1
        return Deviations(around, (around**2).sum(axis=-1))

    @functools.cached_property
    def _moved_ranks(self) -> tuple[Array, Array]:
        """Values (R, N) of every replicate to `TIE` digits, and their ranks."""
        values = _tied(self.moved)
        return values, np.stack([ranks_of(row) for row in values])


def _tied(values: Array) -> Array:
    """Values to `TIE` digits."""
    mantissa, exponent = np.frexp(values)
    return np.asarray(np.ldexp(np.round(np.ldexp(mantissa, TIE)), exponent - TIE))


def _others(n: int) -> NDArray[np.bool_]:
    """(N, N) False where a response meets itself."""
    return ~np.eye(n, dtype=bool)


@dataclass(frozen=True, kw_only=True, eq=False)
class Pair:
    """Proxy and truth of one prompt's responses, with the same `codes`."""

    x: Numbers
    """Proxy."""
    y: Numbers
    """Truth."""

    @classmethod
    def of(cls, x: Array, y: Array) -> Pair:
        """Two numbers that no baseline ties together."""
        one, two = (Numbers(values=v, codes=np.zeros(len(v), dtype=np.intp), moved=v[None]) for v in (x, y))
        return cls(x=one, y=two)

    def among(self, held: NDArray[np.bool_]) -> Pair:
        """Some of the responses."""
        return Pair(x=self.x.among(held), y=self.y.among(held))

    def __len__(self) -> int:
        """N."""
        return len(self.x.values)

    @functools.cached_property
    def known(self) -> Pair:
        """Without responses that lack proxy or truth."""
        return self.among(self.x.known & self.y.known)

    @functools.cached_property
    def logs(self) -> Pair:
        """Logs of both, where both are positive in every replicate."""
        kept = self.among(self.x.positive & self.y.positive)
        return Pair(x=kept.x.logs, y=kept.y.logs)

    @functools.cached_property
    def sums(self) -> Sums:
        """Centred sums (3,) of xy, xx, yy, whole and without each response; once for own rows and pooled ones.

        The sum over the others around their own means is the whole less n / (n - 1) of the response's own product;
        where too little is left for a difference, they are taken anew.
        """
        n, codes = len(self), self.x.codes
        x, y = self.x.replicates, self.y.replicates
        own = np.stack([x.around * y.around, x.around**2, y.around**2], axis=-1)
        whole = own.sum(axis=1)[codes]
        without = whole - n / max(n - 1.0, 1.0) * own[codes, np.arange(n)]
        one_value = (x.squares == 0.0) | (y.squares == 0.0)
        thin = np.flatnonzero(one_value[codes] | (without[:, 1:] <= LEAST_LEFT * whole[:, 1:]).any(axis=1))
        if thin.size:
            without[thin] = self.x.without(thin).sums(self.y.without(thin))
        return Sums(value=self.x.whole.sums(self.y.whole), without=without)

    @functools.cached_property
    def rank_sums(self) -> Sums:
        """The same of the ranks."""
        without = self.x.ranks_without().sums(self.y.ranks_without())
        return Sums(value=self.x.whole_ranks.sums(self.y.whole_ranks), without=without)


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
        ("explained_variance_log", *_judge(logs, _explained, level=level, between=between, least=MINIMUM_FOR_LOGS)),
    ]


def _judge(
    pairs: list[Pair],
    measure: Callable[[list[Pair], float], Estimate],
    *,
    level: float,
    between: bool,
    least: int = MINIMUM_RESPONSES,
) -> tuple[Estimate, str | None]:
    """One measure with its verdict, None where there is a number; without interval below `least` responses."""
    kept = [p for p in pairs if len(p) > 1]
    n = sum(map(len, kept))
    least = MINIMUM_PROMPTS if between else least
    if n == 0 or (between and n < least):
        note = f"not given below {least} prompts" if between else "no two responses with proxy and truth"
        return no_estimate(note, n=n, level=level), "undetermined"
    sides = [p.x for p in kept], [p.y for p in kept]
    if any(sum(v.whole.squares for v in side) <= ROUNDING * sum(v.square for v in side) for side in sides):
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
