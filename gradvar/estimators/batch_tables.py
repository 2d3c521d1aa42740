"""The table `batches`: the update of a batch of prompts, rule by rule and scope by scope.

Quantities, for every target, rule, scope and number of prompts B of a batch (column batch_prompts):
    rho, cv              of the whole update, prompts and responses drawn again; verdict "resolved", "unresolved",
                         "silent: all rewards equal" or "no gradient: all are 0"
    rho_given_prompts, cv_given_prompts    of the update around its mean on the batch's own prompts, responses alone
                         drawn again: the mean over batches of such prompts
    between_share        part of the variance that lies between prompts
    intra_variance, between_variance, squared_signal    in the rule's own units
    scope_ratio          CV weighted over the whole batch over CV weighted inside prompt groups
    cv_ratio             CV over the reference rule's at the same scope
Every interval is a delete-one-prompt jackknife, so the estimand of every row is "prompts like these".
Scope is "batch", "prompt group", or "either" where the rule's weights differ by a constant only. Further columns:
    prompts_needed       prompts that would resolve the CV; a lower bound only where prompts_needed_at_least is true, as
                         rho is not positive
    sketch_error         standard error of the value that the sketch makes; it is inside the interval; 0 where exact
    products             "exact" or "sketch of d"
    extrapolated         whether B exceeds K / 3, so that no batches of that size were formed
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from gradvar.errors import GradvarError
from gradvar.estimators.advantages import advantages, check_advantage
from gradvar.estimators.aggregation import Rule, expand_rules
from gradvar.estimators.batch_estimates import (
    METHOD,
    Statistic,
    between_share,
    between_variance,
    given_rho,
    intra_variance,
    log_cv_ratio,
    plain_estimate,
    ratio_estimate,
    rho_interval,
    spread,
    squared_signal,
    total_rho,
)
from gradvar.estimators.batches import (
    BatchMoments,
    ScopedParts,
    depends_on_scope,
    group_scales,
    mean_weights,
    prompt_parts,
    scoped_parts,
)
from gradvar.estimators.cross_products import CrossProducts
from gradvar.estimators.cv import NO_GRADIENT, SILENT, UNRESOLVED, Needed, cv_from_rho, n_to_resolve, resolution
from gradvar.estimators.formed_batches import formed_moments
from gradvar.estimators.groups import draw_groups, group_coefficients
from gradvar.estimators.inputs import generator, has_gradient
from gradvar.estimators.intervals import MINIMUM_PROMPTS, PROMPTS_LIKE_THESE, check_level
from gradvar.runs.records import Estimate, PromptScores, TableRow, estimate_table, no_estimate

Array = NDArray[np.float64]

BATCH, GROUP, EITHER = "batch", "prompt group", "either"
PERMUTATIONS, FORMED_PERMUTATIONS, FORMED_GROUPS = 128, 32, 4
"""P of products within prompts; P and M of formed batches, whose cost grows with M squared."""


@dataclass(frozen=True, kw_only=True)
class _Study:
    """One target's prompts, ready, with the labels of its rows."""

    target: str
    prompts: list[PromptScores]
    products: CrossProducts
    drawn: Mapping[str, NDArray[np.intp]]
    advantage: str
    group_size: int
    sizes: tuple[int, ...]
    max_length: float
    level: float
    seed: int
    left_out: int
    source: str

    def none(self, method: str = METHOD) -> Estimate:
        """Return the estimate with nothing in it."""
        if len(self.prompts) < MINIMUM_PROMPTS:
            method = f"{method}; no interval below {MINIMUM_PROMPTS} prompts"
        n = sum(len(p.lengths) for p in self.prompts)
        return no_estimate(method, n=n, clusters=len(self.prompts), level=self.level, seed=self.seed)

    @property
    def nothing(self) -> str:
        """The verdict where every update is 0."""
        return SILENT if any(has_gradient(p) for p in self.prompts) else NO_GRADIENT

    def coefficients(self, rule: Rule, alpha: float | None) -> dict[str, Array]:
        """Return (P, M, n) coefficients by prompt, weights inside the group."""
        return {
            p.prompt_id: group_coefficients(
                self.drawn[p.prompt_id],
                _rewards(p, self.advantage),
                p.lengths,
                rule,
                advantage=self.advantage,
                alpha=alpha,
                max_length=self.max_length,
            )
            for p in self.prompts
        }

    def large(self, rule: Rule, alpha: float | None) -> ScopedParts:
        """Return the parts of batches too large to form."""
        options: dict[str, Any] = {"alpha": alpha, "max_length": self.max_length}
        weights = mean_weights(self.prompts, rule, self.group_size, **options)
        scales = group_scales(self.prompts, self.drawn, weights, rule, **options)
        coefficients = {}
        for p in self.prompts:
            rows = self.drawn[p.prompt_id]
            factors = advantages(_rewards(p, self.advantage)[rows], self.advantage, lengths=p.lengths[rows])
            coefficients[p.prompt_id] = weights[p.prompt_id][rows] * factors
        return scoped_parts(self.prompts, self.products, self.drawn, coefficients, scales)


_Batches = dict[tuple[str, int], tuple[BatchMoments, bool]]
"""By scope and B: the moments, and whether they are extrapolated."""


def batch_table(
    groups: Sequence[PromptScores],
    products: Mapping[str, CrossProducts],
    *,
    rules: Sequence[str] = ("grpo", "dapo", "dr_grpo", "vl_norm"),
    alphas: Sequence[float] = (0.5, 0.75, 1.0, 2.0),
    group_size: int = 8,
    batch_prompts: Sequence[int] = (8, 128),
    advantage: str = "grpo",
    reference: str = "grpo",
    level: float = 0.95,
    permutations: int = PERMUTATIONS,
    seed: int,
) -> pd.DataFrame:
    """Estimate the update of batches of several prompts: see the module for the rows.

    Args:
        groups: Prompts by targets; those of targets without products are left out.
        products: Inner products between prompts' responses by target, rows in the order of `groups`.
        rules: Names for `aggregation_weights`.
        alphas: Exponents for rules that take one.
        group_size: n, responses to each prompt.
        batch_prompts: B, prompts of a batch.
        advantage: Kind of `advantages`, computed inside each group of n.
        reference: Rule the ratios are taken against (its first alpha where it takes one).
        level: Nominal coverage.
        permutations: Random permutations of each prompt's responses.
        seed: Of all permutations.

    Raises:
        GradvarError: Unknown rule, advantage or alpha, a batch without a prompt, or fewer than 2 prompts with two
            groups of verified responses.
    """
    check_level(level)
    check_advantage(advantage)
    variants, compared = expand_rules(rules, alphas), expand_rules([reference], alphas)[0]
    sizes = tuple(dict.fromkeys(int(size) for size in batch_prompts))
    if not sizes or min(sizes) < 1:
        raise GradvarError(f"prompts of a batch: expected at least 1, received {list(batch_prompts)}")
    rows: list[TableRow] = []
    for target in dict.fromkeys(scores.target for scores in groups if scores.target in products):
        study = _study(
            [scores for scores in groups if scores.target == target],
            products[target],
            advantage=advantage,
            group_size=group_size,
            sizes=sizes,
            permutations=permutations,
            level=level,
            seed=seed,
        )
        everything = {variant: _batches(study, *variant) for variant in dict.fromkeys([*variants, compared])}
        for variant in variants:
            rows += _rows(study, variant, everything[variant], everything[compared], compared)
    return estimate_table(rows)


def _study(
    prompts: Sequence[PromptScores],
    products: CrossProducts,
    *,
    advantage: str,
    group_size: int,
    permutations: int,
    seed: int,
    **labels: Any,
) -> _Study:
    keep = {
        p.prompt_id: np.arange(len(p.lengths)) if advantage == "score" else np.flatnonzero(~np.isnan(p.rewards))
        for p in prompts
    }
    keep = {name: rows for name, rows in keep.items() if len(rows) >= 2 * group_size}
    if len(keep) < 2:
        raise GradvarError(
            f"batches need at least 2 prompts with {2 * group_size} verified responses each (two disjoint groups of "
            f"{group_size}), {len(keep)} of {len(prompts)} have that: sample more, or ask for a smaller group"
        )
    usable = [p.select(keep[p.prompt_id]) for p in prompts if p.prompt_id in keep]
    return _Study(
        target=prompts[0].target,
        prompts=usable,
        products=products.select(keep),
        drawn={
            p.prompt_id: draw_groups(
                len(p.lengths), group_size, permutations, rng=generator(seed, p.prompt_id, "batches")
            )
            for p in usable
        },
        advantage=advantage,
        group_size=group_size,
        max_length=float(max([p.max_length for p in usable] + [p.lengths.max() for p in usable])),
        seed=seed,
        left_out=sum(len(p.lengths) for p in prompts) - sum(len(p.lengths) for p in usable),
        source=products.source,
        **labels,
    )


def _rewards(scores: PromptScores, advantage: str) -> Array:
    return np.zeros(len(scores.lengths)) if advantage == "score" else scores.rewards


def _batches(study: _Study, rule: Rule, alpha: float | None) -> _Batches:
    coefficients = study.coefficients(rule, alpha)
    parts = prompt_parts(study.prompts, study.products, study.drawn, coefficients)
    if not depends_on_scope(rule, alpha):
        return {(EITHER, size): (parts.batch(size), False) for size in study.sizes}
    found = {(GROUP, size): (parts.batch(size), False) for size in study.sizes}
    formed = [size for size in study.sizes if size > 1 and 3 * size <= len(study.prompts)]
    larger = [size for size in study.sizes if 3 * size > len(study.prompts)]
    if formed:
        rounds = min(FORMED_PERMUTATIONS, max(4, 1024 // len(study.prompts)))
        first = {name: rows[:rounds, :FORMED_GROUPS] for name, rows in study.drawn.items()}
        moments = formed_moments(
            study.prompts,
            study.products,
            first,
            coefficients,
            rule,
            formed,
            alpha=alpha,
            max_length=study.max_length,
            rng=generator(study.seed, study.target, "batches of prompts"),
        )
        found.update({(BATCH, size): (one, False) for size, one in moments.items()})
    if 1 in study.sizes:
        found[BATCH, 1] = found[GROUP, 1]
    if larger:
        whole = study.large(rule, alpha)
        found.update({(BATCH, size): (whole.batch(size), True) for size in larger if size > 1})
    return found


def _rows(
    study: _Study,
    variant: tuple[Rule, float | None],
    batches: _Batches,
    references: _Batches,
    compared: tuple[Rule, float | None],
) -> list[TableRow]:
    rows = []
    silent = not any(moments.power.mean() > 0.0 for moments, _ in batches.values())
    for (scope, size), (moments, extrapolated) in batches.items():
        add = _Adder(study=study, variant=variant, scope=scope, size=size, extrapolated=extrapolated)
        if silent:
            none = replace(study.none(), method=f"{METHOD}; {study.nothing}")
            rows.append(add.row("cv", none, 0.0, verdict=study.nothing))
            continue
        for suffix, statistic in (("", total_rho), ("_given_prompts", given_rho)):
            found = spread(statistic, moments)
            rho = rho_interval(found, add.none())
            if not moments.power.mean() > 0.0:
                # Estimated without bias, a large batch's E||ghat||^2 may come out negative where the signal is weak.
                method = f"{rho.method}; E||ghat||^2 estimated at or below 0"
                rho = replace(rho, value=math.nan, low=-math.inf, high=1.0, method=method)
            about: dict[str, Any] = {"verdict": resolution(rho), "needed": _needed(rho, size)}
            rows.append(add.row(f"rho{suffix}", rho, found.sketch, **about))
            rows.append(add.row(f"cv{suffix}", cv_from_rho(rho), math.nan, **about))
        for name, part in _PARTS.items():
            found = spread(part, moments)
            rows.append(add.row(name, plain_estimate(found, add.none()), found.sketch))
        if scope == BATCH and size > 1:
            rows.append(add.ratio("scope_ratio", moments, batches[GROUP, size][0]))
        if variant != compared:
            beside = next(references[s, size] for s in (scope, EITHER, GROUP) if (s, size) in references)
            rows.append(add.ratio("cv_ratio", moments, beside[0]))
    return rows


_PARTS: dict[str, Statistic] = {
    "between_share": between_share,
    "intra_variance": intra_variance,
    "between_variance": between_variance,
    "squared_signal": squared_signal,
}


@dataclass(frozen=True, kw_only=True)
class _Adder:
    """Makes the rows of one rule, scope and batch."""

    study: _Study
    variant: tuple[Rule, float | None]
    scope: str
    size: int
    extrapolated: bool

    def none(self) -> Estimate:
        return self.study.none(f"{METHOD}; linear in the weights' sums over the batch" if self.extrapolated else METHOD)

    def ratio(self, name: str, moments: BatchMoments, reference: BatchMoments) -> TableRow:
        found = spread(log_cv_ratio, moments, reference)
        ratio = ratio_estimate(found, replace(self.none(), method=f"paired {self.none().method} of the log"))
        verdict = UNRESOLVED
        if math.isfinite(ratio.value):
            verdict = "lower" if ratio.high < 1.0 else "higher" if ratio.low > 1.0 else "undetermined"
        return self.row(name, ratio, found.sketch * abs(ratio.value), verdict=verdict)

    def row(
        self,
        quantity: str,
        estimate: Estimate,
        sketch: float,
        *,
        verdict: str | None = None,
        needed: Needed | None = None,
    ) -> TableRow:
        rule, alpha = self.variant
        return TableRow(
            quantity=quantity,
            estimate=estimate,
            target=self.study.target,
            rule=rule.name,
            alpha=alpha,
            advantage=self.study.advantage,
            scope=self.scope,
            group_size=self.study.group_size,
            verdict=verdict,
            extra={
                "batch_prompts": self.size,
                "estimand": PROMPTS_LIKE_THESE,
                "prompts_needed": math.nan if needed is None else needed.n,
                "prompts_needed_at_least": needed is not None and needed.at_least,
                "sketch_error": sketch,
                "products": self.study.source,
                "extrapolated": self.extrapolated,
                "left_out": self.study.left_out,
            },
        )


def _needed(rho: Estimate, size: int) -> Needed:
    """Prompts at which rho's lower end would leave 0."""
    if math.isnan(rho.value) or math.isnan(rho.low):
        return Needed(math.nan, at_least=False)
    return n_to_resolve(replace(rho, n=rho.clusters, clusters=1), size)
