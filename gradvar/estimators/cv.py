"""Total coefficient of variation of an aggregated update, lengths random: what training sees.

    CV = sqrt(E||ghat - E ghat||^2) / ||E ghat||,   rho = 1/(1 + CV^2) = ||E ghat||^2 / E||ghat||^2

rho is estimated by the ratio of two unbiased inner products over disjoint groups (`groups`). Its interval is a
delete-one jackknife on the scale of log(1 - rho), the logarithm of the noise's share, which keeps rho below 1 and
leaves it free to be negative. From the jackknife's variance is taken what it has too much: what pairs of responses add,
which it counts twice, and the chance of which permutations were drawn. Without both it is the sampling variance to
within some percent, from CV 0.6 to CV 5. At weak signals pairs skew the estimate: the quantiles are bent for it
(`bent_quantiles`). The jackknife's bias widens the side it points to, and the lower end allows for shorter and longer
responses than those seen (`tails`). The t quantile's degrees of freedom follow from how unevenly the responses
contribute. CV's interval is the image.
Nothing is clamped: where rho's lower end is not positive the signal is not told apart from none, CV is NaN
("unresolved"), its upper end inf, its lower end still a valid bound.
Shape letters: N responses, n of a group, K prompts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gradvar.errors import GradvarError
from gradvar.estimators.advantages import check_advantage
from gradvar.estimators.aggregation import check_rule_arguments, find_rule
from gradvar.estimators.groups import PERMUTATIONS, GroupMoments, draw_groups, group_coefficients, group_moments
from gradvar.estimators.intervals import (
    MINIMUM_PROMPTS,
    PROMPTS_LIKE_THESE,
    THESE_PROMPTS,
    at_least_as_wide,
    bent_quantiles,
    check_level,
    effective_degrees,
    jackknife_variance,
    reach_of_skewed,
    t_quantile,
    without_surplus,
)
from gradvar.estimators.spread import weighted_gram
from gradvar.estimators.tails import LengthTails, PromptTails
from gradvar.runs.records import Estimate

Array = NDArray[np.float64]

RESOLVED = "resolved"
UNRESOLVED = "unresolved"
SILENT = "silent: all rewards equal"
NO_GRADIENT = "no gradient: all are 0"

_JACKKNIFE = "permutation groups, delete-one jackknife of log(1 - rho), t"
_UNSEEN = ", allowing for unseen lengths"


def aggregator_cv(
    gram: Any,
    rewards: Any,
    lengths: Any,
    rule: str,
    *,
    group_size: int = 8,
    advantage: str = "grpo",
    alpha: float | None = None,
    max_length: float | None = None,
    level: float = 0.95,
    permutations: int = PERMUTATIONS,
    rng: np.random.Generator,
) -> Estimate:
    """Total CV of one aggregation rule for groups of `group_size` responses to one prompt.

    Args:
        gram: (N, N) score Gram, or a ScoreGram.
        rewards: (N,) rewards; responses with NaN (unverified) are left out, unless the advantage is "score".
        lengths: (N,) lengths in tokens.
        rule: A rule of `aggregation_weights`, or a framework's name for one.
        group_size: n, responses of one update.
        advantage: Kind of `advantages`, computed inside each group.
        alpha: Exponent of vl_norm.
        max_length: M in tokens; a constant factor that changes no CV, nor (here) how long a response not seen may be.
            None takes the longest response.
        level: Nominal coverage.
        permutations: Random permutations the groups are cut from.
        rng: Draws them.

    Returns:
        The CV. NaN with high = inf where unresolved (rho's interval reaches 0), also where every reward is equal
        (then low is NaN too), and without interval, hence NaN, where N < 3 group_size.

    Raises:
        GradvarError: Unknown rule or advantage, shapes that differ, or fewer than two groups.
    """
    rho, _ = aggregator_rho(
        gram,
        rewards,
        lengths,
        rule,
        group_size=group_size,
        advantage=advantage,
        alpha=alpha,
        max_length=max_length,
        level=level,
        permutations=permutations,
        rng=rng,
    )
    return cv_from_rho(rho)


def aggregator_rho(
    gram: Any,
    rewards: Any,
    lengths: Any,
    rule: str,
    *,
    group_size: int = 8,
    advantage: str = "grpo",
    alpha: float | None = None,
    max_length: float | None = None,
    level: float = 0.95,
    permutations: int = PERMUTATIONS,
    rng: np.random.Generator,
) -> tuple[Estimate, GroupMoments]:
    """Estimate rho = ||E ghat||^2 / E||ghat||^2 of one rule, with its moments; arguments as in `aggregator_cv`."""
    check_level(level)
    check_advantage(advantage)
    found = find_rule(rule)
    matrix, r, sizes = checked_prompt(gram, rewards, lengths, advantage)
    limit = float(sizes.max()) if max_length is None and found.takes_max_length else max_length
    check_rule_arguments(found, alpha=alpha, max_length=limit)
    groups = draw_groups(len(r), group_size, permutations, rng=rng)
    coefficients = group_coefficients(groups, r, sizes, found, advantage=advantage, alpha=alpha, max_length=limit)
    moments = group_moments(matrix, groups, coefficients)
    tails = PromptTails.of(matrix, r, sizes, advantage=advantage).alone((found, alpha))
    rho = rho_estimate(moments, group_size=group_size, level=level, tails=tails)
    if advantage not in ("score", "raw") and np.ptp(r) == 0.0 and np.trace(matrix) > 0.0:
        rho = replace(rho, method=f"{_JACKKNIFE}; {SILENT}")
    return rho, moments


def checked_prompt(gram: Any, rewards: Any, lengths: Any, advantage: str) -> tuple[Array, Array, Array]:
    """Return Gram, rewards and lengths as float64 with unverified responses left out where a reward is used.

    Raises:
        GradvarError: Shapes that differ, lengths that are not positive, or no verified response.
    """
    matrix = weighted_gram(gram.gram() if hasattr(gram, "gram") else gram)
    r = np.asarray(rewards, dtype=np.float64)
    sizes = np.asarray(lengths, dtype=np.float64)
    n = matrix.shape[0]
    if r.shape != (n,) or sizes.shape != (n,):
        raise GradvarError(f"{n} responses in the gram, but rewards {r.shape} and lengths {sizes.shape}")
    if not (np.isfinite(sizes).all() and (sizes > 0).all()):
        raise GradvarError("lengths must be positive numbers of tokens")
    if advantage == "score":
        return matrix, np.zeros(n), sizes
    keep = np.flatnonzero(~np.isnan(r))
    if keep.size == 0:
        raise GradvarError("no response has a reward: run the reward stage, or study advantage 'score'")
    return matrix[np.ix_(keep, keep)], r[keep], sizes[keep]


def rho_estimate(moments: GroupMoments, *, group_size: int, level: float, tails: LengthTails | None = None) -> Estimate:
    """Estimate rho, delete-one jackknife; no interval where N < 3 group_size; NaN where E||ghat||^2 is 0.

    `tails` (of the rule alone) lowers the lower end for shorter and longer responses than those seen.
    """
    n = len(moments.same_without)
    none = Estimate(
        value=math.nan, low=math.nan, high=math.nan, level=level, method=_JACKKNIFE, n=n, clusters=1, seed=None
    )
    if not moments.same > 0.0:
        return replace(none, method=f"{_JACKKNIFE}; {NO_GRADIENT}")
    value = moments.cross / moments.same
    if math.isnan(value):
        return replace(none, method=f"{_JACKKNIFE}; no two groups with differing rewards in a permutation")
    if n < 3 * group_size:
        return replace(none, value=value, method=f"{_JACKKNIFE}; no interval below 3 groups")
    with np.errstate(divide="ignore", invalid="ignore"):
        replicates = moments.cross_without / moments.same_without
    if not np.isfinite(replicates).all():
        return replace(none, value=value, method=f"{_JACKKNIFE}; no interval, one response carries everything")
    told = none if tails is None else replace(none, method=none.method + _UNSEEN)
    return _interval(told, value, [moments], [replicates], moments.same, group_size, [tails])


def _interval(
    none: Estimate,
    value: float,
    prompts: Sequence[GroupMoments],
    replicates: Sequence[Array],
    same: float,
    group_size: int,
    tails: Sequence[LengthTails | None],
) -> Estimate:
    """Interval of rho = cross / same from the prompts' delete-one replicates of it."""
    noise = 1.0 - value
    variance, noisy, pairs, bend = 0.0, 0.0, 0.0, 0.0
    for moments, without in zip(prompts, replicates, strict=True):
        moved = (moments.cross_noise - value * moments.same_noise) / same
        variance += float(jackknife_variance(without))
        noisy += float(jackknife_variance(moved))
        twice, bent = moments.combined(-value / same, 1.0 / same, group_size)
        pairs, bend = pairs + twice, bend + bent
    error = math.sqrt(float(without_surplus(variance, noisy, pairs)))
    quantile = replicate_quantile(none, replicates)
    if noise <= 0.0 or any((without >= 1.0).any() for without in replicates):
        half = quantile * error
        stretch = math.exp(min(half / noise, 700.0)) if noise > 0.0 else math.nan
        ends = (1.0 - noise * stretch, 1.0 - noise / stretch) if noise > 0.0 else (value - half, value + half)
        return replace(none, value=value, low=ends[0], high=ends[1])
    logs = [np.log1p(-without) for without in replicates]
    centre = math.log(noise)
    bias = sum((len(one) - 1) * (float(one.mean()) - centre) for one in logs)
    size = float(np.linalg.norm(influence_of(replicates)))
    # The other way round: log(1 - rho) falls where rho rises.
    below, above = bent_quantiles(-bend / size**3 if size > 0.0 else 0.0, quantile)
    own = error / noise
    unseen = sum(one.unseen(influence_of([r]))[1] ** 2 for one, r in zip(tails, logs, strict=True) if one is not None)
    low = centre - above * own - max(bias, 0.0)
    high = centre - below * math.hypot(own, math.sqrt(unseen)) - min(bias, 0.0)
    return replace(none, value=value, low=-math.inf if high > 700.0 else 1.0 - math.exp(high), high=1.0 - math.exp(low))


def _ends_across(value: float, without: Array, level: float) -> tuple[float, float]:
    """Ends of rho for prompts like these from its replicates (K,), each without one prompt, on the log of the noise.

    Few prompts carry most of the signal: both ends move by skewness (91 to 92% of rho were covered without, 8 prompts).
    """
    if not value < 1.0:
        return math.nan, math.nan
    error, quantile = math.sqrt(float(jackknife_variance(without))) / (1.0 - value), t_quantile(level, len(without) - 1)
    logs = np.log(np.maximum(1.0 - without, np.finfo(np.float64).tiny))
    below, above = reach_of_skewed(logs.mean() - logs, error, quantile, level)
    return 1.0 - (1.0 - value) * math.exp(min(above, 700.0)), 1.0 - (1.0 - value) * math.exp(-below)


def replicate_quantile(none: Estimate, replicates: Sequence[Array]) -> float:
    """Student quantile with the degrees of freedom that the replicates support."""
    return t_quantile(none.level, effective_degrees(influence_of(replicates), none.n - none.clusters))


def influence_of(replicates: Sequence[Array]) -> Array:
    """Return what each response adds to the estimate, from the delete-one replicates of its prompt."""
    return np.concatenate([without.mean() - without for without in replicates])


def cv_from_rho(rho: Estimate) -> Estimate:
    """Image of rho and its interval under CV = sqrt(1/rho - 1).

    low is the image of rho's upper end: inf where that is not positive, 0 where there is no noise at all. Where rho's
    lower end is not positive, value is NaN and high inf (unresolved); without interval for rho all three are NaN.
    """

    def image(x: float) -> float:
        if math.isnan(x):
            return math.nan
        if x <= 0.0:
            return math.inf
        return math.sqrt(1.0 / x - 1.0) if x < 1.0 else 0.0

    value = image(rho.value) if rho.low > 0.0 else math.nan
    return replace(rho, value=value, low=image(rho.high), high=image(rho.low))


def resolution(rho: Estimate) -> str:
    """Return "resolved" where rho's interval lies above 0, else "unresolved", or that there is no update at all."""
    for nothing in (SILENT, NO_GRADIENT):
        if math.isnan(rho.value) and nothing in rho.method:
            return nothing
    return RESOLVED if rho.low > 0.0 else UNRESOLVED


class Needed(NamedTuple):
    """Responses (or prompts) that would settle a verdict."""

    n: float
    at_least: bool
    """Whether `n` is a lower bound only: nothing says how many more it takes."""


def n_to_resolve(rho: Estimate, group_size: int) -> Needed:
    """Responses (a prompt) at which rho's lower end would leave 0: N (half-width / distance)^2 on its own scale.

    The N used where it is resolved, otherwise always more than it. A lower bound only (`at_least`) where rho is not
    positive: there is no distance to scale by, and the upper end of its interval, the most favourable value that the
    data allow, stands in. inf where not even that is positive. Without an interval, what gives one: 3 group_size.
    """
    per_prompt = rho.n / max(rho.clusters, 1)
    more = math.floor(per_prompt) + 1.0
    if math.isnan(rho.value):
        return Needed(math.inf, at_least=False)
    if math.isnan(rho.low):
        return Needed(max(3.0 * group_size, more), at_least=True)
    if rho.low > 0.0:
        return Needed(float(math.ceil(per_prompt)), at_least=False)
    hopeful = rho.value if rho.value > 0.0 else rho.high
    if hopeful <= 0.0:
        return Needed(math.inf, at_least=False)
    if hopeful >= 1.0 or rho.value >= 1.0:
        return Needed(more, at_least=True)
    half = math.log1p(-rho.low) - math.log1p(-rho.value)
    if not math.isfinite(half):
        return Needed(math.inf, at_least=False)
    times = (half / math.log1p(-hopeful)) ** 2
    return Needed(max(float(math.ceil(per_prompt * times)), more), at_least=rho.value <= 0.0)


def pooled_rho(
    prompts: Sequence[GroupMoments],
    *,
    group_size: int,
    level: float,
    tails: Sequence[LengthTails | None] | None = None,
) -> tuple[Estimate, Estimate]:
    """Pooled rho, sum_q ||E ghat_q||^2 / sum_q E||ghat_q||^2, for both estimands.

    Its CV = sqrt(sum_q tr Var_q / sum_q ||E ghat_q||^2) is an equal-prompt summary; the CV of a batch of prompts
    needs inner products across prompts. A silent prompt counts with its zeros.

    Returns:
        (for these prompts: responses drawn again inside prompts; for prompts like these: delete-one-prompt jackknife,
        t over K - 1 and moved by skewness, without interval below 4 prompts).
    """
    same, cross = sum(m.same for m in prompts), sum(m.cross for m in prompts)
    n, clusters = sum(len(m.same_without) for m in prompts), len(prompts)
    none = Estimate(
        value=math.nan,
        low=math.nan,
        high=math.nan,
        level=level,
        method=f"{_JACKKNIFE}; {THESE_PROMPTS}",
        n=n,
        clusters=clusters,
        seed=None,
    )
    across = replace(
        none, method=f"permutation groups, delete-one-prompt jackknife, t, moved by skewness; {PROMPTS_LIKE_THESE}"
    )
    if same <= 0.0:
        note = f"; {NO_GRADIENT}"
        return replace(none, method=none.method + note), replace(across, method=across.method + note)
    value = cross / same
    replicates = []
    for m in prompts:
        with np.errstate(all="ignore"):
            replicates.append((cross - m.cross + m.cross_without) / (same - m.same + m.same_without))
    here = replace(none, value=value)
    if any(len(m.same_without) < 3 * group_size for m in prompts):
        here = replace(here, method=f"{none.method}; no interval below 3 groups in a prompt")
    elif all(np.isfinite(r).all() for r in replicates):
        told = none if tails is None else replace(none, method=none.method.replace(_JACKKNIFE, _JACKKNIFE + _UNSEEN))
        here = _interval(told, value, prompts, replicates, same, group_size, tails or [None] * len(prompts))
    else:
        here = replace(here, method=f"{none.method}; no interval, one response carries everything")
    there = replace(across, value=value)
    if clusters < MINIMUM_PROMPTS:
        return here, replace(across, method=f"{across.method}; not given below {MINIMUM_PROMPTS} prompts")
    same_by, cross_by = np.array([m.same for m in prompts]), np.array([m.cross for m in prompts])
    with np.errstate(all="ignore"):
        without = (cross - cross_by) / (same - same_by)
    if np.isfinite(without).all():
        low, high = _ends_across(value, without, level)
        there = at_least_as_wide(replace(there, low=low, high=high), here)
    return here, there
