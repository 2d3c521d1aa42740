"""How well a cheap number of a prompt tells its gradients' size: intervals between prompts, beside their truth.

Prompts differ in the chance of a reward and in how large their gradients are; the advantage is rloo's, which keeps the
variance of the rewards. The truth is that of many prompts of as many responses, the prompts' means with their noise.
Shape letters: K prompts, N responses of each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from gradvar.estimators import proxy_table
from gradvar.estimators.advantages import advantages
from gradvar.estimators.intervals import PROMPTS_LIKE_THESE
from gradvar.estimators.proxies import BETWEEN_PROMPTS
from gradvar.runs.records import Estimate
from tests.estimators import simulator

Array = NDArray[np.float64]

BETWEEN = "proxies between prompts"
LAW: dict[str, Any] = {"beta": 1.0, "signal": 0.6, "dimensions": 20, "decay": 0.7}
PROMPTS = 20_000
"""Behind every truth."""
NAMES = {
    "rank_correlation": "rank correlation",
    "explained_variance": "R^2",
    "explained_variance_log": "R^2 of logs",
}


def _drawn(rng: np.random.Generator) -> tuple[float, float]:
    """Chance of a reward and size of the gradients of one prompt."""
    return float(np.clip(rng.beta(1.5, 1.5), 0.05, 0.95)), float(np.exp(rng.normal(0.0, 0.3)))


def between_intervals(prompts: int, n: int, seed: list[int]) -> Iterator[tuple[str, str, float, Estimate]]:
    """Yield quantity, estimand, truth and estimate, as `proxy_table` makes it."""
    rng = np.random.default_rng(seed)
    made = []
    for k in range(prompts):
        p, size = _drawn(rng)
        one = simulator.prompt(f"p{k}", n, rng=rng, p=p, **LAW)
        made.append(replace(one, gram=size**2 * one.gram))
    table = proxy_table(made, advantage="rloo", seed=0)
    rows = table[(table["scope"] == BETWEEN_PROMPTS) & (table["truth"] == "norm_square")]
    truths = between_truths(n)
    for row in rows.to_dict("records"):
        name = f"between prompts, {row['proxy']}: {NAMES[row['quantity']]}"
        if name in truths:
            numbers = {key: row[key] for key in ("value", "low", "high", "level", "method", "n", "clusters", "seed")}
            yield name, PROMPTS_LIKE_THESE, truths[name], Estimate(**numbers)


@cache
def between_truths(n: int) -> dict[str, float]:
    """Of prompts' means over N responses; prompts whose rewards are all equal are left out, as by the table."""
    rng = np.random.default_rng([16, n])
    norms, variances, squares = [], [], []
    for _ in range(PROMPTS):
        p, size = _drawn(rng)
        scores, rewards, lengths = simulator.draw(n, rng=rng, p=p, **LAW)
        if np.ptp(rewards) == 0.0:
            continue
        a = advantages(rewards, "rloo")
        norms.append(size**2 * float((a**2 * (scores**2).sum(axis=1)).mean()))
        variances.append(float(rewards.var()))
        squares.append(float((a**2 * lengths).mean()))
    found = {}
    for name, x in (("reward_variance", variances), ("advantage_square_length", squares)):
        start = f"between prompts, {name}: "
        found[start + NAMES["rank_correlation"]] = float(stats.spearmanr(x, norms).statistic)
        found[start + NAMES["explained_variance"]] = float(np.corrcoef(x, norms)[0, 1] ** 2)
        found[start + NAMES["explained_variance_log"]] = float(np.corrcoef(np.log(x), np.log(norms))[0, 1] ** 2)
    return found
