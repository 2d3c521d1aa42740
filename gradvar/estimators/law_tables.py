"""The variance law of a run: every prompt, the prompts pooled, the score and the advantage-weighted gradient.

Shape letters: N responses of one prompt, n of them fitted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from gradvar.errors import GradvarError
from gradvar.estimators.advantages import check_advantage
from gradvar.estimators.inputs import arrange, why_nothing
from gradvar.estimators.intervals import (
    check_level,
)
from gradvar.estimators.law import (
    ExponentFit,
    heterogeneity,
)
from gradvar.estimators.law_estimates import MINIMUM_RESPONSES
from gradvar.estimators.law_rows import LawWriter, rows_of_samples
from gradvar.estimators.law_samples import ALL_RESPONSES, Sample, sample_of, subsets_of
from gradvar.estimators.spread import (
    NEIGHBOURS,
)
from gradvar.runs.records import PromptScores, TableRow, estimate_table

Array = NDArray[np.float64]

MINIMUM_NEIGHBOURS = 2


def law_table(
    groups: Sequence[PromptScores],
    *,
    advantages_studied: Sequence[str] = ("score", "grpo"),
    subsets: bool = True,
    exponents_only: bool = False,
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
    equal) have the verdict "silent: all rewards equal", others "undetermined". Where few responses carry the noise
    (`carrying`) nothing measured with advantages has an interval, a straight line less often.

    Args:
        groups: Prompts by targets; several targets get their sum as well.
        advantages_studied: "score" and kinds of `advantages`, over all verified responses of a prompt.
        subsets: Whether reward classes and the untruncated responses are fitted too.
        exponents_only: Leave out what stands beside the exponents: families, scale, lines, rank correlation.
        neighbours: k of the within-length variance.
        margin: Of the verdict on the exponent.
        level: Nominal coverage.
        seed: Breaks ties between neighbours in length.

    Returns:
        The table. `n_needed` counts responses of all prompts of the row; where `n_needed_at_least` is true only as many
        as an interval takes at least, as there is none.

    Raises:
        GradvarError: No prompts, an unknown advantage, fewer than 2 neighbours, or prompts that do not fit together.
    """
    check_level(level)
    for kind in advantages_studied:
        check_advantage(kind)
    if neighbours < MINIMUM_NEIGHBOURS:
        raise GradvarError(
            f"neighbours must be at least {MINIMUM_NEIGHBOURS}, received {neighbours}: with one, what responses owe to "
            "each other is not known"
        )
    rows: list[TableRow] = []
    targets = arrange(groups)
    for target, prompts in targets.items():
        for kind in advantages_studied:
            studied = {n: s if kind == "score" else s.verified() for n, s in prompts.items()}
            nothing = {n: why for n, s in prompts.items() if (why := why_nothing(s, kind)) is not None}
            writer = LawWriter(
                target=target, advantage=kind, nothing=nothing, margin=margin, level=level, seed=seed,
                exponents_only=exponents_only,
            )  # fmt: skip
            for scope, keep in subsets_of(prompts, studied, subsets).items():
                rows += _rows_of_scope(writer, scope, keep, prompts, studied, neighbours)
    return estimate_table(rows)


def _rows_of_scope(
    writer: LawWriter,
    scope: str,
    keep: Callable[[PromptScores], NDArray[np.bool_]],
    prompts: dict[str, PromptScores],
    studied: dict[str, PromptScores],
    neighbours: int,
) -> list[TableRow]:
    rows: list[TableRow] = []
    samples: dict[str, Sample] = {}
    alone: dict[str, list[ExponentFit]] = {"deviation": [], "within": []}
    for name, scores in studied.items():
        left_out = len(prompts[name].lengths) - len(scores.lengths)
        if name in writer.nothing:
            if scope == ALL_RESPONSES:
                rows += [
                    writer.none(
                        what,
                        f"not fitted; {writer.nothing[name]}",
                        writer.nothing[name],
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
        sample = sample_of(
            scores, chosen, advantage=writer.advantage, neighbours=neighbours, left_out=left_out, seed=writer.seed
        )
        made, laws = rows_of_samples(writer, scope, {name: sample}, pooled=False)
        rows += made
        samples[name] = sample
        for what, law in laws.items():
            alone[what].append(law)
    if len(studied) > 1 and samples:
        rows += rows_of_samples(writer, scope, samples, pooled=True)[0]
        left_out = sum(s.left_out for s in samples.values())
        for what, laws_of_prompts in alone.items():
            tau, p = heterogeneity(laws_of_prompts, writer.level)
            common: dict[str, Any] = {"scope": scope, "prompts": list(samples), "pooled": True, "left_out": left_out}
            rows.append(writer.row(f"{what}_exponent_tau", tau, **common))
            q = replace(tau, value=p, method="Cochran's Q, chi-square")
            rows.append(writer.row(f"{what}_heterogeneity_p", q, **common))
    return rows
