"""DAPO's extras of simulated prompts, and the share of silent groups of one and of several, beside their truth.

Shape letters: N responses of a prompt, K prompts, n of a group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special

from benchmarks.calibration_truths import GROUP, gradient_of
from gradvar.estimators import extras_table
from gradvar.estimators.advantages import advantages
from gradvar.estimators.intervals import PROMPTS_LIKE_THESE, THESE_PROMPTS
from gradvar.estimators.silent_shares import silent_rows
from gradvar.runs.records import Estimate, PromptScores
from tests.estimators import simulator

Array = NDArray[np.float64]

LONGEST, BUFFER = 400.0, 80.0
"""Tokens: 5% of the responses are truncated, 10% punished."""
SILENT = {
    "rewards, chances around a half": (2.0, 2.0),
    "rewards, chances near 0 or 1": (0.5, 0.5),
    "rewards, mostly right": (3.0, 0.5),
    "rewards, mostly wrong": (0.5, 20.0),
    "rewards, all chances a half": (1e6, 1e6),
    "rewards of four values": (1.0, 1.0, 1.0, 1.0),
}
"""Settings by name: parameters of the Dirichlet distribution of a prompt's chances of each reward."""
EXTRAS = ("none", "overlong filtering", "soft overlong punishment", "dynamic sampling")
RULES = ("grpo", "dapo")
PERMUTATIONS = 256
RESPONSES = 960_000
"""Behind every truth."""
NUMBERS = ("value", "low", "high", "level", "method", "n", "clusters", "seed")


def extras_intervals(
    prompts: Sequence[PromptScores], laws: Sequence[dict[str, Any]], seed: int
) -> Iterator[tuple[str, float, Estimate]]:
    """Yield quantity, truth and estimate, as `extras_table` makes it, over all prompts together."""
    cut = [replace(s, truncated=s.lengths >= LONGEST, max_length=int(LONGEST)) for s in prompts]
    options: dict[str, Any] = {"rules": RULES, "alphas": (), "group_size": GROUP, "buffer": BUFFER}
    table = extras_table(cut, **options, permutations=PERMUTATIONS, seed=seed)
    rows = table[table["estimand"] == THESE_PROMPTS]
    rows = rows[rows["prompt_id"].isna()] if len(prompts) > 1 else rows
    truths = _truths([moments_of_extras(tuple(sorted(law.items()))) for law in laws])
    for row in rows.to_dict("records"):
        truth = truths.get((row["rule"], row["extra"], row["quantity"]))
        if truth is not None:
            name = f"extras: {row['quantity'].replace('_', ' ')}, {row['extra']}, {row['rule']}"
            yield name, truth, Estimate(**{key: row[key] for key in NUMBERS})


@cache
def moments_of_extras(law: tuple[tuple[str, Any], ...]) -> tuple[Array, Array, Array]:
    """E ghat (R, 2), E||ghat||^2 (R,) of every rule and extra in turn, and grad J (2,): many drawn groups."""
    known = dict(law)
    count = RESPONSES // GROUP
    loud: list[float] = []

    def coefficients(lengths: Array, rewards: Array) -> list[Array]:
        kept = lengths < LONGEST
        punished = rewards + np.clip((LONGEST - BUFFER - lengths) / BUFFER, -1.0, 0.0)
        some = rewards.max(axis=1) > rewards.min(axis=1)
        loud.append(float(some.mean()))
        found = []
        for rule in RULES:

            def weights(kept: Any, rule: str = rule) -> Array:
                if rule == "grpo":
                    return np.asarray(kept / lengths / np.maximum(np.sum(kept, axis=1), 1)[:, None])
                return np.asarray(kept / np.maximum((kept * lengths).sum(axis=1), 1)[:, None])

            plain = weights(np.ones_like(lengths)) * advantages(rewards, "grpo")
            found += [
                plain,
                weights(kept) * advantages(rewards, "grpo"),
                weights(np.ones_like(lengths)) * advantages(punished, "grpo"),
                plain * some[:, None],
            ]
        return found

    rng = np.random.default_rng([988, count])
    mean, same, _ = simulator.moments_by_kind(coefficients, groups=count, group_size=GROUP, rng=rng, **known)
    share = float(np.mean(loud))
    given = np.array([1.0, 1.0, 1.0, 1.0 / share] * len(RULES))
    return mean * given[:, None], same * given, gradient_of(known)


def _truths(prompts: Sequence[tuple[Array, Array, Array]]) -> dict[tuple[str, str, str], float]:
    """By rule, extra and quantity, from the sums over prompts."""
    same = np.sum([s for _, s, _ in prompts], axis=0)
    cross = np.sum([(m**2).sum(axis=1) for m, _, _ in prompts], axis=0)
    mixed = np.sum([m @ aim for m, _, aim in prompts], axis=0)
    cv = np.sqrt(same / cross - 1.0)
    cosine = mixed / np.sqrt(cross * float(np.sum([aim @ aim for _, _, aim in prompts])))
    found: dict[tuple[str, str, str], float] = {}
    for k, rule in enumerate(RULES):
        plain = k * len(EXTRAS)
        for e, extra in enumerate(EXTRAS):
            found[rule, extra, "cv"] = float(cv[plain + e])
            if e:
                found[rule, extra, "cv_ratio"] = float(cv[plain + e] / cv[plain])
                found[rule, extra, "cosine_difference"] = float(cosine[plain + e] - cosine[plain])
    return found


def silent_intervals(name: str, prompts: int, n: int, seed: list[int]) -> Iterator[tuple[str, str, float, Estimate]]:
    """Yield quantity, estimand, truth and estimate of K prompts' shares, as `silent_rows` makes them."""
    parameters = np.array(SILENT[name])
    rng = np.random.default_rng(seed)
    chances = rng.dirichlet(parameters, prompts)
    rewards = np.stack([rng.choice(len(own), size=n, p=own) for own in chances]).astype(float)
    empty = np.zeros((n, n))
    scores = [
        PromptScores(
            prompt_id=f"p{k}",
            target="layer",
            gram=empty,
            rewards=own,
            lengths=np.ones(n),
            truncated=np.zeros(n, dtype=bool),
            max_length=1,
        )
        for k, own in enumerate(rewards)
    ]
    # Each chance is beta distributed, and E p^n = B(a + n, b) / B(a, b).
    rest = parameters.sum() - parameters
    everywhere = float(np.exp(special.betaln(parameters + GROUP, rest) - special.betaln(parameters, rest)).sum())
    truths = {
        THESE_PROMPTS: float((chances**GROUP).sum(axis=1).mean()),
        PROMPTS_LIKE_THESE: everywhere,
    }
    for row in silent_rows(scores, (GROUP,), {"target": "layer"}, level=0.95, seed=0):
        estimand = str(row.extra["estimand"])
        yield "silent share", estimand, truths[estimand], row.estimate
