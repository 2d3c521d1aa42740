"""What responses shorter or longer than those seen could do to the noise of an update.

Lengths have long tails, and so have the weights' and the gradients' powers of them: a rule's noise, E sum x^2 A^2
||s||^2, rests on rare responses that a sample may not hold. A sample without them looks quiet and its interval is too
narrow: CV ratios to grpo, which divides by length and whose total weight nothing bounds, were covered 66 to 86% where
the law is flat or E[g | L] moves, those of dr_grpo 88% where ||g||^2 grows like L^2 (N = 64 and 128). So a response as
extreme as one expected among 4 N, lognormal through the lengths, is put beside the sample with the influence that the
8 nearest to that end have, carried on by a power of the length. Its square is added to the variance on the side that it
would move the estimate to, and on that side alone. Where few carry the noise the sample is theirs: N and the nearest
are of them (one in ten right: grpo's ratios were covered 81 to 86% without, eta of dr_grpo over the best's 88%).

The influence on the log of one rule's noise grows like x^2 ||g||^2: L^(growth - 2 falls) for weights that fall like
L^-falls. Beside another rule's, whose seen influences are what is left of both, the powers were fitted to the simulated
laws: 4 + falls/2 - growth below and 2 (growth - falls) above, falls the smaller of the two (coverage 92 to 99%; with
the power one less 83 to 97%). Away from grad J an update's square grows like its noise. Of two rules that are both
bounded, or both not, a short response makes that noisier whose weights fall more, taken by the power 3 - growth, fitted
likewise: eta over that of VL Norm at another alpha was covered 87 to 90% without where E[g | L] moves or the law is
flat, 89 to 100% with.

    below   grpo's alone (half a power more), whose weights fall and whose sum nothing bounds; and vl_norm's from alpha
            1 on, whose sum is kept, so that it goes to the shortest: its rho was covered 91 to 93% without where
            E[g | L] moves (N = 64 and 128), 93% with the power 2 - growth, elsewhere 93 to 98%
    above   all rules'; no longer than the run's maximum

Shape letters: N responses.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import special

from gradvar.estimators.advantages import advantages
from gradvar.estimators.aggregation import Rule, scope_weights
from gradvar.estimators.carrying import few_that_carry

Array = NDArray[np.float64]

NEAREST = 8
"""Responses whose influence is carried on."""
FAR = 3
"""At most one in so many of the few that carry the noise: what lies in the middle tells nothing of an end."""
ROUNDING = 1e-24
"""Squares below this share of the largest are rounding: A = r - mean leaves some where it is 0."""


class Unseen(Protocol):
    """What responses that a sample does not hold could do to an estimate."""

    def unseen(self, influence: Array) -> tuple[float, float]:
        """Influences of unseen responses: (root sum of squares of those that would lower the estimate, raise it)."""


@dataclass(frozen=True, kw_only=True)
class Tail:
    """One end of the lengths."""

    side: int
    """Where such a response would move the estimate: 1 up, -1 down, 0 neither."""
    power: float
    """Its influence changes like this power of how much further out it lies, at least 0."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Beyond:
    """Where one prompt's unseen responses would lie."""

    lengths: Array
    """(N,) tokens."""
    longest: float = math.inf
    """No response is longer, tokens."""
    carrying: NDArray[np.bool_] | None = None
    """(N,) which responses carry the noise where they are few (`carrying.few_that_carry`)."""

    @functools.cached_property
    def below(self) -> tuple[NDArray[np.intp], float] | None:
        """The responses nearest to the short end and how much further out, in logs; None: nothing is unseen."""
        edge = float(self._logs.mean()) - self._reach
        nearest = self._order[: self._nearest]
        return (nearest, float(self._logs[nearest].mean()) - edge) if edge < self._logs[nearest[0]] else None

    @functools.cached_property
    def above(self) -> tuple[NDArray[np.intp], float] | None:
        """The same at the long end."""
        edge = min(float(self._logs.mean()) + self._reach, math.log(self.longest))
        nearest = self._order[::-1][: self._nearest]
        return (nearest, edge - float(self._logs[nearest].mean())) if edge > self._logs[nearest[0]] else None

    @functools.cached_property
    def _logs(self) -> Array:
        return np.log(self.lengths)

    @functools.cached_property
    def _order(self) -> NDArray[np.intp]:
        """Those that carry the noise, the shortest first."""
        held = np.arange(len(self._logs)) if self.carrying is None else np.flatnonzero(self.carrying)
        return held[np.argsort(self._logs[held], kind="stable")]

    @property
    def _nearest(self) -> int:
        return NEAREST if self.carrying is None else max(min(NEAREST, len(self._order) // FAR), 1)

    @functools.cached_property
    def _reach(self) -> float:
        if len(self._logs) < 2 or np.ptp(self._logs) == 0.0:
            return -math.inf
        return float(self._logs.std(ddof=1) * special.ndtri(1.0 - 1.0 / (4.0 * len(self._order))))


@dataclass(frozen=True, kw_only=True, eq=False)
class LengthTails:
    """Both ends of one prompt's lengths, for the log of a rule's noise or of its CV over another's."""

    beyond: Beyond
    short: Tail
    long: Tail

    def turned(self) -> LengthTails:
        """The same for what falls where the CV or noise rises: an efficiency."""
        short, long = (Tail(side=-end.side, power=end.power) for end in (self.short, self.long))
        return replace(self, short=short, long=long)

    def unseen(self, influence: Array) -> tuple[float, float]:
        """Influences of unseen responses: (root sum of squares of those that would lower the estimate, raise it).

        Args:
            influence: (N,) of the responses on the estimate.
        """
        ends = {-1: 0.0, 0: 0.0, 1: 0.0}
        for tail, far in ((self.short, self.beyond.below), (self.long, self.beyond.above)):
            if tail.side != 0 and far is not None:
                nearest, step = far
                square = float(np.square(influence[nearest]).mean())
                ends[tail.side] += square * math.exp(min(2.0 * max(0.0, tail.power) * step, 700.0))
        return math.sqrt(ends[-1]), math.sqrt(ends[1])


Variant = tuple[Rule, float | None]
"""A rule and its alpha."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptTails:
    """One prompt's tails under any rule; describe the prompt once, and ask for every rule."""

    beyond: Beyond
    growth: float
    """||g||^2 grows like this power of the length."""
    _weights: dict[Variant, tuple[float, bool]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls, gram: Array, rewards: Array, lengths: Array, *, advantage: str, max_length: float = math.inf
    ) -> PromptTails:
        """Describe a prompt.

        Args:
            gram: (N, N) score Gram.
            rewards: (N,) verified rewards (any numbers for advantage "score").
            lengths: (N,) tokens.
            advantage: Kind of `advantages`, here over all N responses.
            max_length: M in tokens, not positive where it is not known.
        """
        sizes = np.asarray(lengths, dtype=np.float64)
        factors = np.ones(len(sizes)) if advantage == "score" else advantages(rewards, advantage, lengths=sizes)
        limit = max(max_length, float(sizes.max())) if max_length > 0 else math.inf
        growth = _slope(sizes, factors**2 * np.diagonal(gram))
        return cls(beyond=Beyond(lengths=sizes, longest=limit, carrying=few_that_carry(factors)), growth=growth)

    def alone(self, rule: Variant) -> LengthTails:
        """Tails of the noise of `rule`."""
        falls, unbounded = self._described(rule)
        power = 2.0 * falls + 0.5 if unbounded else 2.0
        short = Tail(side=int(unbounded or falls >= 1.0), power=power - self.growth)
        return self._tails(short, Tail(side=1, power=self.growth - 2.0 * falls))

    def beside(self, rule: Variant, reference: Variant) -> LengthTails:
        """Tails of the CV of `rule` over that of `reference`."""
        (own, unbounded), (other, reference_unbounded) = self._described(rule), self._described(reference)
        common = min(own, other)
        short = Tail(side=int(unbounded) - int(reference_unbounded), power=4.0 + common / 2.0 - self.growth)
        if unbounded == reference_unbounded and own != other:
            # The rule whose weights fall more is the one that a short response makes noisier.
            short = Tail(side=1 if own > other else -1, power=3.0 - self.growth)
        # The rule whose weights fall less is the one that a long response makes noisier.
        side = int(own < other) - int(own > other)
        return self._tails(short, Tail(side=side, power=2.0 * self.growth - 2.0 * common))

    def angle(self, rule: Variant) -> LengthTails:
        """Tails of the cosine of `rule`'s update: rare responses turn it away, under any weights.

        Where E[g | L] moves with L, cosines of 0.99 were covered 82 to 87% without (N = 512).
        """
        falls, _ = self._described(rule)
        short = Tail(side=-1 if falls > 0.0 else 0, power=min(2.0 * falls, 3.0) - self.growth)
        return self._tails(short, Tail(side=-1, power=self.growth - 2.0 * falls))

    def lower_slopes(self, influence: Array) -> Array:
        """How far (F,) an unseen shorter response could lower slopes over alpha, of log eta or log rho.

        It is the noisier the higher alpha. Where E[g | L] moves alpha* was covered 89% without (N = 128).

        Args:
            influence: (N, F) of the responses on the slopes.
        """
        if self.beyond.below is None:
            return np.zeros(influence.shape[1])
        nearest, step = self.beyond.below
        further = math.exp(min(max(0.0, 2.0 - self.growth) * step, 350.0))
        return np.asarray(further * np.sqrt(np.square(influence[nearest]).mean(axis=0)))

    def _tails(self, short: Tail, long: Tail) -> LengthTails:
        return LengthTails(beyond=self.beyond, short=short, long=long)

    def _described(self, rule: Variant) -> tuple[float, bool]:
        """Power of the length by which a rule's weights fall, and whether a shorter response would raise their sum.

        As grpo's, which nothing bounds.
        """
        if rule not in self._weights:
            lengths = self.beyond.lengths
            shorter = np.where(lengths == lengths.min(), 0.5 * lengths, lengths)
            weights, further = (
                scope_weights(rule[0], x, lambda y: y.sum(), alpha=rule[1], max_length=float(lengths.max()))
                for x in (lengths, shorter)
            )
            falls = round(-_slope(lengths, np.asarray(weights)), 9)  # a power law but for rounding
            raised = float(further.sum()) > (1.0 + 1e-9) * float(weights.sum())
            self._weights[rule] = falls, falls > 0.0 and raised
        return self._weights[rule]


def _slope(lengths: Array, values: Array) -> float:
    """Slope of log values on log lengths, of those that are positive; 0 where there is none."""
    held = values > ROUNDING * values.max(initial=0.0)
    x = np.log(lengths[held])
    if not held.any() or np.ptp(x) == 0.0:
        return 0.0
    x = x - x.mean()
    return float(x @ np.log(values[held]) / (x @ x))
