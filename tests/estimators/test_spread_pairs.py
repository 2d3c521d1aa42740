"""What pairs of responses add to the error of exponents, against sums written out from gradients."""

import itertools
import math

import numpy as np
import pytest

from gradvar.estimators import law_table
from gradvar.estimators.law_samples import pairs_of, sample_of
from gradvar.estimators.spread_pairs import deviation_form, noise_squares, pair_variance, within_form
from tests.estimators import simulator


def drawn(n: int, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, 7)), rng.permutation(np.arange(10, 10 + n)).astype(float)


def test_forms_are_the_sums_they_stand_for() -> None:
    """The mean is over 12 responses, of which the 3 that are not fitted are put at 0: they are left out of the form."""
    g, _ = drawn(9, seed=1)
    rng = np.random.default_rng(2)
    near = np.array([rng.choice([j for j in range(9) if j != i], 3, replace=False) for i in range(9)])
    q = rng.normal(size=9)
    mean = sum(g) / 12
    deviation = sum(q[i] * float((g[i] - mean) @ (g[i] - mean)) for i in range(9))
    within = 0.0
    for i in range(9):
        apart = g[i] - sum(g[j] for j in near[i]) / 3
        within += q[i] * 3 / 4 * float(apart @ apart)
    for form, expected in ((deviation_form(12), deviation), (within_form(near), within)):
        found = sum(form(q)[i, j] * float(g[i] @ g[j]) for i in range(9) for j in range(9))
        assert found == pytest.approx(expected, rel=1e-12)


def test_squares_of_products_between_differences_of_neighbours_in_length() -> None:
    g, lengths = drawn(8, seed=3)
    order = sorted(range(8), key=lambda i: lengths[i])
    found = noise_squares(g @ g.T, lengths, rng=np.random.default_rng(0))
    for a, i in enumerate(order):
        for b, j in enumerate(order):
            if a < b:
                expected = 0.0
                if a > 0 and b < 7:
                    expected = (0.5 * float((g[i] - g[order[a - 1]]) @ (g[j] - g[order[b + 1]]))) ** 2
                assert found[i, j] == found[j, i] == pytest.approx(expected, rel=1e-12, abs=1e-15)
    assert not np.diagonal(found).any()


def test_variance_is_that_of_a_form_of_noise_where_the_mean_moves_slowly() -> None:
    """The form has no diagonal, so all of its variance comes from pairs; sd of the mean of 4000 draws: 2%."""
    n, rng = 12, np.random.default_rng(4)
    form = rng.normal(size=(n, n))
    form = form + form.T
    form[[0, -1]] = form[:, [0, -1]] = 0.0
    np.fill_diagonal(form, 0.0)
    lengths = np.arange(1.0, n + 1)
    moving = (30.0 + 0.05 * lengths[:, None]) * np.ones(5)
    values, estimates = [], []
    for _ in range(4000):
        e = rng.normal(size=(n, 5))
        values.append(float((form * (e @ e.T)).sum()))
        g = e + moving
        estimates.append(pair_variance(form, noise_squares(g @ g.T, lengths, rng=rng)))
    assert np.mean(estimates) == pytest.approx(np.var(values), rel=0.1)


def test_prompts_add_up_but_for_small_ones_and_the_difference_of_two_sums_is_one_form() -> None:
    prompts = [simulator.prompt(f"p{k}", n, rng=np.random.default_rng([5, k])) for k, n in enumerate((66, 64, 63))]
    samples = [sample_of(p, p.rewards >= 0, "score", seed=1, neighbours=3, left_out=0) for p in prompts]
    q = np.random.default_rng(6).normal(size=193)
    expected = 0.0
    for sample, part in zip(samples[:2], (q[:66], q[66:130]), strict=True):
        form = sample.forms["deviation"](part) - sample.forms["within"](part)
        for i in range(len(part)):
            for j in range(i):
                expected += (2.0 * form[i, j]) ** 2 * sample.noise[i, j]
    assert pairs_of(samples, {"deviation": q, "within": -q}) == pytest.approx(expected, rel=1e-12)


def test_a_reward_class_has_the_pairs_of_its_own_responses() -> None:
    """Its advantage is one number, so the pairs add to its exponent's error what they add to the score's."""
    prompt = simulator.prompt("p", 150, rng=np.random.default_rng(7))
    chosen = prompt.rewards == 0
    q = np.random.default_rng(8).normal(size=int(chosen.sum()))
    score, weighted = (sample_of(prompt, chosen, kind, seed=1, neighbours=5, left_out=0) for kind in ("score", "grpo"))
    factor = weighted.within[0] / score.within[0]
    found = pairs_of([weighted], {"within": q}) / factor**2
    assert found == pytest.approx(pairs_of([score], {"within": q}), rel=1e-9)


def test_the_band_of_a_law_is_one_of_level_and_exponent() -> None:
    """Half-width of log v(L) is sqrt(level^2 + exponent^2 log(L / reference)^2) at one token too, pairs taken out."""
    prompt = simulator.prompt("p", 80, rng=np.random.default_rng(3), decay=0.4)
    table = law_table([prompt], advantages_studied=["score", "grpo"], seed=1).query("scope == 'all responses'")
    for advantage, what in itertools.product(("score", "grpo"), ("deviation", "within")):
        rows = {
            row["quantity"]: row
            for row in table.to_dict("records")
            if row["advantage"] == advantage and row["quantity"].startswith(what)
        }
        level, scale, beta = (rows[f"{what}_{name}"] for name in ("level", "scale", "exponent"))
        half = math.hypot(
            math.log(level["high"] / level["value"]),
            (beta["high"] - beta["value"]) * math.log(level["reference_length"]),
        )
        assert math.log(scale["high"] / scale["value"]) == pytest.approx(half, rel=1e-9)
    assert "pairs counted once" in rows["within_exponent"]["method"]
