"""Runs side by side: checkpoints of one training, or models, each with its numbers, and their differences.

A run's own numbers are those of `law_table`, `cv_table` and `alpha_table` at the same options, over all its prompts.
Differences are taken over shared prompts, for each quantity over those that have an estimate in both runs: where a
checkpoint has solved a prompt, its rewards are equal and it says nothing there, so the other run's numbers leave it out
too (`run_numbers.has_estimate`). Two runs sample their responses independently, so for these prompts the interval of a
difference follows from the two runs' own intervals (MOVER, Zou and Donner 2008):

    low = d - sqrt((v1 - low1)^2 + (high2 - v2)^2),   high = d + sqrt((high1 - v1)^2 + (v2 - low2)^2)

So also for alpha*, whose interval holds the alphas not told apart from it: the outermost differences of two such sets,
used before, were covered 99.9%.
For prompts like these the differences are paired by prompt: their mean with t over K - 1. Shape letters: K prompts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd

from gradvar.errors import GradvarError
from gradvar.estimators.aggregation import expand_rules
from gradvar.estimators.alpha_tables import ALPHA_GRID
from gradvar.estimators.cv import RESOLVED, UNRESOLVED
from gradvar.estimators.groups import PERMUTATIONS
from gradvar.estimators.inputs import arrange
from gradvar.estimators.intervals import (
    MINIMUM_PROMPTS,
    PROMPTS_LIKE_THESE,
    THESE_PROMPTS,
    t_quantile,
)
from gradvar.estimators.run_numbers import COMPARED, FAMILIES, Found, Options, has_estimate
from gradvar.runs.records import Estimate, PromptScores, TableRow, estimate_table, no_estimate

_RATIOS = ("cv", "noise_scale")


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

    Quantities, for every target, over all prompts of a run and for each prompt (columns `run`, `against`; `clusters`
    counts the prompts, silent ones too in a pooled CV):
        "deviation_exponent", "within_exponent"   of the advantage-weighted gradient
        "cv", "noise_scale", "eta"                of one rule; noise scale n CV^2 in responses
        "alpha_star_eta", "alpha_star_cv"         of VL Norm, with the set of alphas not told apart
    Against the reference run, for each shared prompt, and pooled over those that have an estimate of the quantity in
    both runs (`clusters` counts them; silent and too small prompts have none, unresolved ones count):
        "<quantity>_difference", for cv and noise_scale "<quantity>_ratio"; verdict "higher", "lower", "undetermined",
        or "unresolved" where either run's number is or no prompt is left. Pooled for both estimands: these prompts
        (MOVER on both runs' numbers over those prompts), and prompts like these (mean of their own differences, of
        their logs for ratios, t over K - 1; from 4 prompts on and only where each of them is resolved).

    Args:
        runs: Prompts by targets of every run, at least one run. Equal prompt_ids are taken for the same prompt.
        reference: Run the others are compared with; the first where None.
        rule: Name for `aggregation_weights`.
        alpha: Exponent of vl_norm.
        group_size: n, responses of one update.
        advantage: Kind of `advantages`.
        grid: Alphas of VL Norm that its best one is sought among, ascending; `alpha` may lie beyond.
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
    options = Options(
        rule=found_rule.name,
        alpha=a,
        group_size=group_size,
        advantage=advantage,
        grid=tuple(grid),
        level=level,
        permutations=permutations,
        seed=seed,
    )
    scores = {name: {t: list(own.values()) for t, own in arrange(groups).items()} for name, groups in runs.items()}
    made = _Made(options=options, scores=scores)
    rows: list[TableRow] = []
    for name, targets in scores.items():
        for target in targets:
            for quantity in COMPARED:
                for (prompt, other), estimate in made.of(name, target, quantity).items():
                    if other == quantity:
                        verdict = UNRESOLVED if math.isnan(estimate.value) else RESOLVED
                        rows.append(_row(options, quantity, estimate, target, prompt, name, None, verdict))
    for name, targets in scores.items():
        for target in targets:
            if name != first and target in scores[first]:
                for quantity in COMPARED:
                    rows += _differences(made, name, first, target, quantity)
    return estimate_table(rows)


@dataclass(frozen=True, kw_only=True)
class _Made:
    """Every run's numbers, each made once."""

    options: Options
    scores: Mapping[str, Mapping[str, Sequence[PromptScores]]]
    """Prompts by run and target."""
    kept: dict[tuple[str, str, str, tuple[str, ...]], Found] = field(default_factory=dict)

    def names(self, run: str, target: str) -> list[str]:
        """Return a run's prompts of one target."""
        return [one.prompt_id for one in self.scores[run][target]]

    def of(self, run: str, target: str, quantity: str, prompts: Sequence[str] | None = None) -> Found:
        """Return the quantity's family over these prompts; None: over all of the run."""
        family = next(name for name, quantities in FAMILIES.items() if quantity in quantities)
        chosen = self.names(run, target) if prompts is None else list(prompts)
        key = (run, target, family, tuple(sorted(chosen)))
        if key not in self.kept:
            mine = [one for one in self.scores[run][target] if one.prompt_id in chosen]
            self.kept[key] = self.options.estimates(family, mine, run)
        return self.kept[key]


def _differences(made: _Made, name: str, reference: str, target: str, quantity: str) -> list[TableRow]:
    """Return the rows of one quantity: every shared prompt, then those with an estimate in both runs pooled."""
    options = made.options
    one, two = (made.of(run, target, quantity) for run in (name, reference))
    label = f"{quantity}_{'ratio' if quantity in _RATIOS else 'difference'}"

    def row(difference: Estimate, prompt: str | None, estimand: str = THESE_PROMPTS) -> TableRow:
        side = _side(quantity, difference)
        return _row(options, label, difference, target, prompt, name, reference, side, estimand)

    others = set(made.names(reference, target))
    shared = [prompt for prompt in made.names(name, target) if prompt in others]
    if not shared:
        return []
    alone = {
        prompt: estimate_difference(quantity, one[prompt, quantity], two[prompt, quantity])
        for prompt in shared
        if (prompt, quantity) in one and (prompt, quantity) in two
    }
    rows = [row(difference, prompt) for prompt, difference in alone.items()]
    both = [p for p in shared if has_estimate(quantity, one, p) and has_estimate(quantity, two, p)]
    if not both:
        n = sum(len(s.lengths) for run in (name, reference) for s in made.scores[run][target] if s.prompt_id in shared)
        why = "not estimated; no shared prompt has an estimate in both runs"
        return [*rows, row(replace(no_estimate(why, n=n, level=options.level), seed=options.seed), None)]
    pooled = (made.of(run, target, quantity, both)[None, quantity] for run in (name, reference))
    rows.append(row(replace(estimate_difference(quantity, *pooled), clusters=len(both)), None))
    if len(both) > 1:
        across = mean_of_pairs(quantity, [alone[prompt] for prompt in both], level=options.level)
        rows.append(row(replace(across, seed=options.seed), None, PROMPTS_LIKE_THESE))
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
    low = value - math.hypot(v1 - l1, h2 - v2)
    high = value + math.hypot(h1 - v1, v2 - l2)
    if logs:
        value, low, high = (math.exp(min(x, 700.0)) for x in (value, low, high))
    return replace(record, value=value, low=low, high=high)


def mean_of_pairs(quantity: str, differences: Sequence[Estimate], *, level: float) -> Estimate:
    """Mean of the prompts' differences (of logs, for ratios) with t over K - 1."""
    logs = quantity in _RATIOS
    count = len(differences)
    method = f"mean of paired differences{' of logs' if logs else ''}, t; {PROMPTS_LIKE_THESE}"
    none = no_estimate(method, n=sum(d.n for d in differences), clusters=count, level=level)
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
    options: Options,
    quantity: str,
    estimate: Estimate,
    target: str,
    prompt: str | None,
    run: str,
    against: str | None,
    verdict: str,
    estimand: str = THESE_PROMPTS,
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
