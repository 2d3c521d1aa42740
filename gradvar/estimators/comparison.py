"""Runs side by side: checkpoints of one training, or models, each with its numbers, and their differences.

A run's own numbers are those of `law_table`, `cv_table` and `alpha_table` at the same options. Differences are taken
where prompts are shared. Two runs sample their responses independently, so for these prompts the interval of a
difference follows from the two runs' own intervals (MOVER, Zou and Donner 2008):

    low = d - sqrt((v1 - low1)^2 + (high2 - v2)^2),   high = d + sqrt((high1 - v1)^2 + (v2 - low2)^2)

For prompts like these the differences are paired by prompt: their mean with t over K - 1. Shape letters: K prompts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from gradvar.errors import GradvarError
from gradvar.estimators.aggregation import expand_rules
from gradvar.estimators.alpha_tables import ALPHA_GRID, alpha_table
from gradvar.estimators.cv import RESOLVED, UNRESOLVED
from gradvar.estimators.cv_tables import cv_table
from gradvar.estimators.groups import PERMUTATIONS
from gradvar.estimators.inputs import arrange
from gradvar.estimators.intervals import (
    MINIMUM_PROMPTS,
    PROMPTS_LIKE_THESE,
    THESE_PROMPTS,
    t_quantile,
)
from gradvar.estimators.law_samples import ALL_RESPONSES
from gradvar.estimators.law_tables import law_table
from gradvar.runs.records import Estimate, PromptScores, TableRow, estimate_table

COMPARED = (
    "deviation_exponent",
    "within_exponent",
    "cv",
    "noise_scale",
    "eta",
    "alpha_star_eta",
    "alpha_star_cv",
)
_RATIOS = ("cv", "noise_scale")
_SETS = ("alpha_star_eta", "alpha_star_cv")

Found = dict[tuple[str, str | None, str], Estimate]
"""(target, prompt_id or None for all prompts, quantity) to the estimate."""


@dataclass(frozen=True, kw_only=True)
class _Options:
    rule: str
    alpha: float | None
    group_size: int
    advantage: str
    grid: tuple[float, ...]
    level: float
    permutations: int
    seed: int

    def estimates(self, name: str, groups: Sequence[PromptScores]) -> Found:
        """Return every compared quantity of one run, per prompt and over all of them."""
        common: dict[str, Any] = {"level": self.level, "seed": self.seed}
        drawn: dict[str, Any] = {**common, "group_size": self.group_size, "permutations": self.permutations}
        rules = () if self.alpha is not None else (self.rule,)
        alphas = (1.0,) if self.alpha is None else (self.alpha,)
        try:
            law = law_table(groups, advantages_studied=(self.advantage,), subsets=False, **common)
            cv = cv_table(
                groups, rules=(self.rule,), alphas=alphas, reference=self.rule, advantage=self.advantage, **drawn
            )
            alpha = alpha_table(groups, rules=rules, grid=self.grid, advantage=self.advantage, **drawn)
        except GradvarError as error:
            raise GradvarError(f"run {name!r}: {error}") from error
        eta = alpha[(alpha["quantity"] == "eta") & ((alpha["rule"] == self.rule) | alpha["rule"].isna())]
        if self.alpha is not None:
            eta = eta[(eta["alpha"] == self.alpha) | eta["alpha"].isna()]
        tables = {"cv": cv[cv["quantity"] == "cv"], "eta": eta}
        for quantity in ("deviation_exponent", "within_exponent"):
            tables[quantity] = law[(law["quantity"] == quantity) & (law["scope"] == ALL_RESPONSES)]
        for quantity in _SETS:
            tables[quantity] = alpha[alpha["quantity"] == quantity]
        found: Found = {}
        for quantity, table in tables.items():
            kept = table[table["estimand"].isna() | (table["estimand"] == THESE_PROMPTS)]
            for row in kept.to_dict("records"):
                prompt = row["prompt_id"] if isinstance(row["prompt_id"], str) else None
                found[row["target"], prompt, quantity] = _estimate(row, self.seed)
        return self._completed(found, groups)

    def _completed(self, found: Found, groups: Sequence[PromptScores]) -> Found:
        """Add the noise scale, and for all prompts the only prompt's number where tables pool nothing."""
        for target, prompts in arrange(groups).items():
            for quantity in COMPARED:
                if quantity == "noise_scale" or (target, None, quantity) in found:
                    continue
                alone = [found[target, p, quantity] for p in prompts if (target, p, quantity) in found]
                usable = [e for e in alone if not math.isnan(e.value)] or alone
                if usable:
                    found[target, None, quantity] = usable[0]
        for (target, prompt, quantity), estimate in list(found.items()):
            if quantity == "cv":
                found[target, prompt, "noise_scale"] = replace(
                    estimate,
                    value=self.group_size * estimate.value**2,
                    low=self.group_size * estimate.low**2,
                    high=self.group_size * estimate.high**2,
                    method=f"n CV^2, responses; {estimate.method}",
                )
        return found


def _estimate(row: Mapping[Any, Any], seed: int) -> Estimate:
    return Estimate(
        value=float(row["value"]),
        low=float(row["low"]),
        high=float(row["high"]),
        level=float(row["level"]),
        method=str(row["method"]),
        n=int(row["n"]),
        clusters=int(row["clusters"]),
        seed=seed,
    )


def compare_table(
    runs: Mapping[str, Sequence[PromptScores]],
    *,
    reference: str | None = None,
    rule: str = "grpo",
    alpha: float | None = None,
    group_size: int = 8,
    advantage: str = "grpo",
    grid: Sequence[float] = ALPHA_GRID,
    level: float = 0.95,
    permutations: int = PERMUTATIONS,
    seed: int,
) -> pd.DataFrame:
    """Exponent, CV, noise scale, efficiency and best alpha of every run, and differences to one of them.

    Quantities, for every target, over all prompts of a run and for each prompt (columns `run`, `against`):
        "deviation_exponent", "within_exponent"   of the advantage-weighted gradient
        "cv", "noise_scale", "eta"                of one rule; noise scale n CV^2 in responses
        "alpha_star_eta", "alpha_star_cv"         of VL Norm, with the set of alphas not told apart
    Against the reference run, over shared prompts only, for each of them and pooled:
        "<quantity>_difference", for cv and noise_scale "<quantity>_ratio"; verdict "higher", "lower", "undetermined",
        or "unresolved" where either run's number is. Pooled for both estimands: these prompts (MOVER on the pooled
        numbers; for alpha* the outermost difference of the two sets), and prompts like these (mean of the prompts' own
        differences, of their logs for ratios, t over K - 1; from 4 prompts on and only where every prompt has one).

    Args:
        runs: Prompts by targets of every run, at least one run. Equal prompt_ids are taken for the same prompt.
        reference: Run the others are compared with; the first where None.
        rule: Name for `aggregation_weights`.
        alpha: Exponent of vl_norm.
        group_size: n, responses of one update.
        advantage: Kind of `advantages`.
        grid: Alphas of VL Norm, ascending.
        level: Nominal coverage.
        permutations: Random permutations a prompt.
        seed: Of the permutations and ties.

    Raises:
        GradvarError: No runs, an unknown reference, rule or advantage, or a run whose prompts are all too small.
    """
    if not runs:
        raise GradvarError("no runs to compare")
    first = next(iter(runs)) if reference is None else reference
    if first not in runs:
        raise GradvarError(f"reference {first!r} is none of the runs: {', '.join(runs)}")
    found_rule, a = expand_rules((rule,), () if alpha is None else (alpha,))[0]
    options = _Options(
        rule=found_rule.name,
        alpha=a,
        group_size=group_size,
        advantage=advantage,
        grid=tuple(grid) if a is None else tuple(sorted({*grid, a})),
        level=level,
        permutations=permutations,
        seed=seed,
    )
    rows: list[TableRow] = []
    own = {name: options.estimates(name, groups) for name, groups in runs.items()}
    for name, found in own.items():
        for (target, prompt, quantity), estimate in found.items():
            verdict = UNRESOLVED if math.isnan(estimate.value) else RESOLVED
            rows.append(_row(options, quantity, estimate, target, prompt, name, None, verdict, THESE_PROMPTS))
    held = {name: {(g.target, g.prompt_id) for g in groups} for name, groups in runs.items()}
    for name, groups in runs.items():
        if name == first:
            continue
        shared = held[name] & held[first]
        sides = []
        for other, whole in ((name, groups), (first, runs[first])):
            mine = [g for g in whole if (g.target, g.prompt_id) in shared]
            same = len(mine) == len(whole)
            sides.append(own[other] if same else options.estimates(other, mine) if mine else {})
        rows += _differences(options, sides[0], sides[1], name, first)
    return estimate_table(rows)


def _differences(options: _Options, one: Found, two: Found, name: str, reference: str) -> list[TableRow]:
    rows = []
    paired: dict[tuple[str, str], list[Estimate]] = {}
    for key, estimate in one.items():
        if key not in two:
            continue
        target, prompt, quantity = key
        difference = estimate_difference(quantity, estimate, two[key])
        label = f"{quantity}_{'ratio' if quantity in _RATIOS else 'difference'}"
        rows.append(
            _row(
                options, label, difference, target, prompt, name, reference, _side(quantity, difference), THESE_PROMPTS
            )
        )
        if prompt is not None:
            paired.setdefault((target, quantity), []).append(difference)
    for (target, quantity), differences in paired.items():
        if len(differences) > 1:
            across = mean_of_pairs(quantity, differences, level=options.level)
            label = f"{quantity}_{'ratio' if quantity in _RATIOS else 'difference'}"
            side = _side(quantity, across)
            across = replace(across, seed=options.seed)
            rows.append(_row(options, label, across, target, None, name, reference, side, PROMPTS_LIKE_THESE))
    return rows


def estimate_difference(quantity: str, one: Estimate, two: Estimate) -> Estimate:
    """One minus two, or one over two for `cv` and `noise_scale`, of independent runs on the same prompts."""
    logs = quantity in _RATIOS
    record = replace(one, n=one.n + two.n, method=f"MOVER of two independent runs; {one.method}")
    (v1, l1, h1), (v2, l2, h2) = (tuple(_log(x) if logs else x for x in (e.value, e.low, e.high)) for e in (one, two))
    if not (math.isfinite(v1) and math.isfinite(v2)):
        low = 0.0 if logs else -math.inf
        return replace(record, value=math.nan, low=low, high=math.inf, method=f"{record.method}; {UNRESOLVED}")
    value = v1 - v2
    if quantity in _SETS:
        low, high = l1 - h2, h1 - l2
        record = replace(record, method=f"outermost difference of two sets; {one.method}")
    else:
        low = value - math.hypot(v1 - l1, h2 - v2)
        high = value + math.hypot(h1 - v1, v2 - l2)
    if logs:
        value, low, high = (math.exp(min(x, 700.0)) for x in (value, low, high))
    return replace(record, value=value, low=low, high=high)


def mean_of_pairs(quantity: str, differences: Sequence[Estimate], *, level: float) -> Estimate:
    """Mean of the prompts' differences (of logs, for ratios) with t over K - 1."""
    logs = quantity in _RATIOS
    count = len(differences)
    none = Estimate(
        value=math.nan,
        low=math.nan,
        high=math.nan,
        level=level,
        method=f"mean of paired differences{' of logs' if logs else ''}, t; {PROMPTS_LIKE_THESE}",
        n=sum(d.n for d in differences),
        clusters=count,
        seed=None,
    )
    if count < MINIMUM_PROMPTS:
        return replace(none, method=f"{none.method}; not given below {MINIMUM_PROMPTS} prompts")
    values = np.array([_log(d.value) if logs else d.value for d in differences])
    if not np.isfinite(values).all():
        lost = int((~np.isfinite(values)).sum())
        return replace(none, method=f"{none.method}; {UNRESOLVED} in {lost} of {count} prompts")
    value = float(values.mean())
    half = t_quantile(level, count - 1) * float(values.std(ddof=1)) / math.sqrt(count)
    ends = (value, value - half, value + half)
    value, low, high = (math.exp(min(x, 700.0)) for x in ends) if logs else ends
    return replace(none, value=value, low=low, high=high)


def _log(x: float) -> float:
    if math.isnan(x) or x < 0.0:
        return math.nan
    return math.log(x) if x > 0.0 else -math.inf


def _side(quantity: str, difference: Estimate) -> str:
    if math.isnan(difference.value):
        return UNRESOLVED
    same = 1.0 if quantity in _RATIOS else 0.0
    return "higher" if difference.low > same else "lower" if difference.high < same else "undetermined"


def _row(
    options: _Options,
    quantity: str,
    estimate: Estimate,
    target: str,
    prompt: str | None,
    run: str,
    against: str | None,
    verdict: str,
    estimand: str,
) -> TableRow:
    starred = quantity.startswith("alpha_star")
    aggregated = not quantity.startswith(("deviation", "within"))
    return TableRow(
        quantity=quantity,
        estimate=estimate,
        target=target,
        prompt_id=prompt,
        rule="vl_norm" if starred else options.rule if aggregated else None,
        alpha=options.alpha if aggregated and not starred else None,
        advantage=options.advantage,
        group_size=options.group_size if aggregated else None,
        verdict=verdict,
        extra={"run": run, "against": against, "estimand": estimand},
    )
