"""The rows of one variance law, and the labels they share. The table is `law_table` in `law_tables`."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradvar.errors import GradvarError
from gradvar.estimators.carrying import together
from gradvar.estimators.cv import SILENT
from gradvar.estimators.intervals import (
    PROMPTS_LIKE_THESE,
    THESE_PROMPTS,
)
from gradvar.estimators.law import (
    UNDETERMINED,
    ExponentFit,
    VarianceLaw,
    fit_exponent,
    fit_variance_law,
)
from gradvar.estimators.law_estimates import half_width
from gradvar.estimators.law_samples import (
    ALL_RESPONSES,
    Sample,
    neighbours_of,
    pairs_of,
    spread_of,
    usable_samples,
)
from gradvar.runs.records import Estimate, TableRow, no_estimate

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class LawWriter:
    """Labels shared by the rows of one target and advantage."""

    target: str
    advantage: str
    nothing: dict[str, str]
    """Prompts whose every gradient is 0, with the verdict that says why."""
    margin: float
    level: float
    seed: int
    exponents_only: bool = False

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
        at_least: bool = False,
        reference_length: float = math.nan,
        estimand: str = THESE_PROMPTS,
    ) -> TableRow:
        """Return one row with the writer's labels."""
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
                "n_needed_at_least": at_least,
                "left_out": left_out,
                "silent": sum(self.nothing.get(name) == SILENT for name in prompts),
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
        """Return the row of a fit that cannot be made, its reason in `method`."""
        estimate = no_estimate(why, n=n, clusters=len(prompts), level=self.level)
        return self.row(
            f"{what}_exponent",
            estimate,
            scope=scope,
            prompts=prompts,
            pooled=pooled,
            left_out=left_out,
            verdict=verdict,
        )


def rows_of_samples(
    writer: LawWriter, scope: str, samples: dict[str, Sample], *, pooled: bool
) -> tuple[list[TableRow], dict[str, ExponentFit]]:
    """Fit one prompt, or several together, on deviations and on within-length variances.

    Returns:
        (rows; the fits that were made, by "deviation" and "within").
    """
    laws: dict[str, ExponentFit] = {}
    rows: list[TableRow] = []
    for what in ("deviation", "within"):
        usable, why = usable_samples(samples, what)
        names = list(usable) or list(samples)
        left_out = sum(samples[name].left_out for name in names)
        common: dict[str, Any] = {"scope": scope, "prompts": names, "pooled": pooled, "left_out": left_out}
        try:
            if not usable:
                raise GradvarError(why)
            full = scope == ALL_RESPONSES and not writer.exponents_only
            law = fit_samples(list(usable.values()), what, margin=writer.margin, level=writer.level, full=full)
        except GradvarError as error:
            n = sum(len(samples[name].lengths) for name in names)
            rows.append(writer.none(what, str(error), UNDETERMINED, n=n, **common))
            continue
        if list(usable) == list(samples):
            laws[what] = law
        rows += _law_rows(writer, what, law, usable, common, pooled=pooled)
    if len(laws) == 2:
        names = list(samples)
        left_out = sum(s.left_out for s in samples.values())
        rows.append(
            writer.row(
                "exponent_difference",
                _difference(laws["deviation"], laws["within"], list(samples.values()), writer.level),
                scope=scope,
                prompts=names,
                pooled=pooled,
                left_out=left_out,
            )
        )
    return rows, laws


def fit_samples(samples: list[Sample], what: str, *, margin: float, level: float, full: bool) -> ExponentFit:
    """Fit the law to "deviation" or "within" of one prompt, or several together; `full` is a `VarianceLaw`."""

    def joined(values: Callable[[Sample], Array]) -> Array:
        return np.concatenate([values(s) for s in samples])

    corrected = what == "deviation"
    sizes = [len(s.lengths) for s in samples]
    parts = [s.deviation_dependence if corrected else s.within_dependence for s in samples]
    cuts = np.cumsum(sizes)[:-1]
    fit: Callable[..., ExponentFit] = fit_variance_law if full else fit_exponent
    return fit(
        joined(lambda s: s.lengths),
        joined(lambda s: spread_of(s, what)),
        n_centred=joined(lambda s: s.n_centred) if corrected else None,
        mean_deviation=joined(lambda s: s.mean_deviation) if corrected else None,
        clusters=np.repeat(np.arange(len(samples)), sizes),
        margin=margin,
        level=level,
        carrying=together(s.carrying[what] for s in samples),
        dependence=lambda q: np.concatenate(
            [part(piece) for part, piece in zip(parts, np.split(q, cuts), strict=True)]
        ),
        pairs=lambda weights: pairs_of(samples, {what: weights}),
        near=None if corrected else neighbours_of(samples),
    )


def _law_rows(
    writer: LawWriter,
    what: str,
    law: ExponentFit,
    samples: dict[str, Sample],
    common: dict[str, Any],
    *,
    pooled: bool,
) -> list[TableRow]:
    def row(name: str, estimate: Estimate, **more: Any) -> TableRow:
        return writer.row(f"{what}_{name}", estimate, **common, **more)

    told = _told(law, samples)
    rows = [
        row("exponent", told(law.exponent), verdict=law.verdict, n_needed=law.n_needed, at_least=law.n_needed_at_least)
    ]
    if pooled:
        verdict, responses = law.verdict_across(writer.margin)
        rows.append(
            row("exponent", told(law.exponent_across), verdict=verdict, n_needed=responses, estimand=PROMPTS_LIKE_THESE)
        )
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


def _told(law: ExponentFit, samples: dict[str, Sample]) -> Callable[[Estimate], Estimate]:
    """Add to an estimate's method which response the exponent rests on, where there is one."""
    if law.rests_on is None:
        return lambda estimate: estimate
    owners = [(name, one) for name, sample in samples.items() for one in sample.names]
    prompt, response = owners[law.rests_on]
    where = f"response {response}" + (f" of prompt {prompt}" if len(samples) > 1 else "")
    note = f"; rests on {where}: {law.exponent_without:.2f} without it"
    return lambda estimate: replace(estimate, method=estimate.method + note)


def _difference(deviation: ExponentFit, within: ExponentFit, samples: list[Sample], level: float) -> Estimate:
    """Deviation minus within-length exponent, paired.

    What pairs count too often is taken out above alone: where E[g | L] moves, short responses not seen would lower it,
    and a sample without them is both too high and too sure (88 to 92% were covered, 93 to 97% so).
    """
    value = deviation.exponent.value - within.exponent.value
    degrees = len(deviation.influence) - deviation.exponent.clusters - 1
    pairs = pairs_of(samples, {"deviation": deviation.weights, "within": -within.weights})
    influence = deviation.influence - within.influence
    down, up = half_width(influence, degrees, level), half_width(influence, degrees, level, pairs)
    counted = ", pairs counted once above" if pairs.once > 0.0 else ""
    method = f"deviation exponent minus within-length exponent, paired HC3 influences{counted}, t"
    if math.isnan(deviation.exponent.low) or math.isnan(within.exponent.low):
        down, up, method = math.nan, math.nan, f"{method}; no interval, as one of the two has none"
    return replace(deviation.exponent, value=value, low=value - down, high=value + up, method=method)
