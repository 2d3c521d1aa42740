"""DAPO's extras with and without: overlong filtering, soft overlong punishment, dynamic sampling.

Each is set beside the plain update on the same permutations, so ratios and differences are paired. The reference of
bias stays grad J of the plain reward: a punished reward is another objective, and how far that turns the update is what
is asked. A prompt with equal rewards has no plain update, and counts with zeros as it does elsewhere; punishment can
give it one, all of it bias. Under dynamic sampling E[ghat | loud] = E[ghat 1(loud)] / P(loud): with a baseline a silent
group's update is 0 and a prompt's direction stays, without ("raw") it is turned; over several prompts it is turned as
well, for each counts 1 / P(loud) times. Shape letters: N responses, n of a group, B groups, P permutations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from gradvar.estimators.advantages import advantages, check_advantage
from gradvar.estimators.aggregation import Rule, expand_rules
from gradvar.estimators.bias import cosine, estimate_of, gated, jackknifed, what_is_known
from gradvar.estimators.carrying import few_that_carry
from gradvar.estimators.cosines import cosine_estimate
from gradvar.estimators.cv import UNRESOLVED, cv_from_rho, pooled_rho, resolution
from gradvar.estimators.few_affected import (
    FewAffected,
    enough_affected,
    ratio_of_loud,
    share_of_responses,
    turn_of_further,
)
from gradvar.estimators.group_products import Layout
from gradvar.estimators.groups import (
    PERMUTATIONS,
    GroupMoments,
    draw_groups,
    group_coefficients,
    loud_groups,
    moments_of_kinds,
)
from gradvar.estimators.inputs import arrange, generator, why_nothing
from gradvar.estimators.intervals import THESE_PROMPTS, check_level
from gradvar.estimators.ratios import pooled_cv_ratio
from gradvar.estimators.silent_shares import silent_estimate
from gradvar.estimators.tails import LengthTails, PromptTails
from gradvar.estimators.transforms import soft_overlong
from gradvar.estimators.update_products import Products, moments_of_updates, products, reward_direction
from gradvar.runs.records import Estimate, PromptScores, TableRow, estimate_table, no_estimate

Array = NDArray[np.float64]
Variant = tuple[Rule, float | None]

NONE = "none"
FILTERING = "overlong filtering"
PUNISHMENT = "soft overlong punishment"
SAMPLING = "dynamic sampling"
ORDER = (FILTERING, PUNISHMENT, NONE, SAMPLING)
"""Of a prompt's kinds of update."""
ROUNDING = 1e-9
"""What may be left of a difference between equal directions."""
BUFFER_SHARE = 0.2
"""DAPO's punishment interval over its maximum length: 4096 of 20480 tokens."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Prompt:
    """One prompt, target and rule: moments and inner products of the update with each extra."""

    moments: dict[str, GroupMoments]
    """By extra; without dynamic sampling where no group is loud."""
    turned: Products
    """In `ORDER`, without dynamic sampling where that has no moments."""
    turning: LengthTails
    """Of the cosines."""
    tails: dict[str, LengthTails]
    affected: dict[str, FewAffected]
    """Of filtering and punishment."""
    silent: Estimate
    """Share of groups whose rewards are equal."""
    still: bool
    """Whether such a group's update is 0."""
    nothing: str | None
    """The verdict where the plain update is 0."""


def extras_table(
    groups: Sequence[PromptScores],
    *,
    rules: Sequence[str] = ("grpo", "dapo"),
    alphas: Sequence[float] = (1.0,),
    group_size: int = 8,
    advantage: str = "grpo",
    buffer: float | None = None,
    level: float = 0.95,
    permutations: int = PERMUTATIONS,
    seed: int,
) -> pd.DataFrame:
    """CV and direction of an update with each of DAPO's extras, beside the plain one (column `extra`).

    Quantities, for every target, per prompt and over these prompts:
        "cv"                  total CV; `extra` "none", "overlong filtering" (truncated responses carry no loss, their
                              reward stays in the baseline), "soft overlong punishment" (added to the reward) or
                              "dynamic sampling" (given that a group's rewards differ)
        "cv_ratio"            over the plain update's, paired; verdict "lower", "higher", "undetermined", "unresolved"
        "cosine"              of E ghat with grad J of the plain reward
        "cosine_difference"   to the plain update's, paired; verdict likewise
        "affected"            share of responses (of groups, for dynamic sampling) that the extra changes
    Where filtering or punishment changes fewer than 3 responses, ratio and difference have no interval; nor where
    filtering leaves out none of the few that carry the noise (`carrying.few_that_carry`).

    Args:
        groups: Prompts by targets; several targets get their sum as well.
        rules: Names for `aggregation_weights`.
        alphas: Exponents for rules that take one.
        group_size: n, responses of one update.
        advantage: Kind of `advantages`, computed inside each group.
        buffer: Length of the punishment interval in tokens; None takes a fifth of the maximum length, as DAPO does.
        level: Nominal coverage.
        permutations: Random permutations a prompt.
        seed: Of the permutations.

    Returns:
        The table. A prompt whose plain update is 0 ("silent", "no gradient") gets one "cv" row that says so and, where
        punishment gives it an update, that one's CV; it counts in pooled rows with its zeros, under dynamic sampling
        not at all. One with fewer than 3 group_size verified responses gets such a row and does not count.

    Raises:
        GradvarError: Unknown rule or advantage, no alpha for a rule that takes one, or a buffer that does not fit.
    """
    check_level(level)
    check_advantage(advantage)
    variants = expand_rules(rules, alphas)
    targets = arrange(groups)
    rows: list[TableRow] = []
    found: dict[tuple[str, Variant], dict[str, _Prompt]] = {
        (target, variant): {} for target in targets for variant in variants
    }
    everyone = {name: scores for prompts in targets.values() for name, scores in prompts.items()}
    for name, raw in everyone.items():
        scores = raw.verified()
        n = len(scores.lengths)
        common: dict[str, Any] = {"prompt_id": name, "advantage": advantage, "group_size": group_size}
        large = n >= 3 * group_size
        for target, prompts in targets.items():
            why = why_nothing(prompts[name], advantage) if name in prompts else None
            verdict = why or UNRESOLVED
            if name in prompts and (why is not None or not large):
                why = why or f"fewer than {3 * group_size} verified responses"
                none = no_estimate(f"not estimated; {why}", n=n, level=level, seed=seed)
                told = {"extra": None, "estimand": THESE_PROMPTS}
                rows.append(
                    TableRow(quantity="cv", estimate=none, target=target, verdict=verdict, extra=told, **common)
                )
        if not large:
            continue
        limit = float(scores.max_length) if scores.max_length > 0 else float(scores.lengths.max())
        interval = BUFFER_SHARE * limit if buffer is None else buffer
        punished = soft_overlong(scores, buffer=interval, max_length=limit)
        drawn = draw_groups(n, group_size, permutations, rng=generator(seed, name, "groups"))
        silent = silent_estimate(scores.rewards, group_size, level=level, seed=seed)
        affected = {SAMPLING: silent}
        for extra, changed in ((FILTERING, scores.truncated), (PUNISHMENT, punished.rewards < scores.rewards)):
            affected[extra] = share_of_responses(changed, level=level, seed=seed)
        mine = {target: prompts[name].verified() for target, prompts in targets.items() if name in prompts}
        for target in mine:
            rows += [
                TableRow(
                    quantity="affected",
                    estimate=share,
                    target=target,
                    extra={"extra": extra, "estimand": THESE_PROMPTS},
                    **common,
                )
                for extra, share in affected.items()
            ]
        for variant in variants:
            made = _Drawn.of(scores, punished.rewards, drawn, variant, advantage, limit, silent)
            for target, one in mine.items():
                found[target, variant][name] = _prompt(one, made)
    for (target, (rule, alpha)), prompts_of_rule in found.items():
        pools: list[tuple[str | None, list[_Prompt]]] = [(name, [one]) for name, one in prompts_of_rule.items()]
        if len(prompts_of_rule) > 1:
            pools.append((None, list(prompts_of_rule.values())))
        for label, pool in pools:
            rows += [
                replace(
                    row,
                    estimate=replace(row.estimate, seed=seed),
                    target=target,
                    prompt_id=label,
                    rule=rule.name,
                    alpha=alpha,
                    advantage=advantage,
                    scope="prompt group",
                    group_size=group_size,
                )
                for row in _rows_of_pool(pool, group_size, level)
            ]
    return estimate_table(rows)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Drawn:
    """One prompt's updates of one rule on its groups, the same for all targets."""

    layout: Layout
    """With the updates of `ORDER` and grad J."""
    loud: tuple[Layout, NDArray[np.bool_]] | None
    """The plain update in the groups that dynamic sampling keeps, (P, B) which; None: all are silent."""
    variant: Variant
    punished: Array
    """(N,) rewards."""
    advantage: str
    limit: float
    """M in tokens."""
    few: NDArray[np.bool_] | None
    """(N,) `few_that_carry`; nobody where every A is 0."""
    silent: Estimate

    @classmethod
    def of(
        cls,
        scores: PromptScores,
        punished: Array,
        drawn: NDArray[np.intp],
        variant: Variant,
        advantage: str,
        limit: float,
        silent: Estimate,
    ) -> _Drawn:
        """From the groups (P, B, n)."""
        rule, alpha = variant
        options: dict[str, Any] = {"advantage": advantage, "alpha": alpha, "max_length": limit}
        plain = group_coefficients(drawn, scores.rewards, scores.lengths, rule, **options)
        filtered = group_coefficients(drawn, scores.rewards, scores.lengths, rule, masked=scores.truncated, **options)
        kinds = [filtered, group_coefficients(drawn, punished, scores.lengths, rule, **options), plain]
        loud, n = None, len(scores.lengths)
        if silent.value < 1.0:
            kept = loud_groups(drawn, scores.rewards)
            inside = plain * kept[..., None]
            loud = Layout(groups=drawn, kinds=inside[None], n_responses=n), kept
            kinds.append(inside / (1.0 - silent.value))
        kinds.append(reward_direction(scores.rewards, drawn))
        factors = advantages(scores.rewards, advantage, lengths=scores.lengths)
        return cls(
            layout=Layout(groups=drawn, kinds=np.stack(kinds), n_responses=n),
            loud=loud,
            variant=variant,
            punished=punished,
            advantage=advantage,
            limit=limit,
            few=few_that_carry(factors) if factors.any() else factors != 0.0,
            silent=silent,
        )


def _prompt(scores: PromptScores, drawn: _Drawn) -> _Prompt:
    described, less = (
        PromptTails.of(scores.gram, rewards, scores.lengths, advantage=drawn.advantage, max_length=drawn.limit)
        for rewards in (scores.rewards, drawn.punished)
    )
    as_is = described.alone(drawn.variant)
    turned = products(scores.gram, drawn.layout, 1)
    moments = dict(zip(ORDER[:3], moments_of_updates(scores.gram, drawn.layout, turned, 3), strict=True))
    still = True
    if drawn.loud is not None:
        layout, kept = drawn.loud
        moments[SAMPLING] = moments_of_kinds(scores.gram, layout, kept)[0]
        still = moments[SAMPLING].same * float(kept.mean()) >= (1.0 - ROUNDING) * moments[NONE].same
    return _Prompt(
        tails={NONE: as_is, FILTERING: as_is, PUNISHMENT: less.alone(drawn.variant), SAMPLING: as_is},
        affected={
            FILTERING: FewAffected(rows=scores.truncated, either_way=True, carrying=drawn.few),
            PUNISHMENT: FewAffected(rows=drawn.punished < scores.rewards),
        },
        silent=drawn.silent,
        still=still,
        moments=moments,
        turning=described.angle(drawn.variant),
        turned=turned,
        nothing=why_nothing(scores, drawn.advantage),
    )


def _rows_of_pool(pool: Sequence[_Prompt], group_size: int, level: float) -> list[TableRow]:
    rows: list[TableRow] = []
    awake = any(one.nothing is None for one in pool)
    for extra in (NONE, FILTERING, PUNISHMENT, SAMPLING):
        held = [one for one in pool if extra in one.moments]
        mine = [one.moments[extra] for one in held]
        if not held or not (awake or any(one.same > 0.0 for one in mine)):
            continue  # said in one row of the prompt
        tails = [one.tails[extra] for one in held]
        rho = pooled_rho(mine, group_size=group_size, level=level, tails=tails)[0]
        rows.append(_row("cv", cv_from_rho(rho), extra, resolution(rho)))
        if extra != NONE and awake:
            beside = [one.moments[NONE] for one in held]
            if extra == SAMPLING:
                shares, still = [one.silent for one in held], all(one.still for one in held)
                ratio = ratio_of_loud(beside, mine, shares, group_size=group_size, level=level, still=still)
            else:
                few = [one.affected[extra] for one in held]
                ratio = pooled_cv_ratio(mine, beside, group_size=group_size, level=level, tails=few)
                ratio = enough_affected(few, ratio)
            rows.append(_row("cv_ratio", ratio, extra, _side(ratio, 1.0)))
    if not awake:
        return rows
    for extras in ((FILTERING, PUNISHMENT, NONE), (NONE, SAMPLING)):
        held = [one for one in pool if set(extras) <= set(one.moments)]
        if held:
            rows += _rows_of_direction(held, extras, level)
    return rows


def _rows_of_direction(pool: Sequence[_Prompt], extras: Sequence[str], level: float) -> list[TableRow]:
    """Return cosines, and differences to the plain update's, of extras that stand side by side in `ORDER`."""
    method = "permutation groups, delete-one jackknife, t"
    first, plain = ORDER.index(extras[0]), extras.index(NONE)
    parts = [one.turned.of_updates(slice(first, first + len(extras))) for one in pool]
    angles, known = jackknifed(parts, cosine), what_is_known(parts, level=level)
    turning = [one.turning for one in pool]
    change = replace(
        angles,
        value=angles.value - angles.value[plain],
        replicates=[replicate - replicate[:, plain : plain + 1] for replicate in angles.replicates],
        surplus=None,
        own=None,
    )
    rows: list[TableRow] = []
    cosines = [
        cosine_estimate(parts, angles, k, level=level, method=method, tails=turning, known=known)
        for k in range(len(extras))
    ]
    for k, (extra, angle) in enumerate(zip(extras, cosines, strict=True)):
        if extra == NONE and len(extras) == 2:
            continue  # of all prompts, with the other two
        rows.append(_row("cosine", angle, extra, None))
        if extra != NONE:
            few = [one.affected[extra] for one in pool] if extra != SAMPLING else None
            # What filtering leaves out hardly turns the update: its difference is covered 100% without further ones.
            tails = few if extra == PUNISHMENT else None
            turned = estimate_of(change, k, level=level, method=f"paired difference; {method}", tails=tails)
            if max(abs(turned.low), abs(turned.high)) < ROUNDING:
                turned = replace(turned, value=0.0, low=0.0, high=0.0)
            if few is not None:
                further = turn_of_further(few, angles, k, plain) if extra == PUNISHMENT else 0.0
                turned = enough_affected(few, _at_least_mover(turned, angle, cosines[plain], further))
            turned = gated(turned, known.direction and bool(known.updates[k] and known.updates[plain]))
            rows.append(_row("cosine_difference", turned, extra, _side(turned, 0.0)))
    return rows


def _at_least_mover(turned: Estimate, angle: Estimate, plain: Estimate, further: float) -> Estimate:
    """A difference of cosines that reaches as far down as the two cosines' own do (MOVER), and `further`.

    A cosine near 1 goes with the square of the angle: where the angle happens to be small its slope, and with it a
    jackknife's error, vanishes (grpo's of -0.009 were covered 87 to 93% at N = 128, with this 95%).
    """
    down = turned.value - math.hypot(angle.value - angle.low, plain.high - plain.value) - further
    return replace(turned, low=min(turned.low, down)) if math.isfinite(down) else turned


def _side(estimate: Estimate, same: float) -> str:
    if math.isnan(estimate.value):
        return UNRESOLVED
    rounding = 1e-9  # an extra that changes nothing leaves some
    return (
        "higher" if estimate.low > same + rounding else "lower" if estimate.high < same - rounding else "undetermined"
    )


def _row(quantity: str, estimate: Estimate, extra: str, verdict: str | None) -> TableRow:
    told = {"extra": extra, "estimand": THESE_PROMPTS}
    return TableRow(quantity=quantity, estimate=estimate, target="", verdict=verdict, extra=told)
