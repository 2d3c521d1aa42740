"""How well cheap numbers predict the exact gradient: rank correlation and explained variance.

What is predicted: ||g_i||^2 = A_i^2 S_ii ("norm_square") and the within-length variance V_i ("within"). By: length L,
A^2, A^2 L, whatever else the caller measured (W = sum_t (1 - 2 pi_t + sum_v pi_v^2)), times A^2 too, and between
prompts p (1 - p), the variance of the rewards. Shape letters: N responses of one prompt, K prompts.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from gradvar.errors import GradvarError
from gradvar.estimators.advantages import advantages, check_advantage
from gradvar.estimators.baselines import affine_advantage
from gradvar.estimators.inputs import arrange, generator, why_nothing
from gradvar.estimators.intervals import check_level
from gradvar.estimators.prediction import Numbers, Pair, predictions
from gradvar.estimators.spread import NEIGHBOURS, nearest_in_length, variance_among, weighted_gram
from gradvar.runs.records import PromptScores, TableRow, estimate_table, no_estimate

Array = NDArray[np.float64]

WITHIN_PROMPTS = "within prompts"
BETWEEN_PROMPTS = "between prompts"

Proxies = Mapping[str, Mapping[str, Any]]
"""Proxy name to prompt_id to (N,) values of all its responses, NaN where missing."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptPairs:
    """One prompt's truths and proxies, by name."""

    truths: dict[str, Numbers]
    proxies: dict[str, Numbers]
    reward_variance: float

    def pair(self, name: str, truth: str) -> Pair:
        """Proxy and truth with their replicates; one object, which keeps its sums."""
        return self._pairs[name, truth]

    @functools.cached_property
    def _pairs(self) -> dict[tuple[str, str], Pair]:
        return {
            (name, truth): Pair(x=self.proxies[name], y=self.truths[truth])
            for name in self.proxies
            for truth in self.truths
        }


def proxy_table(
    groups: Sequence[PromptScores],
    *,
    proxies: Proxies | None = None,
    advantage: str = "grpo",
    neighbours: int = NEIGHBOURS,
    level: float = 0.95,
    seed: int,
) -> pd.DataFrame:
    """Rank correlation and explained variance of every proxy, per prompt, pooled within prompts and between prompts.

    Quantities: "rank_correlation" (Spearman), "explained_variance" (R^2 of a straight line with a constant a prompt)
    and "explained_variance_log" (the same of the logs, over responses where both are positive), all by a delete-one
    jackknife of Fisher's z. With lengths lognormal and a law of L^2 the raw R^2 rests on the few longest responses and
    its interval covers less (benchmarks/calibration.md).
    Columns: `proxy`, `truth` ("norm_square" or "within"), `scope` ("within prompts", or "between prompts": the prompts'
    means, from 4 prompts on). Verdict "constant" where proxy or truth takes one value, "silent: all rewards equal" for
    prompts left out, "undetermined" where there are too few.

    Args:
        groups: Prompts by targets; several targets get their sum as well.
        proxies: Further proxies of the score's norm by name, for example {"entropy": {prompt_id: (N,)}}; each comes
            alone and times A^2.
        advantage: Kind of `advantages`, over all verified responses of a prompt; "score" leaves A out.
        neighbours: k of the within-length variance.
        level: Nominal coverage.
        seed: Breaks ties between neighbours in length.

    Returns:
        The table. Below 8 responses there is no interval, below 20 none of R^2 of logs inside prompts.

    Raises:
        GradvarError: Unknown advantage, or proxies whose shape does not fit their prompt.
    """
    check_level(level)
    check_advantage(advantage)
    rows: list[TableRow] = []
    for target, prompts in arrange(groups).items():
        labels: dict[str, Any] = {"target": target, "advantage": advantage}
        used: dict[str, PromptPairs] = {}
        for name, raw in prompts.items():
            n = len(raw.lengths) if advantage == "score" else int((~np.isnan(raw.rewards)).sum())
            nothing = why_nothing(raw, advantage)
            if nothing is not None or n < 3:
                why = nothing or "undetermined"
                why_none = f"not estimated; {nothing or 'fewer than 3 responses'}"
                none = no_estimate(why_none, n=n, level=level)
                extra = {"proxy": None, "truth": None}
                rows.append(
                    TableRow(
                        quantity="rank_correlation", estimate=none, prompt_id=name, verdict=why, extra=extra, **labels
                    )
                )
                continue
            used[name] = prompt_pairs(raw, advantage, proxies, neighbours=neighbours, seed=seed)
            rows += _rows([used[name]], labels | {"prompt_id": name}, WITHIN_PROMPTS, level)
        if len(used) > 1:
            rows += _rows(list(used.values()), labels, WITHIN_PROMPTS, level)
            rows += _rows(list(used.values()), labels, BETWEEN_PROMPTS, level)
    return estimate_table([replace(row, estimate=replace(row.estimate, seed=seed)) for row in rows])


def prompt_pairs(
    raw: PromptScores, advantage: str, given: Proxies | None = None, *, neighbours: int = NEIGHBOURS, seed: int
) -> PromptPairs:
    """One prompt's truths and proxies with what they become when a response is left out; arguments as `proxy_table`."""
    extra: dict[str, Array] = {}
    for name, by_prompt in (given or {}).items():
        if raw.prompt_id in by_prompt:
            values = np.asarray(by_prompt[raw.prompt_id], dtype=np.float64)
            if values.shape != raw.lengths.shape:
                raise GradvarError(
                    f"proxy {name!r} of prompt {raw.prompt_id!r} has shape {values.shape} "
                    f"for {len(raw.lengths)} responses"
                )
            extra[name] = values
    keep = np.ones(len(raw.lengths), dtype=bool) if advantage == "score" else ~np.isnan(raw.rewards)
    scores = raw.select(keep)
    factors = np.ones(len(scores.lengths))
    if advantage != "score":
        factors = advantages(scores.rewards, advantage, lengths=scores.lengths)
    codes, replicates = _replicates(scores, advantage)
    lengths = scores.lengths.astype(np.float64)
    bare = {"length": lengths, **{name: values[keep] for name, values in extra.items()}}

    def proxies_of(factors: Array) -> dict[str, Array]:
        if advantage == "score":
            return bare
        squares = factors**2
        weighted = {f"advantage_square_{name}": squares * values for name, values in bare.items()}
        return {**bare, "advantage_square": squares, **weighted}

    ties = generator(seed, raw.prompt_id, "neighbours")
    near = nearest_in_length(lengths, min(neighbours, len(lengths) - 1), rng=ties)

    def truths_of(factors: Array) -> dict[str, Array]:
        within = variance_among(weighted_gram(scores.gram, factors), near)
        return {"norm_square": factors**2 * np.diagonal(scores.gram), "within": within}

    known = raw.rewards[~np.isnan(raw.rewards)]

    def with_replicates(of: Callable[[Array], dict[str, Array]]) -> dict[str, Numbers]:
        moved = [of(x) for x in replicates]
        return {
            name: Numbers(values=values, codes=codes, moved=np.stack([m[name] for m in moved]))
            for name, values in of(factors).items()
        }

    return PromptPairs(
        truths=with_replicates(truths_of),
        proxies=with_replicates(proxies_of),
        reward_variance=float(known.var()) if known.size else math.nan,
    )


def _replicates(scores: PromptScores, advantage: str) -> tuple[NDArray[np.intp], Array]:
    """Advantages (replicates, N) of all responses with one left out of the baseline, and which response has which."""
    n = len(scores.lengths)
    if advantage in ("score", "raw"):
        factors = np.ones(n) if advantage == "score" else scores.rewards
        return np.zeros(n, dtype=np.intp), factors[None]
    centred = scores.rewards - scores.rewards.mean()
    p, q = affine_advantage(scores.rewards, advantage, scores.lengths.astype(np.float64))
    q = q + p * scores.rewards.mean()
    # Leaving out one of several equal rewards leaves the same advantages; opo's also depend on the length.
    left_out = np.stack([scores.rewards, scores.lengths if advantage == "opo" else 0.0 * scores.rewards], axis=1)
    _, first, codes = np.unique(left_out, axis=0, return_index=True, return_inverse=True)
    return codes.reshape(-1), p[1:][first, None] * centred + q[1:][first, None]


def _rows(prompts: list[PromptPairs], labels: dict[str, Any], scope: str, level: float) -> list[TableRow]:
    names = [name for name in prompts[0].proxies if all(name in p.proxies for p in prompts)]
    if scope == BETWEEN_PROMPTS:
        names.append("reward_variance")
    rows = []
    for truth in ("norm_square", "within"):
        for name in names:
            if scope == BETWEEN_PROMPTS:
                means = [
                    (p.reward_variance if name == "reward_variance" else float(np.nanmean(p.proxies[name].values)))
                    for p in prompts
                ]
                pairs = [Pair.of(np.array(means), np.array([float(p.truths[truth].values.mean()) for p in prompts]))]
            else:
                pairs = [p.pair(name, truth) for p in prompts]
            for quantity, estimate, verdict in predictions(pairs, level=level, between=scope == BETWEEN_PROMPTS):
                if scope == BETWEEN_PROMPTS:
                    n = sum(len(p.truths[truth].values) for p in prompts)
                    estimate = replace(estimate, n=n, clusters=len(prompts))
                extra = {"proxy": name, "truth": truth}
                rows.append(
                    TableRow(quantity=quantity, estimate=estimate, scope=scope, verdict=verdict, extra=extra, **labels)
                )
    return rows
