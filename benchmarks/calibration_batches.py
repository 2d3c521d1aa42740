"""Intervals of batches of several prompts, beside the truth of a population of prompts.

Every prompt has its own mean gradient (a common direction and one of its own), lengths and success rate. The truth is
drawn: many batches, each prompt with two independent groups, so that power, given and signal are had without bias.
Shape letters: K prompts, N responses of each, B prompts of a batch, n of a group, d dimensions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.calibration_draws import LIKE
from benchmarks.calibration_simulated import Found
from gradvar.estimators import find_rule
from gradvar.estimators.aggregation import scope_weights
from gradvar.estimators.batch_tables import batch_table
from tests.estimators.population import exact_products, prompt_scores, signed_sketch

Array = NDArray[np.float64]

GROUP, BATCHES = 8, (2, 4, 64)
"""n; and B. Batches beyond a third of the prompts are extrapolated by the table."""
RULES: tuple[tuple[str, float | None], ...] = (("grpo", None), ("dapo", None), ("vl_norm", 1.0))
DIMENSIONS, LONGEST = 24, 400.0
TRUE_PROMPTS = 600_000


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """s = noise sqrt(L) + (r - p_q) L (common + own_q)."""

    signal: float
    """Length of the common mean."""
    between: float
    """Root mean square of a prompt's own."""
    noise: float

    def draw(self, prompts: int, responses: int, rng: np.random.Generator) -> tuple[Array, Array, Array]:
        """Gradients (K, N, d), rewards and lengths (K, N)."""
        own = rng.normal(size=(prompts, 1, DIMENSIONS)) * self.between / math.sqrt(DIMENSIONS)
        common = np.full(DIMENSIONS, self.signal / math.sqrt(DIMENSIONS))
        p = rng.uniform(0.25, 0.75, (prompts, 1))
        typical = rng.uniform(30.0, 120.0, (prompts, 1))
        lengths = np.clip(np.round(typical * np.exp(rng.normal(0.0, 0.5, (prompts, responses)))), 4, LONGEST)
        rewards = (rng.random((prompts, responses)) < p).astype(float)
        noise = rng.normal(size=(prompts, responses, DIMENSIONS)) * (self.noise * np.sqrt(lengths))[..., None]
        mean = ((rewards - p) * lengths)[..., None] * (common + own)
        return noise + mean, rewards, lengths


POPULATIONS = {
    "batches, prompts alike": Prompts(signal=0.4, between=0.3, noise=2.0),
    "batches, prompts differ": Prompts(signal=0.3, between=1.2, noise=2.0),
}
"""Settings by name."""


@cache
def batch_truths(name: str) -> dict[str, float]:
    """Power, given and signal of every rule, scope and B, as the quantities they make."""
    rng = np.random.default_rng([15, *name.encode()])
    found: dict[str, float] = {}
    for size in BATCHES:
        count = TRUE_PROMPTS // size
        chunk = max(2, 4096 // size)
        sums: dict[tuple[str, float | None, str], list[Any]] = {}
        for _ in range(max(1, count // chunk)):
            gradients, rewards, lengths = POPULATIONS[name].draw(chunk * size, 2 * GROUP, rng)
            halves = rewards.reshape(chunk, size, 2, GROUP)
            factors = halves - halves.mean(axis=-1, keepdims=True)
            cut = lengths.reshape(chunk, size, 2, GROUP)
            vectors = gradients.reshape(chunk, size, 2, GROUP, DIMENSIONS)
            for rule, alpha in RULES:
                for scope, axes in (("prompt group", (3,)), ("batch", (1, 3))):
                    weights = _weights(rule, alpha, cut, axes) / (1 if scope == "batch" else size)
                    updates = np.einsum("bqhn,bqhnd->bhd", weights * factors, vectors)
                    row = sums.setdefault((rule, alpha, scope), [0.0, 0.0, np.zeros(DIMENSIONS), 0])
                    row[0] += 0.5 * float((updates**2).sum())
                    row[1] += float((updates[:, 0] * updates[:, 1]).sum())
                    row[2] = row[2] + 0.5 * updates.sum(axis=(0, 1))
                    row[3] += chunk
        moments = {}
        for key, (power, given, total, drawn) in sums.items():
            power, given, mean = power / drawn, given / drawn, total / drawn
            one = 0.5 * (power + given)  # of a batch's mean of two, whose own noise is taken out of the square
            moments[key] = (power, given, float((drawn * (mean @ mean) - one) / (drawn - 1)))
        for (rule, alpha, scope), (power, given, signal) in moments.items():
            label = _label(rule, alpha, scope, size)
            cv = math.sqrt(power / signal - 1.0)
            found[f"rho {label}|{LIKE}"], found[f"cv {label}|{LIKE}"] = signal / power, cv
            found[f"rho given the prompts {label}|{LIKE}"] = given / power
            found[f"between-prompt share {label}|{LIKE}"] = (given - signal) / (power - signal)
            if rule != "grpo":
                top, _, below = moments["grpo", None, scope]
                found[f"cv ratio {label}|{LIKE}"] = cv / math.sqrt(top / below - 1.0)
    return found


def _weights(rule: str, alpha: float | None, lengths: Array, axes: tuple[int, ...]) -> Array:
    return np.asarray(
        scope_weights(
            find_rule(rule), lengths, lambda x: x.sum(axis=axes, keepdims=True), alpha=alpha, max_length=LONGEST
        )
    )


def _label(rule: str, alpha: float | None, scope: str, size: int) -> str:
    name = rule if alpha is None else f"{rule} {alpha:g}"
    return f"{name}, batch of {size}" + ("" if rule == "grpo" else f" weighted by {scope}")


_QUANTITIES = {
    "rho": "rho",
    "rho_given_prompts": "rho given the prompts",
    "cv": "cv",
    "between_share": "between-prompt share",
    "cv_ratio": "cv ratio",
}


def batch_intervals(name: str, prompts: int, n: int, seed: list[int], *, sketched: bool) -> list[Found]:
    """Draw K prompts once, and every interval of `batch_table` beside its truth."""
    rng = np.random.default_rng(seed)
    gradients, rewards, lengths = POPULATIONS[name].draw(prompts, n, rng)
    scores = [
        prompt_scores(f"p{k}", s, r, length)
        for k, (s, r, length) in enumerate(zip(gradients, rewards, lengths, strict=True))
    ]
    flat = list(gradients)
    products = signed_sketch(scores, flat, seed=seed[-1], width=16) if sketched else exact_products(scores, flat)
    table = batch_table(
        scores,
        {"layer": products},
        rules=("grpo", "dapo", "vl_norm"),
        alphas=(1.0,),
        group_size=GROUP,
        batch_prompts=BATCHES,
        advantage="mean",
        permutations=32,
        seed=seed[-1],
    )
    truths = batch_truths(name)
    found = []
    for row in table.to_dict("records"):
        quantity = _QUANTITIES.get(row["quantity"])
        if quantity is None:
            continue
        alpha = None if math.isnan(row["alpha"]) else float(row["alpha"])
        label = f"{quantity} {_label(row['rule'], alpha, row['scope'], int(row['batch_prompts']))}"
        truth = truths.get(f"{label}|{row['estimand']}")
        if truth is None:
            continue
        found.append(
            Found(
                quantity=f"{label}{', extrapolated' if row['extrapolated'] else ''}",
                estimand=row["estimand"],
                truth=truth,
                value=float(row["value"]),
                low=float(row["low"]),
                high=float(row["high"]),
            )
        )
    return found
