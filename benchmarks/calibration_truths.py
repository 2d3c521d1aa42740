"""What the simulated laws make true, without estimating it: exact means on a grid of lengths, or many drawn groups.

Shape letters: L lengths of the grid, n responses of a group, R rules.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from gradvar.estimators.advantages import advantages
from gradvar.estimators.aggregation import find_rule, scope_weights
from gradvar.estimators.best_alpha import fine_alphas, spline
from gradvar.estimators.law import fit_exponent
from tests.estimators import simulator

Array = NDArray[np.float64]
Truths = dict[str, float]
"""Quantity to its true value."""

GROUP = 8
GRID = tuple(0.5 * k for k in range(7))
"""Alphas."""
ALPHAS = (0.5, 1.0, 2.0)
"""Those of the paired ratios."""
RULES: tuple[tuple[str, float | None], ...] = (
    ("grpo", None),
    ("dapo", None),
    ("dr_grpo", None),
    *(("vl_norm", a) for a in GRID),
)
LONGEST = 3000.0
NATS = 0.5
"""-log pi of a token, on average."""
SCATTER = 0.125
"""Variance of W / L, whose mean is 1."""
LAW = {"dimensions", "decay", "beta", "signal", "drift", "p", "spread", "reward_slope"}


def label(rule: str, alpha: float | None) -> str:
    """Name of a rule in the table."""
    return rule if alpha is None else f"{rule} {alpha:g}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Moments:
    """Group moments of every rule for one law."""

    mean: Array
    """(R, 2) E ghat."""
    same: Array
    """(R,) E||ghat||^2."""
    norms: Array
    """(R,) E sum c^2 ||s||^2."""
    everyone: Array
    """(2,): E||ghat||^2 - ||E ghat||^2 and the norms of grpo with the baseline of all responses."""
    gradient: Array
    """(2,) grad J."""
    longer: Array
    """(2,) grad E[L]."""
    power: float
    """E ||(r - E r) s||^2."""


def group_moments_of(
    law: dict[str, Any],
    size: int = GROUP,
    responses: int = 480_000,
    rules: Sequence[tuple[str, float | None]] = RULES,
) -> Moments:
    """Moments by drawing groups of lengths and rewards; the noise given both is exact."""
    rng = np.random.default_rng([987, size])
    p_all, sd = _reward_mean(law)

    def coefficients(lengths: Array, rewards: Array) -> list[Array]:
        a = advantages(rewards, "grpo")
        made = [
            scope_weights(
                find_rule(name), lengths, lambda v: v.sum(axis=-1, keepdims=True), alpha=alpha, max_length=LONGEST
            )
            for name, alpha in rules
        ]
        return [*(x * a for x in made), made[0] * (rewards - p_all) / sd]

    mean, same, norms = simulator.moments_by_kind(
        coefficients, groups=responses // size, group_size=size, rng=rng, **law
    )
    z, lengths, chance = _grid(law)
    drift = law.get("drift", 0.0)
    v = (lengths / simulator.TYPICAL_LENGTH) ** law["beta"] + (drift * z) ** 2
    power = sum(
        float((share * (r - p_all) ** 2 * (v + (law["signal"] * (r - chance)) ** 2)).mean())
        for r, share in ((1.0, chance), (0.0, 1.0 - chance))
    )
    return Moments(
        mean=mean[:-1],
        same=same[:-1],
        norms=norms[:-1],
        everyone=np.array([same[-1] - float(mean[-1] @ mean[-1]), norms[-1]]),
        gradient=np.array([law["signal"] * float((chance * (1 - chance)).mean()), drift * float((chance * z).mean())]),
        longer=np.array([0.0, drift * float((lengths * z).mean())]),
        power=power,
    )


def cv_of(prompts: list[Moments]) -> float:
    """Pooled CV of the first rule."""
    same = sum(float(m.same[0]) for m in prompts)
    return math.sqrt(same / sum(float(m.mean[0] @ m.mean[0]) for m in prompts) - 1.0)


def group_truths(prompts: list[Moments]) -> Truths:
    """Everything that follows from the sums of moments over prompts."""
    same = np.sum([m.same for m in prompts], axis=0)
    cross = np.sum([(m.mean**2).sum(axis=1) for m in prompts], axis=0)
    mixed = np.sum([m.mean @ m.gradient for m in prompts], axis=0)
    direction = float(np.sum([m.gradient @ m.gradient for m in prompts]))
    longer = np.sum([m.mean @ m.longer for m in prompts], axis=0)
    rho, eta = cross / same, mixed**2 / (direction * same)
    cv = np.sqrt(1 / rho - 1)
    found: Truths = {}
    for k, (rule, alpha) in enumerate(RULES):
        name = label(rule, alpha)
        found |= {
            f"rho {name}": rho[k],
            f"cv {name}": cv[k],
            f"cv ratio {name}/grpo": cv[k] / cv[0],
            f"eta {name}": eta[k],
            f"cosine {name}": mixed[k] / math.sqrt(cross[k] * direction),
            f"scale {name}": mixed[k] / direction,
            f"length product {name}": longer[k],
            f"length pressure {name}": longer[k] / mixed[k],
            f"entropy pressure {name}": NATS * longer[k] / mixed[k],
        }
    between, _ = spline(GRID)
    for what, curve in (("eta", eta[3:]), ("cv", rho[3:])):
        found[f"alpha* by {what}"] = float(fine_alphas(GRID)[int(np.argmax(np.log(curve) @ between))])
    group = np.sum([m.same[0] - float(m.mean[0] @ m.mean[0]) for m in prompts])
    everyone = np.sum([m.everyone for m in prompts], axis=0)
    norms = np.sum([m.norms[0] for m in prompts])
    found["assumption 3: baseline ratio"] = group / everyone[0] * everyone[1] / norms
    found["noise scale grpo"] = GROUP * cv[0] ** 2
    found["noise scale of the gradient"] = sum(m.power for m in prompts) / direction - 1.0
    return found


def eta_ratio_truth(found: Truths, name: str, best: float) -> float:
    """Eta of a rule over VL Norm's at an alpha between the grid's."""
    between, _ = spline(GRID)
    weights = between[:, int(np.argmin(np.abs(fine_alphas(GRID) - best)))]
    curve = np.log([found[f"eta {label('vl_norm', alpha)}"] for alpha in GRID])
    return float(found[f"eta {name}"] / math.exp(curve @ weights))


def law_truths(prompts: list[dict[str, Any]]) -> Truths:
    """Exponents that the fits converge to: the quasi-score vanishes at the exact means given the length."""
    found: Truths = {}
    for advantage in ("score", "grpo"):
        sizes = [_grid(law)[1] for law in prompts]
        parts = [conditional_variances(law, advantage, x) for law, x in zip(prompts, sizes, strict=True)]
        codes = np.repeat(np.arange(len(parts)), [len(x) for x in sizes])
        for k, what in enumerate(("deviation", "within")):
            fit = fit_exponent(np.concatenate(sizes), np.concatenate([p[k] for p in parts]), clusters=codes)
            found[f"{what} exponent, {advantage}"] = fit.exponent.value
    return found


def audit_truths(prompts: list[dict[str, Any]], shares: list[float], bins: int, shift: float) -> Truths:
    """Assumptions 0, 1 and 4 for prompts with these laws."""
    means, norms, between, whole = 0.0, 0.0, 0.0, 0.0
    tau = 0.0
    for law, share in zip(prompts, shares, strict=True):
        z, lengths, chance = _grid(law)
        squares = (lengths / simulator.TYPICAL_LENGTH) ** law["beta"]
        squares = squares + law["signal"] ** 2 * chance * (1 - chance) + (law.get("drift", 0.0) * z) ** 2
        size = float(squares.mean()) + shift**2
        means, norms, tau = means + shift**2, norms + size, tau + (1 - share) * size
        p_all, sd = _reward_mean(law)
        along = np.stack(
            [law["signal"] * chance * (1 - chance) / sd, law.get("drift", 0.0) * z * (chance - p_all) / sd], axis=1
        )
        middle = along.mean(axis=0)
        by_bin = [part.mean(axis=0) for part in np.array_split(along, bins)]
        between += float(np.mean([((m - middle) ** 2).sum() for m in by_bin]))
        whole += float(middle @ middle)
    return {
        "assumption 0: identity": GROUP * means / norms,
        "assumption 1: token share": 1 - tau / norms,
        "assumption 4: between lengths": between / whole,
    }


def proxy_truths(law: dict[str, Any], count: int = 200_000) -> Truths:
    """Rank correlation and explained variance of L, W, A^2 L and A^2 W for ||g||^2, in a large sample; R^2 exactly.

    Fourth moments of lognormal lengths: a sample of 200 000 misses R^2 by up to 0.01.
    """
    rng = np.random.default_rng(654)
    p_all, sd = _reward_mean(law)
    names = ("length", "advantage_square_length", "entropy", "advantage_square_entropy", "norm")
    x: dict[str, list[Array]] = {name: [] for name in names}
    for _ in range(count // 20_000):
        scores, rewards, lengths = simulator.draw(20_000, rng=rng, **{k: v for k, v in law.items() if k in LAW})
        square = ((rewards - p_all) / sd) ** 2
        x["length"].append(lengths)
        x["advantage_square_length"].append(square * lengths)
        x["entropy"].append(lengths * rng.gamma(1.0 / SCATTER, SCATTER, len(lengths)))
        x["advantage_square_entropy"].append(square * x["entropy"][-1])
        x["norm"].append(square * (scores**2).sum(axis=1))
    sample = {k: np.concatenate(v) for k, v in x.items()}
    norm = sample.pop("norm")
    found: Truths = {}
    for name, proxy in sample.items():
        found[f"proxy {name}: rank correlation"] = float(stats.spearmanr(proxy, norm).statistic)
        scatter = SCATTER if name.endswith("entropy") else 0.0
        found[f"proxy {name}: R^2"] = _explained(law, weighted=name.startswith("advantage"), scatter=scatter)
        found[f"proxy {name}: R^2 of logs"] = float(np.corrcoef(np.log(proxy), np.log(norm))[0, 1] ** 2)
    return found


def _explained(law: dict[str, Any], *, weighted: bool, scatter: float) -> float:
    """R^2 of L, or of A^2 L, times a number of mean 1 and variance `scatter`, for ||g||^2: sums over what is drawn."""
    spread, p = law.get("spread", 0.6), law.get("p", 0.4)
    normal = np.linspace(-8.0, 8.0, 20_001)
    density = stats.norm.pdf(normal) / stats.norm.pdf(normal).sum()
    lengths = np.clip(np.round(simulator.TYPICAL_LENGTH * np.exp(spread * normal)), 2, LONGEST)
    z = np.log(lengths / simulator.TYPICAL_LENGTH) / spread
    chance = 1.0 / (1.0 + (1.0 / p - 1.0) * np.exp(-law.get("reward_slope", 0.0) * z))
    v, c = (lengths / simulator.TYPICAL_LENGTH) ** law["beta"], simulator.spectrum(law["dimensions"], law["decay"]) ** 2
    p_all = float(density @ chance)
    moments = np.zeros(5)
    for reward, share in ((1.0, density * chance), (0.0, density * (1.0 - chance))):
        square = (reward - p_all) ** 2 / (p_all * (1.0 - p_all))
        along = [(law["signal"] * (reward - chance)) ** 2, (law.get("drift", 0.0) * z) ** 2]
        mean = v + along[0] + along[1]
        fourth = mean**2 + 2.0 * v**2 * float(c @ c) + 4.0 * v * (c[-1] * along[0] + c[-2] * along[1])
        x = square * lengths if weighted else lengths
        for k, value in enumerate((x, (1.0 + scatter) * x**2, square * mean, square**2 * fourth, x * square * mean)):
            moments[k] += float(share @ value)
    one, one_square, two, two_square, both = moments
    return float((both - one * two) ** 2 / ((one_square - one**2) * (two_square - two**2)))


def signal_for(cv: float, law: dict[str, Any]) -> float:
    """Signal at which GRPO's CV is `cv`, by bisection."""
    low, high = 0.01, 20.0
    for _ in range(14):
        middle = math.sqrt(low * high)
        m = group_moments_of({**law, "signal": middle}, responses=160_000, rules=RULES[:1])
        low, high = (middle, high) if cv_of([m]) > cv else (low, middle)
    return round(math.sqrt(low * high), 3)


def grid_of(law: dict[str, Any]) -> Array:
    """Lengths (L,) at equally likely quantiles."""
    return _grid(law)[1]


def _grid(law: dict[str, Any], count: int = 2000) -> tuple[Array, Array, Array]:
    """Lengths at equally likely quantiles: z, L and p(L)."""
    spread, p = law.get("spread", 0.6), law.get("p", 0.4)
    normal = stats.norm.ppf((np.arange(count) + 0.5) / count)
    lengths = np.clip(np.round(simulator.TYPICAL_LENGTH * np.exp(spread * normal)), 2, LONGEST)
    z = np.log(lengths / simulator.TYPICAL_LENGTH) / spread
    return z, lengths, 1.0 / (1.0 + (1.0 / p - 1.0) * np.exp(-law.get("reward_slope", 0.0) * z))


def _reward_mean(law: dict[str, Any]) -> tuple[float, float]:
    p = float(_grid(law)[2].mean())
    return p, math.sqrt(p * (1 - p))


def gradient_of(law: dict[str, Any]) -> Array:
    """(2,) grad J for g = A s with the population's grpo advantage."""
    z, _, chance = _grid(law)
    sd = _reward_mean(law)[1]
    return (
        np.array(
            [law["signal"] * float((chance * (1 - chance)).mean()), law.get("drift", 0.0) * float((chance * z).mean())]
        )
        / sd
    )


def conditional_variances(law: dict[str, Any], advantage: str, lengths: Array) -> tuple[Array, Array]:
    """E[||g - E g||^2 | L] and E[||g - E[g | L]||^2 | L] at these lengths."""
    everywhere, _, usual = _grid(law)
    z = np.log(lengths / simulator.TYPICAL_LENGTH) / law.get("spread", 0.6)
    chance = 1.0 / (1.0 + (1.0 / law.get("p", 0.4) - 1.0) * np.exp(-law.get("reward_slope", 0.0) * z))
    middle = _by_reward(law, advantage, everywhere, usual)[0].mean(axis=1)
    inside, parts = _by_reward(law, advantage, z, chance)
    v = (lengths / simulator.TYPICAL_LENGTH) ** law["beta"]
    within = sum(weight * (a**2 * v + ((axes - inside) ** 2).sum(axis=0)) for weight, a, axes in parts)
    return np.asarray(within + ((inside - middle[:, None]) ** 2).sum(axis=0)), np.asarray(within)


def _by_reward(
    law: dict[str, Any], advantage: str, z: Array, chance: Array
) -> tuple[Array, list[tuple[Array, Array, Array]]]:
    """(2, .) E[g | L], and of either reward its chance, A and mean g."""
    p_all, sd = _reward_mean(law)
    parts = []
    for reward, weight in ((1.0, chance), (0.0, 1.0 - chance)):
        a = np.full_like(z, 1.0 if advantage == "score" else (reward - p_all) / sd)
        parts.append((weight, a, a * np.stack([law["signal"] * (reward - chance), law.get("drift", 0.0) * z])))
    return np.asarray(sum(weight * axes for weight, _, axes in parts)), parts
