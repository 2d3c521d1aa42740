"""Where the variance lies: each weight matrix's part of the score's variance over all that were measured.

    share_t = sum_q v_q,t / sum_q v_q,   v_q,t = sum_i ||s_i - mean s||^2 / (N - 1)

over target t alone, the divisor over all targets together: Grams of disjoint parameters add, so the shares sum to 1.
Shape letters: N responses of one prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from gradvar.estimators.additive import Statistic, Sums, of_prompts_like_these, of_these_prompts
from gradvar.estimators.inputs import SUM_TARGET, arrange
from gradvar.estimators.intervals import PROMPTS_LIKE_THESE, THESE_PROMPTS, check_level
from gradvar.estimators.spread import weighted_gram
from gradvar.runs.records import PromptScores, TableRow, estimate_table

Array = NDArray[np.float64]

METHOD = "variance over the targets' sum, delete-one jackknife, t"


def variance_share_table(groups: Sequence[PromptScores], *, level: float = 0.95) -> pd.DataFrame:
    """Each target's share of the score's variance, per prompt and over prompts for both estimands.

    Args:
        groups: Prompts by targets, every prompt with the same ones.
        level: Nominal coverage.

    Returns:
        The table: quantity "variance_share", column `estimand`.

    Raises:
        GradvarError: As `arrange`.
    """
    check_level(level)
    targets = arrange(groups)
    whole = targets.pop(SUM_TARGET, None)
    if whole is None:
        whole = next(iter(targets.values()))
    total = {name: _variances(scores.gram) for name, scores in whole.items()}
    share: Statistic = lambda parts: parts[..., 0] / parts[..., 1]  # noqa: E731
    rows = []
    for target, prompts in targets.items():
        sums = {}
        for name, scores in prompts.items():
            (value, without), (all_value, all_without) = _variances(scores.gram), total[name]
            sums[name] = Sums(value=np.array([value, all_value]), without=np.stack([without, all_without], axis=1))
        pools: list[tuple[str | None, list[Sums]]] = [(name, [one]) for name, one in sums.items()]
        if len(sums) > 1:
            pools.append((None, list(sums.values())))
        for label, pool in pools:
            made = {THESE_PROMPTS: of_these_prompts(pool, share, level=level, method=METHOD)}
            if label is None:
                made[PROMPTS_LIKE_THESE] = of_prompts_like_these(pool, share, level=level, method=METHOD)
            rows += [
                TableRow(
                    quantity="variance_share",
                    estimate=estimate,
                    target=target,
                    prompt_id=label,
                    advantage="score",
                    extra={"estimand": estimand},
                )
                for estimand, estimate in made.items()
            ]
    return estimate_table(rows)


def _variances(gram: Array) -> tuple[float, Array]:
    """Return the variance of the score and its N delete-one replicates (NaN below 3 responses)."""
    matrix = weighted_gram(gram)
    n, diagonal = len(matrix), np.diagonal(matrix)
    trace, row_sums = float(diagonal.sum()), matrix.sum(axis=1)
    total = float(row_sums.sum())
    if n < 3:
        return (trace - total / n) / max(n - 1, 1), np.full(n, np.nan)
    left = (trace - diagonal) - (total - 2 * row_sums + diagonal) / (n - 1)
    return (trace - total / n) / (n - 1), left / (n - 2)
