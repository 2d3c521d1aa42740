"""The CV itself in forms 1 and 2, lengths given, with what makes its two parts uncertain, to stand beside form 3.

    CV = sqrt(N/n) sqrt(sum_i x_i^2 v_i) / (sum_i x_i ||grad J||)      of a group of n with the prompt's mix of lengths

x are the weights over all N responses as one scope, v_i = V L_i (form 1; V the scale of the proportional family,
mean_i V_i / L_i) or V_i itself (form 2), V_i the within-length variance. The gradients are g_i = (r_i - E r) s_i times
whatever scale the advantage has, which cancels: V_i, taken with the mean of N rewards, is too small by (N - 1)/N, and
||grad J||^2 is a mean over products of different responses (`noise_scale`). The advantage "score" has E s in place of
grad J, which is 0 on policy.

With noise and signal of an update, noise = tr Var ghat, signal = ||E ghat||^2, rho = signal / (noise + signal): then
interval, verdict, pooling over prompts and both estimands are the total CV's (`cv`), so that the three forms are made
alike but for what they mean. Replicates of the noise have lengths given, those of ||grad J||^2 leave a response out.
Shape letters: N responses of one prompt, n of a group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradvar.estimators.aggregation import aggregation_weights
from gradvar.estimators.carrying import LEAST_CARRYING, few_words, together
from gradvar.estimators.cv import UNRESOLVED, Needed, cv_from_rho, n_to_resolve, pooled_rho, resolution
from gradvar.estimators.groups import GroupMoments
from gradvar.estimators.intervals import MINIMUM_PROMPTS, PROMPTS_LIKE_THESE, THESE_PROMPTS
from gradvar.estimators.noise_scale import LEAST, noise_moments
from gradvar.estimators.pairs import centred, covariance_of_centred
from gradvar.estimators.paper_order import Variant
from gradvar.estimators.quasi import Dependence
from gradvar.runs.records import Estimate, TableRow, no_estimate

Array = NDArray[np.float64]

CV_FORMS = {
    "cv_form_1": "form 1: lengths given, Var = V L, V = mean V_i / L_i",
    "cv_form_2": "form 2: lengths given, measured v(L)",
}
"""Quantity to what is written in `method`."""
SCOPE = "all responses, lengths given"
_CENTRED = ("grpo", "mean", "rloo")


@dataclass(frozen=True, kw_only=True, eq=False)
class GivenLengths(GroupMoments):
    """Noise + signal as `same`, signal as `cross`: all pairs of `cross` are in `same`, whatever n."""

    third_root: float = 0.0
    """Cube root of the noise's third central moment, lengths given."""
    carrying: float = 1.0
    """Effective number of the responses that carry the noise; 1 of a silent prompt adds none."""

    def combined(self, along_same: float, along_cross: float, group_size: int) -> tuple[float, float]:
        """Variance from pairs and bend of an estimate with these slopes."""
        way, slope = np.array([along_same, along_cross]), along_same + along_cross
        # Two thirds: what `skew_bend` tends to at high levels.
        skewed = 2.0 / 3.0 * (along_same * self.third_root) ** 3
        return slope**2 * float(self.pairs[0, 0]), slope * float(way @ self.bend @ way) + skewed


@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """What the N responses of one prompt say, of whatever rule."""

    gram: Array
    rewards: Array
    lengths: Array
    advantage: str
    factors: Array
    """(N,) A_i over all responses."""
    within: Array
    """(N,) V_i."""
    centre: Array
    """(N,) v(L_i) by a fitted law, around which V_i varies."""
    spread: Array
    """(N,) standard deviation of V_i given the length, by responses alike in length."""
    skewness: Array
    """(N,) its skewness."""
    shared: Dependence
    """What the V_i owe to each other."""
    slope: Array
    """(N,) derivative of V_i to a number added to every A."""
    max_length: float
    carrying: float
    """Effective number of the responses that carry the noise (`carrying.effective_carrying`)."""


def no_update(n: int) -> GivenLengths:
    """Moments of a prompt whose every update is 0."""
    zeros = np.zeros(n)
    return GivenLengths(
        same=0.0, cross=0.0, same_without=zeros, cross_without=zeros, same_noise=zeros, cross_noise=zeros,
        kind=0, pairs=np.zeros((1, 1)), bend=np.zeros((2, 2)),
    )  # fmt: skip


def form_moments(
    measured: Measured, variants: Sequence[Variant], group_size: int
) -> dict[tuple[Variant, str], GivenLengths]:
    """Noise and signal of every rule in both forms, in the rule's own scale; N is at least 5."""
    n = len(measured.lengths)
    value, without, kernel = squared_gradient(measured)
    pairs = covariance_of_centred(kernel)
    moved = baseline_moves(measured)
    zeros = np.zeros(n)
    found = {}
    for variant in variants:
        x = _group_weights(measured, variant, group_size)
        whole = float(x.sum()) ** 2
        for form in CV_FORMS:
            w = _variance_weights(measured, x, form) * n / group_size
            noise, noise_without = _noise(measured, w, moved)
            same_without, cross_without = noise_without + whole * without, whole * without
            influences = np.stack([same_without.mean() - same_without, cross_without.mean() - cross_without])
            found[variant, form] = GivenLengths(
                same=noise + whole * value,
                cross=whole * value,
                same_without=same_without,
                cross_without=cross_without,
                same_noise=zeros,  # no permutations
                cross_noise=zeros,
                kind=0,
                pairs=whole**2 * pairs,
                bend=whole * 2.0 / (n * (n - 1.0)) * (influences @ kernel[0] @ influences.T),
                carrying=measured.carrying,
                third_root=_third_root(w * measured.spread, measured.skewness),
            )
    return found


def _third_root(spread: Array, skewness: Array) -> float:
    """Cube root of the third central moment of a sum with these standard deviations (N,) and skewness (N,)."""
    size = float(np.linalg.norm(spread))
    return size * float(np.cbrt(skewness @ (spread / size) ** 3)) if size > 0.0 else 0.0


def squared_gradient(measured: Measured) -> tuple[float, Array, Array]:
    """||grad J||^2 in the advantage's scale, its delete-one replicates (N,) and its centred kernel (1, N, N)."""
    n = len(measured.lengths)
    if measured.advantage == "score":
        others = measured.gram - np.diag(np.diagonal(measured.gram))
        rows, total = others.sum(axis=1), float(others.sum())
        kernel = centred(measured.gram[None])
        return total / (n * (n - 1.0)), (total - 2.0 * rows) / ((n - 1.0) * (n - 2.0)), kernel
    r = measured.rewards - measured.rewards.mean()
    moments = noise_moments(measured.gram, measured.rewards)
    # A = scale (r - mean) where the advantage has one; raw and opo differ from it by a baseline alone.
    scale = float(measured.factors @ r / (r @ r)) ** 2 if measured.advantage in _CENTRED else 1.0
    kernel = centred((scale * measured.gram * np.outer(r, r))[None])
    return scale * moments.cross, scale * moments.cross_without, kernel


def _group_weights(measured: Measured, variant: Variant, group_size: int) -> Array:
    """Weights (N,) over all responses, in the scale that they have in a group of n with the same mix of lengths."""
    rule, alpha = variant

    def weights(lengths: Array) -> Array:
        return np.asarray(aggregation_weights(rule.name, lengths, alpha=alpha, max_length=measured.max_length))

    x = weights(measured.lengths)
    # The sum of the weights does not depend on how many there are (1, most rules), or grows with them (token_sum).
    power = math.log2(float(weights(np.tile(measured.lengths, 2)).sum() / x.sum()))
    return np.asarray(x * (group_size / len(x)) ** power)


def _variance_weights(measured: Measured, x: Array, form: str) -> Array:
    """Weights (N,) of the V_i in sum_i x_i^2 v_i."""
    known = len(x) / (len(x) - 1.0) if measured.advantage in _CENTRED else 1.0  # V_i's part lost to the mean reward
    if form == "cv_form_2":
        return np.asarray(known * x**2)
    return np.asarray(known * float(x**2 @ measured.lengths) / (len(x) * measured.lengths))


def baseline_moves(measured: Measured) -> Array:
    """What is added (N,) to every A when a response is taken away and the baseline moves."""
    n = len(measured.lengths)
    if measured.advantage in _CENTRED:
        return np.asarray(measured.factors / (n - 1.0))
    if measured.advantage == "opo":
        return np.asarray(measured.factors * measured.lengths / (measured.lengths.sum() - measured.lengths))
    return np.zeros(n)


def _noise(measured: Measured, w: Array, moved: Array) -> tuple[float, Array]:
    """Return sum w_i V_i and its delete-one replicates with lengths given.

    Where the V_i that carry it lie closer to their law than those alike in length do, they are spread out as far.
    """
    n = len(w)
    gone = w * (measured.within - measured.centre) * n / (n - 1.0)
    own, alike = float(np.linalg.norm(gone)), float(np.linalg.norm(w * measured.spread))
    if 0.0 < own < alike:
        gone = gone * (alike / own)
    gone = gone + measured.shared(w[:, None])[:, 0] - moved * float(w @ measured.slope)
    value = float(w @ measured.within)
    return value, value - (gone - gone.mean())


def form_cv_rows(
    moments: Sequence[GivenLengths],
    variant: Variant,
    form: str,
    labels: Mapping[str, Any],
    *,
    group_size: int,
    level: float,
    seed: int,
    pooled: bool = False,
) -> list[TableRow]:
    """Rows of one rule in one form: of one prompt, or pooled for both estimands."""
    both = pooled_rho(moments, group_size=group_size, level=level)
    noise = sum(m.same - m.cross for m in moments)
    below = noise > 0.0 >= sum(m.same for m in moments)
    rows = []
    for rho, estimand in list(zip(both, (THESE_PROMPTS, PROMPTS_LIKE_THESE), strict=True))[: 2 if pooled else 1]:
        few = None
        if rho.high <= 0.0 or (below and (estimand == THESE_PROMPTS or len(moments) >= MINIMUM_PROMPTS)):
            # ||grad J||^2 came out near -noise or below: nothing but a CV of at least 0 can be told.
            rho = _nothing_told(rho, "||grad J||^2 estimated near minus the noise or below")
        elif (number := together(m.carrying for m in moments)) < LEAST_CARRYING and not math.isnan(rho.low):
            rho, few = _nothing_told(rho, few_words(number)), number
        method = rho.method.replace("permutation groups", f"{CV_FORMS[form]}, ||grad J||^2 of different responses")
        needed = Needed(n=math.nan, at_least=False)
        if estimand == THESE_PROMPTS:
            size = rho.n / rho.clusters
            more = math.ceil(size * LEAST_CARRYING / few) if few is not None else math.floor(size) + 1.0
            needed = Needed(n=more, at_least=True) if rho.low == -math.inf else n_to_resolve(rho, group_size)
        estimate = replace(cv_from_rho(rho), method=method, seed=seed)
        rows.append(_row(estimate, form, variant, labels, group_size, resolution(rho), estimand, needed))
    return rows


def no_form_cv_rows(
    why: str | None, n: int, labels: Mapping[str, Any], *, group_size: int, level: float, seed: int
) -> list[TableRow]:
    """Rows without rule of a prompt without update (`why`) or with too few responses (None)."""
    said = why or f"fewer than {LEAST} verified responses"
    needed = Needed(n=math.inf if why else float(LEAST), at_least=why is None)
    return [
        _row(
            no_estimate(f"{words}; not estimated; {said}", n=n, level=level, seed=seed),
            form,
            None,
            labels,
            group_size,
            why or UNRESOLVED,
            THESE_PROMPTS,
            needed,
        )
        for form, words in CV_FORMS.items()
    ]


def _nothing_told(rho: Estimate, why: str) -> Estimate:
    method = f"{rho.method.split('; no gradient')[0]}; {why}"
    return replace(rho, value=math.nan, low=-math.inf, high=1.0, method=method)


def _row(
    estimate: Estimate,
    form: str,
    variant: Variant | None,
    labels: Mapping[str, Any],
    group_size: int,
    verdict: str,
    estimand: str,
    needed: Needed,
) -> TableRow:
    rule, alpha = variant if variant is not None else (None, None)
    return TableRow(
        quantity=form,
        estimate=estimate,
        rule=None if rule is None else rule.name,
        alpha=alpha,
        scope=SCOPE,
        group_size=group_size,
        verdict=verdict,
        extra={"estimand": estimand, "n_needed": needed.n, "n_needed_at_least": needed.at_least},
        **labels,
    )
