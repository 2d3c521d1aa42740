"""Bias, scale and efficiency of an aggregated update, and which way it pushes length and entropy.

Reference: grad J = E[A s] with the rloo advantage, unbiased, by products of disjoint groups (`update_products`).

    eta = <E ghat, grad J>^2 / (||grad J||^2 E||ghat||^2) = cos^2 rho

is what no learning rate can change: 1 - eta is the least relative squared error of one update over all step sizes.
Shape letters: N responses, n of a group, B groups, P permutations, R kinds of update.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from gradvar.estimators.intervals import (
    at_least_as_wide,
    jackknife_variance,
    quantiles_of_columns,
    reach_of_skewed,
    t_quantile,
    without_surplus,
)
from gradvar.estimators.surplus import jackknife_surplus, own_products
from gradvar.estimators.tails import LengthTails, Unseen
from gradvar.estimators.update_products import Array, Products
from gradvar.runs.records import Estimate


@dataclass(frozen=True, kw_only=True, eq=False)
class Jackknifed:
    """R statistics with their delete-one replicates, a block a prompt."""

    value: Array
    """(R,)."""
    replicates: list[Array]
    """One (N_q, R) a prompt."""
    n: int
    clusters: int
    degrees: float | None = None
    """Degrees of freedom; None takes them from how unevenly the responses contribute."""
    surplus: tuple[Array, Array] | None = None
    """(R,) each: what the jackknife variance has from the choice of permutations and from pairs of responses
    (`without_surplus`); None: nothing is known of it."""
    curved: Sequence[tuple[Array, Array, float]] | None = None
    """What the shares of correct responses explain, a prompt each: standard deviation to first order (R,), size of the
    second (R,), and the share's own skewness (`_curvature`); None: not told apart."""
    own: Array | None = None
    """(R,) of cosines: by how much they would be lower if a response's product with itself counted
    (`surplus.own_products`)."""
    here: Jackknifed | None = None
    """Of prompts like these: the same for these prompts, whose intervals theirs hold."""
    _quantiles: dict[float, Array] = field(default_factory=dict, init=False, repr=False)

    def error(self) -> Array:
        """(R,) standard errors, responses drawn again inside prompts."""
        return self._error

    @functools.cached_property
    def _error(self) -> Array:
        variance = np.asarray(sum(jackknife_variance(r) for r in self.replicates))
        if self.surplus is not None:
            variance = without_surplus(variance, *self.surplus)
        return np.asarray(np.sqrt(variance))

    @functools.cached_property
    def bias(self) -> Array:
        """(R,) jackknife estimates of the biases."""
        with np.errstate(invalid="ignore"):  # inf - inf
            return np.asarray(sum((len(r) - 1) * (r.mean(axis=0) - self.value) for r in self.replicates))

    @functools.cached_property
    def influences(self) -> list[Array]:
        """What each response adds to the estimates, (N_q, R) a prompt."""
        with np.errstate(invalid="ignore"):
            return [r.mean(axis=0) - r for r in self.replicates]

    def quantiles(self, level: float) -> Array:
        """(R,) Student quantiles with the degrees of freedom of each statistic."""
        if level not in self._quantiles:
            self._quantiles[level] = self.quantiles_of(np.concatenate(self.influences), level)
        return self._quantiles[level]

    def quantiles_of(self, influences: Array, level: float) -> Array:
        """The same (F,) for influences (n, F) on other statistics of the same responses."""
        if self.degrees is not None:
            return np.full(influences.shape[1], t_quantile(level, self.degrees))
        return quantiles_of_columns(influences, level, self.n - self.clusters)


RARE = 1.0 / 3.0
"""Skewness of the share of correct responses at which a scale's bias moves its interval by all of it; below by less."""

Statistic = Callable[[Array, Array, Array, Array], Array]
"""(same (..., R), cross (..., R), mixed (..., R, H), direction (..., H)) to (..., R)."""


def jackknifed(prompts: Sequence[Products], statistic: Statistic, *, across: bool = False) -> Jackknifed:
    """Evaluate a statistic of products summed over prompts, with each prompt's replicates.

    For these prompts a replicate leaves out one response, for prompts like these (`across`) one prompt, t over K - 1.
    A scale bends: that of dr_grpo hangs on the share p of correct responses alone, through the groups' standard
    deviation, nearly as 1/sqrt(p (1 - p)), and near one half a jackknife sees no slope (82 to 91% coverage).
    """
    fields = [(p.same, p.cross, p.mixed, p.direction) for p in prompts]
    totals = [np.sum([f[m][0] for f in fields], axis=0) for m in range(4)]
    with np.errstate(all="ignore"):
        value = statistic(*totals)
        if across:
            owns = [np.stack([f[m][0] for f in fields]) for m in range(4)]
            whole = [statistic(*[total[None] - own for total, own in zip(totals, owns, strict=True)])]
        replicates = (
            whole
            if across
            else [
                statistic(*[total[None] - own[:1] + own[1:] for total, own in zip(totals, f, strict=True)])
                for f in fields
            ]
        )
    count = len(prompts)
    bends = statistic is scale and not across
    return Jackknifed(
        value=value,
        replicates=replicates,
        n=sum(p.responses for p in prompts),
        clusters=count,
        degrees=count - 1 if across else None,
        surplus=None if across else jackknife_surplus(prompts, totals, statistic),
        curved=[_curvature(p, totals, r, count) for p, r in zip(prompts, replicates, strict=True)] if bends else None,
        own=-own_products(prompts, totals, statistic) if statistic is cosine and not across else None,
        here=jackknifed(prompts, statistic) if across else None,
    )


def _curvature(prompt: Products, totals: Sequence[Array], replicates: Array, count: int) -> tuple[Array, Array, float]:
    """Of mixed / direction as a function f of one prompt's share of correct responses, which errs by sigma.

    f' sigma (R,) from the jackknife's replicates along the rewards, and f'' sigma^2 / 2 (R,) in two parts. Pairs of
    rewards in one group add (d^2 - sigma^2) f''/2, sqrt(2) of it as standard deviation. Pairs in two groups they do not
    see: where mixed = u w and direction = w^2 for E ghat and grad J of lengths u and w, f'' lacks -2 f' w'/w, or with
    the sums of K such prompts (K - 2) f' (w^2)' / sum w^2 (without, dr_grpo's scale was covered 100% at N = 64, with 92
    to 100%). Last the skewness of the share's error.
    """
    along, own = totals[2][:, 0], totals[3][0]
    with np.errstate(all="ignore"):
        pairs = (prompt.curved[:-1] - along / own * prompt.curved[-1]) / own
        size = math.sqrt(float(prompt.deviations @ prompt.deviations) * (1.0 + 1.0 / prompt.responses))
        way = -prompt.deviations / size if size > 0.0 else 0.0 * prompt.deviations
        slope = way @ (replicates - replicates.mean(axis=0))
        steep = way @ (prompt.direction[1:, 0] - prompt.direction[1:, 0].mean()) / own
        skewness = float((prompt.deviations**3).sum()) / size**3 if size > 0.0 else 0.0
        return slope, pairs / math.sqrt(2.0) + 0.5 * (count - 2) * steep * slope, skewness


def _bent_reach(slope: float, bend: float, skewness: float, quantile: float) -> tuple[float, float]:
    """How far (below, above) its unbiased estimate f(p) may lie: -slope t + bend (t^2 + 1) over |t| <= quantile.

    Where few are right, or wrong, more may be than were seen: t reaches skewness (2 q^2 + 1)/6 further there (Hall
    1992; one in ten right: dr_grpo's scale was covered 83% without). With d = sigma t the error of the share, the
    estimate is f(p) + f' d + (d^2 - sigma^2) f''/2, and f' here, at the share seen, is f''d more than at p. At p = 1/2
    the truth is the vertex itself, whatever was seen, and an end there misses by any error of `bend`: half of what is
    taken off for sigma^2 is left (81 to 90% covered without, p = 1/2).
    """
    further = skewness * (2.0 * quantile**2 + 1.0) / 6.0
    lowest, highest = -quantile - max(further, 0.0), quantile - min(further, 0.0)
    ends = [bend * t**2 - slope * t for t in (lowest, highest)]
    if bend != 0.0 and lowest < slope / (2.0 * bend) < highest:
        ends.append(-(slope**2) / (4.0 * bend))  # the parabola's vertex
    return max(-min(ends) - min(bend, 0.5 * bend), 0.0), max(max(ends) + max(bend, 0.5 * bend), 0.0)


def _curved_reach(
    curved: Sequence[tuple[Array, Array, float]], k: int, error: float, bias: float, quantile: float
) -> tuple[float, float]:
    """How far (below, above) the interval of statistic k reaches where `curved` is told apart.

    Its parabolas, the rest of the error and the bias in squares; where few are right the ratio's own bias, of order
    1/(N p), is what pairs of responses do not see: then it moves the ends, and the parabolas are straight.
    """
    own = [(float(slope[k]), float(bend[k]), skewness) for slope, bend, skewness in curved]
    rest = quantile * math.sqrt(max(error**2 - sum(slope**2 for slope, _, _ in own), 0.0))
    bends = [_bent_reach(*one, quantile) for one in own]
    straight = [_bent_reach(slope, 0.0, skewness, quantile) for slope, _, skewness in own]
    rare = min(max(abs(skewness) for _, _, skewness in own) / RARE, 1.0)
    ends = []
    for side, far in enumerate((max(bias, 0.0), max(-bias, 0.0))):
        bent = math.hypot(rest, far, *(reach[side] for reach in bends))
        moved = math.hypot(rest, *(reach[side] for reach in straight)) + far
        ends.append(bent + rare * max(moved - bent, 0.0))
    return ends[0], ends[1]


def log_noise(same: Array, cross: Array, mixed: Array, direction: Array) -> Array:
    """log(1 - eta)."""
    return np.asarray(np.log(1.0 - mixed[..., 0] ** 2 / (direction[..., :1] * same)))


def log_efficiency(same: Array, cross: Array, mixed: Array, direction: Array) -> Array:
    """Log eta up to ||grad J||^2, which no rule changes; NaN where an update goes against grad J."""
    return np.asarray(2.0 * np.log(mixed[..., 0]) - np.log(same))


def log_rho(same: Array, cross: Array, mixed: Array, direction: Array) -> Array:
    """Log rho."""
    return np.asarray(np.log(cross) - np.log(same))


def cosine(same: Array, cross: Array, mixed: Array, direction: Array) -> Array:
    """cos(E ghat, grad J); not held below 1 where it is noise."""
    return np.asarray(mixed[..., 0] / np.sqrt(cross * direction[..., :1]))


def scale(same: Array, cross: Array, mixed: Array, direction: Array) -> Array:
    """<E ghat, grad J> / ||grad J||^2: how long the update is along grad J, in units of grad J."""
    return np.asarray(mixed[..., 0] / direction[..., :1])


def inner_product(which: int) -> Statistic:
    """<E ghat, E h> for direction `which`: which way, up or down, small steps along E ghat push it."""
    return lambda same, cross, mixed, direction: np.asarray(mixed[..., which])


def pressure(which: int) -> Statistic:
    """<E ghat, E h> / <E ghat, grad J> for direction `which`.

    The change of E[L] (tokens) or H (nats) for one unit of expected reward gained by small steps along E ghat.
    """

    def statistic(same: Array, cross: Array, mixed: Array, direction: Array) -> Array:
        return np.asarray(mixed[..., which] / mixed[..., 0])

    return statistic


def estimate_of(
    result: Jackknifed,
    k: int,
    *,
    level: float,
    method: str,
    tails: Sequence[Unseen] | None = None,
    least: tuple[float, float] = (0.0, 0.0),
) -> Estimate:
    """Statistic k with its t interval, moved by skewness and widened by the jackknife's bias on the side it points to.

    `tails`, one a prompt, add what lengths beyond those seen could do to it; `least` is how far (below, above) it
    reaches at least without either. Where a part `curved` is told apart (then there are no tails) its reach, the rest
    of the error and the bias, which counts as error, are added in squares (MOVER, Zou and Donner 2008). Value NaN with
    an unbounded interval where it is undefined. For prompts like these the interval holds that for these prompts
    (without, 8 prompts: scales were covered 82%, pressures 86%), and has neither its skewness nor tails.
    """
    error = float(result.error()[k])
    value = float(result.value[k])
    low, high = -math.inf, math.inf
    if math.isfinite(value) and math.isfinite(error):
        quantile, bias = float(result.quantiles(level)[k]), float(result.bias[k])
        seen = () if result.degrees is not None else zip(tails or (), result.influences, strict=False)
        unseen = [one.unseen(r[:, k]) for one, r in seen]
        if result.curved is None:
            influence = np.concatenate([u[:, k] for u in result.influences])
            plain = result.degrees is not None  # over prompts
            own = (quantile * error,) * 2 if plain else reach_of_skewed(influence, error, quantile, level)
            below, above = (
                math.hypot(max(reach, least[side]), *(quantile * ends[side] for ends in unseen))
                for side, reach in enumerate(own)
            )
            low, high = value - below - max(bias, 0.0), value + above - min(bias, 0.0)
        else:
            below, above = _curved_reach(result.curved, k, error, bias, quantile)
            low, high = value - below, value + above
    else:
        value, method = math.nan, f"{method}; unresolved"
    found = Estimate(
        value=value,
        low=low,
        high=high,
        level=level,
        method=method,
        n=result.n,
        clusters=result.clusters,
        seed=None,
    )
    if result.here is None:
        return found
    return at_least_as_wide(found, estimate_of(result.here, k, level=level, method=method, tails=tails))


@dataclass(frozen=True, kw_only=True, eq=False)
class Known:
    """What is told apart from 0: nothing can be said relative to what is not."""

    direction: bool
    """||grad J||^2."""
    updates: NDArray[np.bool_]
    """(R,) ||E ghat||^2."""


def what_is_known(prompts: Sequence[Products], *, level: float, across: bool = False) -> Known:
    """Test ||grad J||^2 and every ||E ghat||^2."""
    own = jackknifed(prompts, lambda same, cross, mixed, direction: cross, across=across)
    return Known(
        direction=is_direction_known(prompts, level=level, across=across),
        updates=np.array([estimate_of(own, k, level=level, method="").low > 0.0 for k in range(len(own.value))]),
    )


def is_direction_known(prompts: Sequence[Products], *, level: float, across: bool = False) -> bool:
    """Whether ||grad J||^2 is told apart from 0."""
    reference = jackknifed(prompts, lambda same, cross, mixed, direction: direction[..., :1], across=across)
    return estimate_of(reference, 0, level=level, method="").low > 0.0


def gated(found: Estimate, known: bool) -> Estimate:
    """`found`, or NaN and unbounded, "unresolved", where what it is divided by is not told apart from 0."""
    if known:
        return found
    return replace(found, value=math.nan, low=-math.inf, high=math.inf, method=f"{found.method}; unresolved")


def eta_estimate(
    prompts: Sequence[Products],
    result: Jackknifed,
    k: int,
    *,
    level: float,
    method: str,
    across: bool = False,
    tails: Sequence[LengthTails] | None = None,
    known: bool | None = None,
) -> Estimate:
    """Efficiency eta of update k from `jackknifed(prompts, log_noise)`.

    NaN, "unresolved", where ||grad J||^2 is not told apart from 0: then nothing is known of the direction either. No
    eta is negative, so the lower end is at least 0. `tails` (of the rule alone), one a prompt, lower the
    lower end for shorter and longer responses than those seen. `known` is `is_direction_known`, which is found where it
    is not given.
    """
    noise = estimate_of(result, k, level=level, method=method, tails=tails)
    told = is_direction_known(prompts, level=level, across=across) if known is None else known
    if math.isnan(noise.value) or not told:
        return replace(noise, value=math.nan, low=math.nan, high=math.nan, method=f"{method}; unresolved")
    return replace(
        noise,
        value=1.0 - math.exp(noise.value),
        low=max(1.0 - math.exp(min(noise.high, 700.0)), 0.0),
        high=1.0 - math.exp(noise.low),
    )
