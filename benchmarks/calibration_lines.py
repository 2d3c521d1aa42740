"""What is told beside the law, of one simulated prompt, beside its truth: lines and rank correlations.

A line through deviations is that through their means at these lengths: its truth is the draw's own. Log-log slopes and
rank correlations hang on more than the means: their truth is the mean estimate from many responses.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np

from benchmarks.calibration_truths import conditional_variances
from gradvar.estimators import law_table
from gradvar.runs.records import Estimate, PromptScores
from tests.estimators import simulator

MANY, TIMES = 1000, 6
"""Responses and draws behind the truths that are estimated; their error is 2% of an interval's width at N = 64. They
are read up to a quarter as many responses."""
KINDS = ("score", "grpo")
NUMBERS = ("value", "low", "high", "level", "method", "n", "clusters", "seed")


def line_intervals(scores: PromptScores, law: dict[str, Any], seed: int) -> Iterator[tuple[str, float, Estimate]]:
    """Yield quantity, truth and estimate, as `law_table` makes it."""
    lengths, n = scores.lengths.astype(np.float64), len(scores.lengths)
    known = from_many(tuple(sorted(law.items())))
    estimated = ("loglog_slope", "rank_correlation") if 4 * n <= MANY else ()
    rows = _rows(scores, seed)
    for advantage in KINDS:
        means = dict(zip(("deviation", "within"), conditional_variances(law, advantage, lengths), strict=True))
        means["deviation"] = (1.0 - 2.0 / n) * means["deviation"] + means["deviation"].mean() / n
        for what, v in means.items():
            slope, intercept = np.polyfit(lengths, v, 1)
            for name, truth in (
                ("line_slope", slope),
                ("line_intercept", intercept),
                *((name, known[advantage, f"{what}_{name}"]) for name in estimated),
            ):
                row = rows.get((advantage, f"{what}_{name}"))
                if row is not None:
                    label = f"{what} {name.replace('_', ' ').replace('loglog', 'log-log')}, {advantage}"
                    yield label, float(truth), Estimate(**{key: row[key] for key in NUMBERS})


def _rows(scores: PromptScores, seed: int) -> dict[tuple[str, str], dict[Any, Any]]:
    table = law_table([scores], advantages_studied=KINDS, subsets=False, seed=seed)
    return {(row["advantage"], row["quantity"]): row for row in table.to_dict("records")}


@cache
def from_many(law: tuple[tuple[str, Any], ...]) -> dict[tuple[str, str], float]:
    """Mean estimates by advantage and quantity, from `MANY` responses `TIMES` times."""
    values: dict[tuple[str, str], list[float]] = {}
    for k in range(TIMES):
        one = simulator.prompt("many", MANY, rng=np.random.default_rng([15, k]), **dict(law))
        for key, row in _rows(one, k).items():
            values.setdefault(key, []).append(row["value"])
    return {key: math.fsum(found) / len(found) for key, found in values.items()}
