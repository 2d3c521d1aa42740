"""The gradient noise scale of a prompt, in responses: tr Sigma / ||grad J||^2, of no rule and no group size.

With mu = E r of the prompt (what the rloo and the all-response baseline tend to), on policy:

    g = (r - mu) s,   grad J = E g,   Sigma = Cov(g),   tr Sigma = E ||g||^2 - ||grad J||^2

so a mean over n responses with a known baseline has CV^2 = noise scale / n. (With rloo inside a group of n its variance
is larger by a factor of about n / (n - 1); a rule's own noise scale, weights, advantage and silent groups in it, is
n CV^2 of the table `planning`.) Neither moment is estimated with a product of a response with itself beside ||s||^2:

    E ||g||^2     mean over different i, j, k      of (r_i - r_j) (r_i - r_k) S_ii
    ||grad J||^2  mean over different i, j, k, l   of (r_i - r_k) (r_j - r_l) S_ij

both unbiased, each a sum of N^2 terms: with R = sum r, R2 = sum r^2, U_a = sum_i S_ii r_i^a and
T_ab = sum_(i != j) S_ij r_i^a r_j^b

    sum over i, j, k      N (N - 1) U_2 - 2 R (N - 1) U_1 + (R^2 - R2) U_0
    sum over i, j, k, l   ((N - 1)^2 + 1 - N) T_11 + 2 (N - 1) T_20 - 2 R (N - 1) T_10 + (R^2 - R2) T_00

The interval is that of rho = ||grad J||^2 / E ||g||^2 for a group of one, noise scale = 1 / rho - 1 (`cv`): delete-one
jackknife, unresolved with its lower end where ||grad J||^2 is not told apart from 0.
Shape letters: N responses, K prompts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from gradvar.estimators.cv import SILENT, Needed, cv_from_rho, n_to_resolve, pooled_rho, resolution
from gradvar.estimators.groups import GroupMoments
from gradvar.estimators.inputs import arrange, is_silent
from gradvar.estimators.intervals import PROMPTS_LIKE_THESE, THESE_PROMPTS, check_level
from gradvar.estimators.pairs import Array, centred, covariance_of_centred
from gradvar.runs.records import Estimate, PromptScores, TableRow, estimate_table, no_estimate

QUANTITY = "gradient_noise_scale"
LEAST = 5
"""Responses of which four are left in a replicate."""
_METHOD = "tr Sigma / ||grad J||^2, A = r - E r, products of different responses"


def noise_scale_table(groups: Sequence[PromptScores], *, level: float = 0.95, seed: int | None = None) -> pd.DataFrame:
    """Noise scale of every prompt and target, and of the prompts pooled: sum tr Sigma_q / sum ||grad J_q||^2.

    Args:
        groups: Prompts by targets; several targets get their sum as well.
        level: Nominal coverage.
        seed: Written into the rows; nothing here is random.

    Returns:
        Rows "gradient_noise_scale" in responses; verdict "resolved", "unresolved" (then `low` is a lower bound and
        `n_needed` the responses a prompt that would resolve it) or "silent: all rewards equal". Silent prompts and
        those with fewer than 5 verified responses are in no pooled row; pooled rows come for both estimands.
    """
    check_level(level)
    rows: list[TableRow] = []
    for target, prompts in arrange(groups).items():
        found: dict[str, GroupMoments] = {}
        for name, raw in prompts.items():
            scores = raw.verified()
            n = len(scores.lengths)
            if is_silent(raw) or n < LEAST:
                why = SILENT if is_silent(raw) else f"fewer than {LEAST} verified responses"
                none = no_estimate(f"{_METHOD}; not estimated; {why}", n=n, level=level, seed=seed)
                rows.append(_row(none, SILENT if is_silent(raw) else "unresolved", target, name, None))
                continue
            found[name] = noise_moments(scores.gram, scores.rewards)
            rho = pooled_rho([found[name]], group_size=1, level=level)[0]
            rows.append(_judged(rho, target, name, seed, THESE_PROMPTS))
        if found and len(prompts) > 1:
            both = pooled_rho(list(found.values()), group_size=1, level=level)
            for rho, estimand in zip(both, (THESE_PROMPTS, PROMPTS_LIKE_THESE), strict=True):
                rows.append(_judged(rho, target, None, seed, estimand))
    return estimate_table(rows)


def noise_moments(gram: Array, rewards: Array) -> GroupMoments:
    """E ||g||^2 as `same` and ||grad J||^2 as `cross`, with their delete-one replicates.

    Args:
        gram: (N, N) score Gram, N at least 5.
        rewards: (N,) verified rewards.
    """
    r = rewards - rewards.mean()  # no moment changes, and nothing cancels
    n = len(r)
    own = np.diagonal(gram)
    powers = np.stack([np.ones(n), r, r**2])
    beyond = (gram - np.diag(own)) @ powers.T  # (N, 3): sum over the others of S_ij r_j^b
    u = own * powers
    t11, t20, t10, t00 = powers[1] * beyond[:, 1], powers[2] * beyond[:, 0], powers[1] * beyond[:, 0], beyond[:, 0]
    back20, back10 = beyond[:, 2], beyond[:, 1]
    first, second = np.array([r.sum(), (r**2).sum()])
    whole = _moments(n, first, second, u.sum(axis=1), np.array([t.sum() for t in (t11, t20, t10, t00)]))
    without = _moments(
        n - 1,
        first - r,
        second - r**2,
        u.sum(axis=1)[:, None] - u,
        np.stack([t11.sum() - 2 * t11, t20.sum() - t20 - back20, t10.sum() - t10 - back10, t00.sum() - 2 * t00]),
    )
    zeros = np.zeros(n)
    kernels = centred((gram * np.outer(r, r))[None])
    influence = np.stack([one.mean() - one for one in (np.asarray(without[0]), np.asarray(without[1]))])
    return GroupMoments(
        same=float(whole[0]),
        cross=float(whole[1]),
        same_without=np.asarray(without[0]),
        cross_without=np.asarray(without[1]),
        same_noise=zeros,  # no permutations
        cross_noise=zeros,
        kind=0,
        pairs=covariance_of_centred(kernels),
        bend=2.0 / (n * (n - 1.0)) * (influence @ kernels[0] @ influence.T),
    )


def _moments(n: int, first: Array, second: Array, u: Array, t: Array) -> tuple[Array, Array]:
    """The two means from N, R, R2, U (3, ...) and T_11, T_20, T_10, T_00 (4, ...)."""
    pairs = first**2 - second
    norms = n * (n - 1) * u[2] - 2 * first * (n - 1) * u[1] + pairs * u[0]
    signal = ((n - 1) ** 2 + 1 - n) * t[0] + 2 * (n - 1) * t[1] - 2 * first * (n - 1) * t[2] + pairs * t[3]
    triples = n * (n - 1) * (n - 2)
    return norms / triples, signal / (triples * (n - 3))


def _judged(rho: Estimate, target: str, prompt_id: str | None, seed: int | None, estimand: str) -> TableRow:
    cv = cv_from_rho(rho)
    method = rho.method.replace("permutation groups", _METHOD)
    scale = replace(cv, value=cv.value**2, low=cv.low**2, high=cv.high**2, method=method, seed=seed)
    return _row(
        scale, resolution(rho), target, prompt_id, n_to_resolve(rho, 1) if estimand == THESE_PROMPTS else None, estimand
    )


def _row(
    estimate: Estimate,
    verdict: str,
    target: str,
    prompt_id: str | None,
    needed: Needed | None,
    estimand: str = THESE_PROMPTS,
) -> TableRow:
    return TableRow(
        quantity=QUANTITY,
        estimate=estimate,
        target=target,
        prompt_id=prompt_id,
        advantage="rloo",
        verdict=verdict,
        extra={
            "estimand": estimand,
            "n_needed": math.nan if needed is None else needed.n,
            "n_needed_at_least": needed is not None and needed.at_least,
        },
    )
