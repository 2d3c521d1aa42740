"""Every interval of one simulated data set beside its truth.

A draw is K prompts of N responses. The estimates are made as the tables make them, from the same functions.
Shape letters: N responses of a prompt, K prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.calibration_extras import extras_intervals
from benchmarks.calibration_forms import form_intervals
from benchmarks.calibration_lines import line_intervals
from benchmarks.calibration_simulated import Found, Simulated, bare, found_of, simulate
from benchmarks.calibration_truths import ALPHAS, GRID, GROUP, LONGEST, RULES, Truths, eta_ratio_truth, label
from gradvar.estimators import find_rule
from gradvar.estimators.additive import of_prompts_like_these, of_these_prompts, ratio_of_signals
from gradvar.estimators.baselines import Baselines, log_independence_ratio
from gradvar.estimators.best_alpha import best_of_curve
from gradvar.estimators.bias import (
    Jackknifed,
    Statistic,
    cosine,
    estimate_of,
    eta_estimate,
    inner_product,
    jackknifed,
    log_efficiency,
    log_noise,
    log_rho,
    pressure,
    scale,
    what_is_known,
)
from gradvar.estimators.cosines import cosine_estimate
from gradvar.estimators.cv import cv_from_rho, pooled_rho
from gradvar.estimators.eta_ratios import eta_ratios
from gradvar.estimators.group_products import Layout
from gradvar.estimators.groups import GroupMoments, draw_groups, group_coefficients, group_moments, moments_of_kinds
from gradvar.estimators.identity import identity_from_parts, identity_parts
from gradvar.estimators.inputs import is_silent
from gradvar.estimators.intervals import MINIMUM_PROMPTS
from gradvar.estimators.law_rows import fit_samples
from gradvar.estimators.law_samples import Sample, sample_of
from gradvar.estimators.length_bins import bin_products, length_bins
from gradvar.estimators.noise_scale import noise_moments
from gradvar.estimators.pairs import mean_coefficients, pair_covariance
from gradvar.estimators.planning import extrapolated_cv
from gradvar.estimators.prediction import Pair, predictions
from gradvar.estimators.proxies import prompt_pairs
from gradvar.estimators.ratios import cv_ratio_across, pooled_cv_ratio
from gradvar.estimators.spread import NEIGHBOURS
from gradvar.estimators.surplus import of_log_efficiency, of_log_rho
from gradvar.estimators.tails import PromptTails
from gradvar.estimators.token_covariance import share_estimate, share_sums
from gradvar.estimators.update_products import entropy_direction, length_direction, products, reward_direction
from gradvar.runs.records import Estimate, PromptScores

Array = NDArray[np.float64]

HERE, LIKE = "these prompts", "prompts like these"
LEVEL = 0.95
RATIO = "eta ratio "
PERMUTATIONS = 512
"""The default's: what the choice of permutations adds depends on it."""
MANY = 512
"""Responses from which on a quarter of them do: a permutation then holds many groups."""
REWARDED = [k for k, (rule, alpha) in enumerate(RULES) if rule != "vl_norm" or alpha in ALPHAS]
"""Rules whose rho, ratio and efficiency are tabled; alpha* uses all."""


def every_interval(
    laws: list[dict[str, Any]], n: int, seed: list[int], here: Truths, like: Truths | None, kinds: set[str]
) -> list[Found]:
    """Draw once and estimate everything in `kinds`, of those that `calibration.KINDS` names."""
    rng = np.random.default_rng(seed)
    prompts = simulate(laws, n, rng)
    makers: dict[str, Callable[[list[Simulated], np.random.Generator], Iterator[tuple[str, Estimate, Estimate | None]]]]
    makers = {"law": _law, "groups": _groups, "audit": _audit, "proxies": _proxies}
    found: list[Found] = []
    for kind, maker in makers.items():
        if kind not in kinds:
            continue
        for name, one, across in maker(prompts, rng):
            if name.startswith(RATIO):
                rule, _, best = name.removeprefix(RATIO).rpartition(" at ")
                for estimand, known, estimate in ((HERE, here, one), (LIKE, like or {}, across)):
                    if "eta grpo" in known and estimate is not None:
                        truth = eta_ratio_truth(known, rule, float(best))
                        found.append(found_of(f"{RATIO}{rule} over the best vl_norm", estimand, truth, estimate))
            if name in here:
                found.append(found_of(name, HERE, here[name], one))
            if across is not None and like is not None and name in like:
                found.append(found_of(name, LIKE, like[name], across))
    loud = [k for k, p in enumerate(prompts) if not is_silent(p.scores)]
    state = int(rng.integers(2**31))
    if "lines" in kinds and len(prompts) == 1 and loud:
        made = line_intervals(prompts[0].scores, bare(laws[0]), state)
        found += [found_of(name, HERE, truth, one) for name, truth, one in made]
    if "forms" in kinds:
        forms = form_intervals([prompts[k].scores for k in loud], [laws[k] for k in loud], state) if loud else ()
        found += [found_of(name, HERE, truth, one) for name, truth, one in forms]
    if "extras" in kinds and 3 * GROUP <= n < MANY and loud:  # at 512 a fifth of the table's time
        extras = extras_intervals([prompts[k].scores for k in loud], [bare(laws[k]) for k in loud], state)
        found += [found_of(name, HERE, truth, one) for name, truth, one in extras]
    return found


Made = Iterator[tuple[str, Estimate, Estimate | None]]


def _law(prompts: list[Simulated], rng: np.random.Generator) -> Made:
    state = int(rng.integers(2**31))
    for kind in ("score", "grpo"):
        # A prompt whose rewards are all equal has no advantage-weighted gradient: it is left out, as in the table.
        used = [p.scores for p in prompts if kind == "score" or not is_silent(p.scores)]
        if not used:
            none = _nothing()
            yield f"deviation exponent, {kind}", none, none
            yield f"within exponent, {kind}", none, none
            continue
        samples = [
            sample_of(s, np.ones(len(s.lengths), dtype=bool), kind, seed=state, neighbours=NEIGHBOURS, left_out=0)
            for s in used
        ]
        for what in ("deviation", "within"):
            yield f"{what} exponent, {kind}", *_exponents(samples, what)


def _exponents(samples: list[Sample], what: str) -> tuple[Estimate, Estimate]:
    fit = fit_samples(samples, what, margin=0.25, level=LEVEL, full=False)
    return fit.exponent, fit.exponent_across


def _groups(prompts: list[Simulated], rng: np.random.Generator) -> Made:
    n = len(prompts[0].scores.lengths)
    loud = [p for p in prompts if not is_silent(p.scores)]
    used = [p.scores for p in loud]
    if not used or n < 2 * GROUP:
        return
    drawn = [draw_groups(n, GROUP, _permutations(n), rng=rng) for _ in used]
    c = [_coefficients(s, g) for s, g in zip(used, drawn, strict=True)]
    kinds = [
        moments_of_kinds(s.gram, Layout(groups=g, kinds=one[REWARDED], n_responses=n))
        for s, g, one in zip(used, drawn, c, strict=True)
    ]
    moments: dict[int, list[GroupMoments]] = {k: [one[i] for one in kinds] for i, k in enumerate(REWARDED)}
    variants = [(find_rule(rule), alpha) for rule, alpha in RULES]
    described = [_tails(s) for s in used]
    tails = {k: [prompt.alone(variants[k]) for prompt in described] for k in REWARDED}
    alone: dict[str, Any] = {"group_size": 1, "level": LEVEL}
    for k in REWARDED:
        name = label(*RULES[k])
        here, like = pooled_rho(moments[k], group_size=GROUP, level=LEVEL, tails=tails[k])
        yield f"rho {name}", here, like
        yield f"cv {name}", cv_from_rho(here), cv_from_rho(like)
        if k == 0:
            cv = cv_from_rho(here)
            squares = {end: GROUP * getattr(cv, end) ** 2 for end in ("value", "low", "high")}
            yield "noise scale grpo", replace(cv, **squares), None
            own = [cv_from_rho(one) for one in pooled_rho([noise_moments(s.gram, s.rewards) for s in used], **alone)]
            squared = [replace(one, value=one.value**2, low=one.low**2, high=one.high**2) for one in own]
            yield "noise scale of the gradient", squared[0], squared[1]
        else:
            both = [prompt.beside(variants[k], variants[0]) for prompt in described]
            ratio = pooled_cv_ratio(moments[k], moments[0], group_size=GROUP, level=LEVEL, tails=both)
            across = (
                cv_ratio_across(moments[k], moments[0], ratio, level=LEVEL) if len(used) >= MINIMUM_PROMPTS else None
            )
            yield f"cv ratio {name}/grpo", ratio, across
    yield from _sizes(used, rng)
    if n < 3 * GROUP:
        return
    pool = [
        products(
            p.scores.gram,
            Layout(
                groups=g,
                kinds=np.stack(
                    [
                        *one,
                        reward_direction(p.scores.rewards, g),
                        length_direction(p.scores.lengths, g),
                        entropy_direction(p.log_probs, g),
                    ]
                ),
                n_responses=n,
            ),
            3,
        )
        for p, g, one in zip(loud, drawn, c, strict=True)
    ]
    noise, angle = jackknifed(pool, log_noise), jackknifed(pool, cosine)
    others: dict[str, Statistic] = {
        "scale": scale,
        "length product": inner_product(1),
        "length pressure": pressure(1),
        "entropy pressure": pressure(2),
    }
    made = {what: jackknifed(pool, statistic) for what, statistic in others.items()}
    known = what_is_known(pool, level=LEVEL)
    several = len(used) >= MINIMUM_PROMPTS
    of_prompts: list[Jackknifed] = []
    if several:
        of_prompts = [jackknifed(pool, statistic, across=True) for statistic in (log_noise, cosine, *others.values())]
        sure = what_is_known(pool, level=LEVEL, across=True)
    for k in REWARDED:
        name = label(*RULES[k])
        turning = [prompt.angle(variants[k]) for prompt in described]
        eta = eta_estimate(pool, noise, k, level=LEVEL, method="", tails=tails[k], known=known.direction)
        alike: list[Estimate | None] = [None] * (2 + len(others))
        if of_prompts:
            noise_like, angle_like, *others_like = of_prompts
            spoken: dict[str, Any] = {"level": LEVEL, "method": "", "across": True}
            alike = [
                eta_estimate(pool, noise_like, k, tails=tails[k], known=sure.direction, **spoken),
                cosine_estimate(pool, angle_like, k, tails=turning, known=sure, **spoken),
                *(estimate_of(other, k, level=LEVEL, method="") for other in others_like),
            ]
        yield f"eta {name}", eta, alike[0]
        cosine_here = cosine_estimate(pool, angle, k, level=LEVEL, method="", tails=turning, known=known)
        yield f"cosine {name}", cosine_here, alike[1]
        for what, likewise in zip(made, alike[2:], strict=True):
            yield f"{what} {name}", estimate_of(made[what], k, level=LEVEL, method=""), likewise
    pairs = np.sum([_pairs(*one) for one in zip(used, drawn, c, strict=True)], axis=0)
    grid = np.append(np.arange(3, len(RULES)), len(RULES) + np.arange(3, len(RULES)))
    curve = [p.of_updates(slice(3, None)) for p in pool]
    for what, statistic, part in (("eta", log_efficiency, of_log_efficiency), ("cv", log_rho, of_log_rho)):
        with np.errstate(all="ignore"):
            twice = part(curve, pairs[np.ix_(grid, grid)], GROUP)
            every = of_log_efficiency(pool, pairs, GROUP)
        star = best_of_curve(jackknifed(curve, statistic), GRID, level=LEVEL, method="", pairs=twice, tails=described)
        over_prompts = None
        if several:
            of_curve = jackknifed(curve, statistic, across=True)
            over_prompts = best_of_curve(of_curve, GRID, level=LEVEL, method="", pairs=twice, tails=described)
        yield f"alpha* by {what}", star, over_prompts
        if what == "eta" and math.isfinite(star.value):
            best = find_rule("vl_norm"), star.value
            ends = [[prompt.beside(variant, best) for prompt in described] for variant in variants]
            spoken = {"level": LEVEL, "method": ""}
            ratios = eta_ratios(pool, GRID, star.value, across=False, pairs=every, tails=ends, **spoken)
            over: list[Estimate | None] = [None] * len(ratios)
            if several:
                over = [*eta_ratios(pool, GRID, star.value, across=True, pairs=every, tails=ends, **spoken)]
            for k in REWARDED:
                yield f"{RATIO}{label(*RULES[k])} at {star.value}", ratios[k], over[k]


def _permutations(n: int) -> int:
    return PERMUTATIONS if n < MANY else PERMUTATIONS // 4


def _pairs(s: PromptScores, groups: NDArray[np.intp], updates: Array) -> Array:
    made = np.concatenate([updates, reward_direction(s.rewards, groups)[None]])
    means = mean_coefficients(groups, made, len(s.lengths))
    return pair_covariance(s.gram, means[:-1], means[-1])


def _tails(s: PromptScores) -> PromptTails:
    return PromptTails.of(s.gram, s.rewards, s.lengths, advantage="grpo", max_length=LONGEST)


def _coefficients(s: PromptScores, groups: NDArray[np.intp]) -> Array:
    return np.stack(
        [
            group_coefficients(
                groups, s.rewards, s.lengths, find_rule(rule), advantage="grpo", alpha=alpha, max_length=LONGEST
            )
            for rule, alpha in RULES
        ]
    )


def _sizes(used: list[PromptScores], rng: np.random.Generator) -> Made:
    """Planning: other group sizes, and beyond a third of the responses by extrapolation."""
    n = len(used[0].lengths)
    estimated: dict[int, Estimate] = {}
    for size, far in ((4, None), (16, 32)):
        if n < 3 * size:
            continue
        parts = []
        for s in used:
            groups = draw_groups(n, size, _permutations(n), rng=rng)
            made = group_coefficients(
                groups, s.rewards, s.lengths, find_rule("grpo"), advantage="grpo", max_length=LONGEST
            )
            parts.append(group_moments(s.gram, groups, made))
        here, like = pooled_rho(
            parts, group_size=size, level=LEVEL, tails=[_tails(s).alone((find_rule("grpo"), None)) for s in used]
        )
        estimated[size] = cv_from_rho(here)
        yield f"planning: cv at n = {size}", estimated[size], cv_from_rho(like)
        if far is not None:
            yield f"planning: cv at n = {far}, extrapolated", extrapolated_cv(estimated, far), None


def _audit(prompts: list[Simulated], rng: np.random.Generator) -> Made:
    check = identity_from_parts(
        [identity_parts(p.scores.gram, rng=rng) for p in prompts], group_size=GROUP, margin=0.1, level=LEVEL
    )
    yield "assumption 0: identity", check.signal, None
    yield "assumption 0: p value", check.p_value, None
    shares = [
        share_sums(np.diagonal(p.scores.gram), p.taus, p.scores.lengths, p.scores.rewards)["all responses"][0]
        for p in prompts
    ]
    yield "assumption 1: token share", share_estimate(shares, margin=0.1, level=LEVEL)[0], None
    used = [p.scores for p in prompts if not is_silent(p.scores)]
    if used and len(used[0].lengths) >= 3 * GROUP:
        sums = [
            Baselines.of(
                draw_groups(len(s.lengths), GROUP, _permutations(len(s.lengths)), rng=rng),
                s.rewards,
                s.lengths,
                find_rule("grpo"),
                advantage="grpo",
            ).sums(s.gram)
            for s in used
        ]
        arguments: dict[str, Any] = {"level": LEVEL, "method": "", "back": lambda x: math.exp(min(x, 700.0))}
        yield (
            "assumption 3: baseline ratio",
            of_these_prompts(sums, log_independence_ratio, **arguments),
            of_prompts_like_these(sums, log_independence_ratio, **arguments),
        )
    if used:
        signals = [
            bin_products(s.gram, s.rewards, s.lengths, length_bins(s.lengths), advantage="grpo").signals() for s in used
        ]
        pair = [ratio_of_signals(signals, margin=0.25, level=LEVEL, method="", across=x)[0] for x in (False, True)]
        yield "assumption 4: between lengths", pair[0], pair[1]


def _proxies(prompts: list[Simulated], rng: np.random.Generator) -> Made:
    used = [p for p in prompts if not is_silent(p.scores)]
    names = {
        "rank_correlation": "rank correlation",
        "explained_variance": "R^2",
        "explained_variance_log": "R^2 of logs",
    }
    given = {"entropy": {p.scores.prompt_id: p.entropies for p in used}}
    made = [prompt_pairs(p.scores, "grpo", given, seed=0) for p in used]
    for proxy in ("length", "advantage_square_length", "entropy", "advantage_square_entropy"):
        pool: list[Pair] = [one.pair(proxy, "norm_square") for one in made]
        for quantity, estimate, _ in predictions(pool, level=LEVEL) if pool else ():
            yield f"proxy {proxy}: {names[quantity]}", estimate, None


def _nothing() -> Estimate:
    nan = math.nan
    return Estimate(value=nan, low=nan, high=nan, level=LEVEL, method="silent", n=0, clusters=0, seed=None)
