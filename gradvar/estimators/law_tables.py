"""The variance law of a run: every prompt, the prompts pooled, the score and the advantage-weighted gradient.

Shape letters: N responses of one prompt, n of them fitted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from gradvar.errors import GradvarError
from gradvar.estimators.advantages import advantages, check_advantage
from gradvar.estimators.cv import SILENT
from gradvar.estimators.inputs import arrange, generator, is_silent
from gradvar.estimators.intervals import (
    PROMPTS_LIKE_THESE,
    THESE_PROMPTS,
    check_level,
    effective_degrees,
    t_quantile,
)
from gradvar.estimators.law import (
    MINIMUM_RESPONSES,
    UNDETERMINED,
    ExponentFit,
    VarianceLaw,
    fit_exponent,
    fit_variance_law,
    heterogeneity,
)
from gradvar.estimators.quasi import Dependence
from gradvar.estimators.spread import (
    NEIGHBOURS,
    deviation_dependence,
    deviations,
    within_dependence,
    within_length_variance,
)
from gradvar.runs.records import Estimate, PromptScores, TableRow, estimate_table

Array = NDArray[np.float64]

ALL_RESPONSES = "all responses"
NOT_TRUNCATED = "not truncated"
MOST_CLASSES = 4
"""With more different rewards than this, the classes are the halves below and above the median."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Sample:
    """Deviations of one prompt's responses, or of a subset."""

    lengths: Array
    deviations: Array
    within: Array
    n_centred: Array
    """(n,) N of the set that the mean gradient was taken over."""
    mean_deviation: Array
    """(n,) its mean deviation."""
    deviation_dependence: Dependence
    within_dependence: Dependence
    left_out: int


def law_table(
    groups: Sequence[PromptScores],
    *,
    advantages_studied: Sequence[str] = ("score", "grpo"),
    subsets: bool = True,
    neighbours: int = NEIGHBOURS,
    margin: float = 0.25,
    level: float = 0.95,
    seed: int,
) -> pd.DataFrame:
    """Variance law of every prompt and target, of the targets' sum, and pooled over prompts.

    Quantities, each for what = "deviation" (D, the paper's) and what = "within" (V, the variance given the length):
        "<what>_exponent"        beta of v = c L^beta; verdict, n_needed. Pooled rows come for both estimands.
        "<what>_scale"           c, at one token
        "<what>_level"           v at `reference_length` tokens, where its error is uncorrelated with the exponent's;
                                 log v(L) has half-width sqrt(h_level^2 + h_beta^2 log(L/reference_length)^2)
        "<what>_curvature"       coefficient of log(L)^2 beside the power law; an interval without 0 is lack of fit
        "<what>_loglog_slope", "<what>_loglog_r2", "<what>_line_slope", "<what>_line_intercept", "<what>_line_r2"
        "<what>_rank_correlation"
        "<what>_explained_constant", ..._proportional, ..._affine, ..._power   1 - quasi-deviance / the constant's
    and "exponent_difference", deviation minus within; pooled, "<what>_exponent_tau" (standard deviation of the exponent
    between prompts) and "<what>_heterogeneity_p" (Cochran's Q). `advantage` says whether the score ("score") or the
    advantage-weighted gradient is meant, `scope` which responses: "all responses", one reward class, or those not
    truncated (exponents only). Pooled rows (no prompt_id) have one constant per prompt.

    A fit that cannot be made is one exponent row with NaN, its reason in `method`: silent prompts (all rewards
    equal) have the verdict "silent: all rewards equal", others "undetermined".

    Args:
        groups: Prompts by targets; several targets get their sum as well.
        advantages_studied: "score" and kinds of `advantages`, over all verified responses of a prompt.
        subsets: Whether reward classes and the untruncated responses are fitted too.
        neighbours: k of the within-length variance.
        margin: Of the verdict on the exponent.
        level: Nominal coverage.
        seed: Breaks ties between neighbours in length.

    Returns:
        The table. `n_needed` counts responses of all prompts of the row.

    Raises:
        GradvarError: No prompts, an unknown advantage, or prompts that do not fit together.
    """
    check_level(level)
    for kind in advantages_studied:
        check_advantage(kind)
    rows: list[TableRow] = []
    targets = arrange(groups)
    for target, prompts in targets.items():
        for kind in advantages_studied:
            studied = {n: s if kind == "score" else s.verified() for n, s in prompts.items()}
            silent = {n for n, s in prompts.items() if kind not in ("score", "raw") and is_silent(s)}
            writer = _Writer(target=target, advantage=kind, silent=silent, margin=margin, level=level, seed=seed)
            for scope, keep in _subsets(prompts, studied, subsets).items():
                rows += _rows_of_scope(writer, scope, keep, prompts, studied, neighbours)
    return estimate_table(rows)


def _subsets(
    prompts: dict[str, PromptScores], studied: dict[str, PromptScores], subsets: bool
) -> dict[str, Callable[[PromptScores], NDArray[np.bool_]]]:
    found: dict[str, Callable[[PromptScores], NDArray[np.bool_]]] = {
        ALL_RESPONSES: lambda s: np.ones(len(s.lengths), dtype=bool)
    }
    if not subsets:
        return found
    rewards = np.concatenate([s.rewards for s in prompts.values()])
    rewards = rewards[~np.isnan(rewards)]
    values = np.unique(rewards)
    if 1 < len(values) <= MOST_CLASSES:
        for value in values:
            found[f"reward {value:g}"] = lambda s, value=value: s.rewards == value  # type: ignore[misc]
    elif len(values) > MOST_CLASSES:
        middle = float(np.median(rewards))
        found[f"reward at most {middle:g}"] = lambda s: s.rewards <= middle
        found[f"reward above {middle:g}"] = lambda s: s.rewards > middle
    if any(s.truncated.any() for s in studied.values()):
        found[NOT_TRUNCATED] = lambda s: ~s.truncated
    return found


@dataclass(frozen=True, kw_only=True)
class _Writer:
    """Labels shared by the rows of one target and advantage."""

    target: str
    advantage: str
    silent: set[str]
    margin: float
    level: float
    seed: int

    def row(
        self,
        quantity: str,
        estimate: Estimate,
        *,
        scope: str,
        prompts: Sequence[str],
        pooled: bool,
        left_out: int,
        verdict: str | None = None,
        n_needed: float = math.nan,
        reference_length: float = math.nan,
        estimand: str = THESE_PROMPTS,
    ) -> TableRow:
        return TableRow(
            quantity=quantity,
            estimate=replace(estimate, seed=self.seed),
            target=self.target,
            prompt_id=None if pooled else prompts[0],
            advantage=self.advantage,
            scope=scope,
            verdict=verdict,
            extra={
                "n_needed": n_needed,
                "left_out": left_out,
                "silent": sum(name in self.silent for name in prompts),
                "reference_length": reference_length,
                "estimand": estimand,
            },
        )

    def none(
        self,
        what: str,
        why: str,
        verdict: str,
        *,
        scope: str,
        prompts: Sequence[str],
        n: int,
        left_out: int,
        pooled: bool,
    ) -> TableRow:
        estimate = Estimate(
            value=math.nan,
            low=math.nan,
            high=math.nan,
            level=self.level,
            method=why,
            n=n,
            clusters=len(prompts),
            seed=None,
        )
        return self.row(
            f"{what}_exponent",
            estimate,
            scope=scope,
            prompts=prompts,
            pooled=pooled,
            left_out=left_out,
            verdict=verdict,
        )


def _rows_of_scope(
    writer: _Writer,
    scope: str,
    keep: Callable[[PromptScores], NDArray[np.bool_]],
    prompts: dict[str, PromptScores],
    studied: dict[str, PromptScores],
    neighbours: int,
) -> list[TableRow]:
    rows: list[TableRow] = []
    samples: dict[str, _Sample] = {}
    alone: dict[str, list[ExponentFit]] = {"deviation": [], "within": []}
    for name, scores in studied.items():
        left_out = len(prompts[name].lengths) - len(scores.lengths)
        if name in writer.silent:
            if scope == ALL_RESPONSES:
                rows += [
                    writer.none(
                        what,
                        f"not fitted; {SILENT}",
                        SILENT,
                        scope=scope,
                        prompts=[name],
                        n=len(scores.lengths),
                        left_out=left_out,
                        pooled=False,
                    )
                    for what in ("deviation", "within")
                ]
            continue
        chosen = keep(scores)
        if scope != ALL_RESPONSES and chosen.sum() < MINIMUM_RESPONSES:
            continue
        sample = _sample(scores, chosen, writer, neighbours, left_out)
        made, laws = _rows_of_sample(writer, scope, {name: sample}, pooled=False)
        rows += made
        samples[name] = sample
        for what, law in laws.items():
            alone[what].append(law)
    if len(studied) > 1 and samples:
        rows += _rows_of_sample(writer, scope, samples, pooled=True)[0]
        left_out = sum(s.left_out for s in samples.values())
        for what, laws_of_prompts in alone.items():
            tau, p = heterogeneity(laws_of_prompts, writer.level)
            common: dict[str, Any] = {"scope": scope, "prompts": list(samples), "pooled": True, "left_out": left_out}
            rows.append(writer.row(f"{what}_exponent_tau", tau, **common))
            q = replace(tau, value=p, method="Cochran's Q, chi-square")
            rows.append(writer.row(f"{what}_heterogeneity_p", q, **common))
    return rows


def _sample(
    scores: PromptScores, chosen: NDArray[np.bool_], writer: _Writer, neighbours: int, left_out: int
) -> _Sample:
    factors = None
    if writer.advantage != "score":
        factors = advantages(scores.rewards, writer.advantage, lengths=scores.lengths)
    n = len(scores.lengths)
    spread = deviations(scores.gram, factors)
    part = scores if chosen.all() else scores.select(chosen)
    count = len(part.lengths)
    within = np.zeros(count)
    shared: Dependence = _nothing_shared
    if count > 1:
        arguments: dict[str, Any] = {
            "advantages": None if factors is None else factors[chosen],
            "neighbours": neighbours,
        }
        purpose = (writer.seed, scores.prompt_id, "neighbours")
        within = within_length_variance(part.gram, part.lengths, **arguments, rng=generator(*purpose))
        shared = within_dependence(part.gram, part.lengths, **arguments, rng=generator(*purpose))
    return _Sample(
        lengths=part.lengths.astype(np.float64),
        deviations=spread[chosen],
        within=within,
        n_centred=np.full(count, float(n)),
        mean_deviation=np.full(count, float(spread.mean())),
        deviation_dependence=deviation_dependence(scores.gram, factors, subset=chosen) if n > 1 else _nothing_shared,
        within_dependence=shared,
        left_out=left_out,
    )


def _nothing_shared(q: Array) -> Array:
    return np.zeros_like(q)


def _rows_of_sample(
    writer: _Writer, scope: str, samples: dict[str, _Sample], *, pooled: bool
) -> tuple[list[TableRow], dict[str, ExponentFit]]:
    laws: dict[str, ExponentFit] = {}
    rows: list[TableRow] = []
    for what in ("deviation", "within"):
        usable, why = _usable(samples, what)
        names = list(usable) or list(samples)
        left_out = sum(samples[name].left_out for name in names)
        common: dict[str, Any] = {"scope": scope, "prompts": names, "pooled": pooled, "left_out": left_out}
        try:
            if not usable:
                raise GradvarError(why)
            law = _fit(list(usable.values()), what, writer, full=scope == ALL_RESPONSES)
        except GradvarError as error:
            n = sum(len(samples[name].lengths) for name in names)
            rows.append(writer.none(what, str(error), UNDETERMINED, n=n, **common))
            continue
        if list(usable) == list(samples):
            laws[what] = law
        rows += _law_rows(writer, what, law, common, pooled=pooled)
    if len(laws) == 2:
        names = list(samples)
        left_out = sum(s.left_out for s in samples.values())
        rows.append(
            writer.row(
                "exponent_difference",
                _difference(laws["deviation"], laws["within"], writer.level),
                scope=scope,
                prompts=names,
                pooled=pooled,
                left_out=left_out,
            )
        )
    return rows, laws


def _usable(samples: dict[str, _Sample], what: str) -> tuple[dict[str, _Sample], str]:
    """Drop prompts without any spread: identical responses cannot carry a constant of their own."""
    found = {
        name: s
        for name, s in samples.items()
        if len(s.lengths) > 1 and len(s.n_centred) and s.n_centred[0] >= 3 and _spread(s, what).sum() > 0
    }
    return found, "fewer than 3 responses, or responses that are all identical: there is no variance to fit"


def _spread(sample: _Sample, what: str) -> Array:
    return sample.deviations if what == "deviation" else sample.within


def _fit(samples: list[_Sample], what: str, writer: _Writer, *, full: bool) -> ExponentFit:
    def joined(values: Callable[[_Sample], Array]) -> Array:
        return np.concatenate([values(s) for s in samples])

    corrected = what == "deviation"
    sizes = [len(s.lengths) for s in samples]
    parts = [s.deviation_dependence if corrected else s.within_dependence for s in samples]
    cuts = np.cumsum(sizes)[:-1]
    fit: Callable[..., ExponentFit] = fit_variance_law if full else fit_exponent
    return fit(
        joined(lambda s: s.lengths),
        joined(lambda s: _spread(s, what)),
        n_centred=joined(lambda s: s.n_centred) if corrected else None,
        mean_deviation=joined(lambda s: s.mean_deviation) if corrected else None,
        clusters=np.repeat(np.arange(len(samples)), sizes),
        margin=writer.margin,
        level=writer.level,
        dependence=lambda q: np.concatenate(
            [part(piece) for part, piece in zip(parts, np.split(q, cuts), strict=True)]
        ),
    )


def _law_rows(writer: _Writer, what: str, law: ExponentFit, common: dict[str, Any], *, pooled: bool) -> list[TableRow]:
    def row(name: str, estimate: Estimate, **more: Any) -> TableRow:
        return writer.row(f"{what}_{name}", estimate, **common, **more)

    rows = [row("exponent", law.exponent, verdict=law.verdict, n_needed=law.n_needed)]
    if pooled:
        verdict, needed = law.verdict_across(writer.margin)
        rows.append(row("exponent", law.exponent_across, verdict=verdict, n_needed=needed, estimand=PROMPTS_LIKE_THESE))
    if not isinstance(law, VarianceLaw):
        return rows
    rows += [
        row("scale", law.scale),
        row("level", law.level_at_reference, reference_length=law.reference_length),
        row("curvature", law.curvature),
        row("loglog_slope", law.loglog_slope),
        row("loglog_r2", law.loglog_r2),
        row("line_slope", law.line_slope),
        row("line_intercept", law.line_intercept),
        row("line_r2", law.line_r2),
        row("rank_correlation", law.rank_correlation),
    ]
    for name, family in law.families.items():
        estimate = replace(
            law.exponent,
            value=family.explained if family.converged else math.nan,
            low=math.nan,
            high=math.nan,
            method="1 - Gamma quasi-deviance / the constant family's, no interval",
        )
        rows.append(row(f"explained_{name}", estimate))
    return rows


def _difference(deviation: ExponentFit, within: ExponentFit, level: float) -> Estimate:
    value = deviation.exponent.value - within.exponent.value
    degrees = len(deviation.influence) - deviation.exponent.clusters - 1
    influence = deviation.influence - within.influence
    half = t_quantile(level, effective_degrees(influence, degrees)) * float(np.linalg.norm(influence))
    if math.isnan(deviation.exponent.low) or math.isnan(within.exponent.low):
        half = math.nan
    return replace(
        deviation.exponent,
        value=value,
        low=value - half,
        high=value + half,
        method="deviation exponent minus within-length exponent, paired HC3 influences, t",
    )
