"""What is told beside the law, of one simulated prompt, beside its truth: lines and rank correlations.

Scale, level, curvature and the difference of the two exponents are those that the fits converge to; inside a reward
class the variance given the length is the simulator's own power of it. A line through deviations is that through their
means at these lengths: its truth is the draw's own. Log-log slopes and rank correlations hang on more than the means:
their truth is the mean estimate from many responses.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np

from benchmarks.calibration_truths import conditional_variances, grid_of
from gradvar.estimators import fit_variance_law, law_table
from gradvar.estimators.law_samples import ALL_RESPONSES
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
    key = tuple(sorted(law.items()))
    known, shapes = from_many(key), limits(key)
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
                    yield label, float(truth), _estimate(row)
            beta, scale, curvature = shapes[advantage, what]
            for name, truth in (("scale", scale), ("level", math.nan), ("curvature", curvature)):
                row = rows.get((advantage, f"{what}_{name}"))
                if row is not None:
                    truth = scale * row["reference_length"] ** beta if name == "level" else truth
                    yield f"{what} {name}, {advantage}", truth, _estimate(row)
        row = rows.get((advantage, "exponent_difference"))
        if row is not None:
            truth = shapes[advantage, "deviation"][0] - shapes[advantage, "within"][0]
            yield f"deviation exponent less within, {advantage}", truth, _estimate(row)
        for reward in (0, 1):
            row = rows.get((advantage, "within_exponent", f"reward {reward}"))
            if row is not None:
                yield f"within exponent, {advantage}, reward {reward}", law["beta"], _estimate(row)


def _estimate(row: dict[Any, Any]) -> Estimate:
    return Estimate(**{key: row[key] for key in NUMBERS})


def _rows(scores: PromptScores, seed: int) -> dict[tuple[str, ...], dict[Any, Any]]:
    """By advantage and quantity, of all responses; with its scope where it is of a subset."""
    table = law_table([scores], advantages_studied=KINDS, seed=seed)
    return {
        (row["advantage"], row["quantity"], *([] if row["scope"] == ALL_RESPONSES else [row["scope"]])): row
        for row in table.to_dict("records")
    }


@cache
def limits(law: tuple[tuple[str, Any], ...]) -> dict[tuple[str, str], tuple[float, float, float]]:
    """Exponent, scale (per token) and curvature of the exact means on a grid, by advantage and kind of variance."""
    lengths = grid_of(dict(law))
    found = {}
    for advantage in KINDS:
        for what, v in zip(("deviation", "within"), conditional_variances(dict(law), advantage, lengths), strict=True):
            fit = fit_variance_law(lengths, v)
            found[advantage, what] = fit.exponent.value, fit.scale.value, fit.curvature.value
    return found


@cache
def from_many(law: tuple[tuple[str, Any], ...]) -> dict[tuple[str, ...], float]:
    """Mean estimates by advantage and quantity, from `MANY` responses `TIMES` times."""
    values: dict[tuple[str, ...], list[float]] = {}
    for k in range(TIMES):
        one = simulator.prompt("many", MANY, rng=np.random.default_rng([15, k]), **dict(law))
        for key, row in _rows(one, k).items():
            values.setdefault(key, []).append(row["value"])
    return {key: math.fsum(found) / len(found) for key, found in values.items()}
