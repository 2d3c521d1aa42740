"""What pairs of responses add to the error of exponents, against sums written out from gradients."""

import itertools
import math

import numpy as np
import pytest

from gradvar.estimators import law_table
from gradvar.estimators.law_samples import pairs_of, sample_of
from gradvar.estimators.spread import nearest_in_length
from gradvar.estimators.spread_pairs import (
    NeighbourKernels,
    Weights,
    deviation_form,
    deviation_kernels,
    jackknifed_pairs,
    noise_squares,
    pair_variance,
    within_form,
)
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


def influences_of(values, near, weights, gram):
    """u (n,) of a jackknife written out: what each response has of its own sum, and what the others owe to it."""
    n = len(near)
    found = np.zeros(n)
    for i in range(n):
        found[i] = weights.own[i] * values(gram, near[i], i)
        for j in range(n):
            if j != i and i in near[j]:
                kept = near[j][near[j] != i]
                found[i] += weights.owed[j] * (values(gram, near[j], j) - values(gram, kept, j))
    return found


def within(gram, near, i):
    k = len(near)
    return k / (k + 1) * (gram[i, i] - 2 * gram[i, near].mean() + gram[np.ix_(near, near)].mean())


def test_what_a_jackknife_of_within_length_variances_has_of_pairs() -> None:
    """Every influence is linear in the Gram: its answer to a Gram of one pair alone is twice the form's entry."""
    rng, n = np.random.default_rng(9), 9
    near = nearest_in_length(rng.permutation(np.arange(10.0, 19.0)), 3, rng=rng)
    weights = Weights(*rng.normal(size=(3, n)))
    squares = np.abs(rng.normal(size=(n, n)))
    squares = squares + squares.T
    expected = 0.0
    for a, b in itertools.combinations(range(n), 2):
        pair = np.zeros((n, n))
        pair[a, b] = pair[b, a] = 1.0
        expected += float((influences_of(within, near, weights, pair) ** 2).sum()) * squares[a, b]
    found = jackknifed_pairs(None, NeighbourKernels.of(near).of_jackknife(weights), squares)
    assert found == pytest.approx(expected, rel=1e-12)


def test_what_a_jackknife_of_the_difference_has_of_pairs() -> None:
    """With deviations from a mean over N responses; pairs of two others, smaller by N, are left out of those."""
    rng, n, everyone = np.random.default_rng(10), 40, 40
    near = nearest_in_length(rng.permutation(np.arange(10.0, 50.0)), 5, rng=rng)
    of_deviation, of_within = (Weights(*rng.normal(size=(3, n))) for _ in range(2))
    squares = np.ones((n, n))
    found = jackknifed_pairs(
        deviation_kernels(of_deviation, everyone), NeighbourKernels.of(near).of_jackknife(-of_within), squares
    )

    def deviation(gram):
        centred = gram - gram.mean(axis=0) - gram.mean(axis=1)[:, None] + gram.mean()
        owed = -2.0 / (everyone - 1) * (centred - np.diag(np.diagonal(centred))) @ of_deviation.owed
        return of_deviation.own * np.diagonal(centred) + owed

    expected = 0.0
    for a, b in itertools.combinations(range(n), 2):
        pair = np.zeros((n, n))
        pair[a, b] = pair[b, a] = 1.0
        expected += float(((deviation(pair) - influences_of(within, near, of_within, pair)) ** 2).sum())
    assert found == pytest.approx(expected, rel=0.02)


def test_one_neighbour_that_goes_leaves_its_variance_as_it_was() -> None:
    """As `spread.dependence_among` has it, with k = 1."""
    near = np.array([[1], [0], [1]])
    weights = Weights(np.ones(3), np.array([1.0, 2.0, 3.0]), np.full(3, 7.0))
    found = jackknifed_pairs(None, NeighbourKernels.of(near).of_jackknife(weights), np.ones((3, 3)))
    # V = ||g_i - g_j||^2 / 2: the entry is -1/2, the response to a pair -1.
    assert found == pytest.approx(1.0 + 4.0 + 9.0)


def test_what_is_left_of_the_squares_of_influences_is_the_variance() -> None:
    """Exactly, of noise in d dimensions: Var e'Ce = 2 d ||C||^2, E u_i^2 = 2 d ||B^i||^2 + (d tr B^i)^2.

    The traces are how the sum of the influences is not 0 in expectation; without them and the surplus of pairs the
    jackknife is the variance to within some percent, with all pairs it is a quarter more.
    """
    n, d = 24, 3
    lengths = np.exp(np.random.default_rng(11).normal(5.0, 0.6, n))
    near = nearest_in_length(lengths, 5, rng=np.random.default_rng(0))
    q = np.log(lengths) - np.log(lengths).mean()
    weights = Weights(q, q, q)
    forms = np.zeros((n, n, n))
    for a in range(n):
        for b in range(a, n):
            pair = np.zeros((n, n))
            pair[a, b] = pair[b, a] = 1.0
            forms[:, a, b] = forms[:, b, a] = influences_of(within, near, weights, pair) / (1.0 if a == b else 2.0)
    variance = 2.0 * d * float((within_form(near)(q) ** 2).sum())
    jackknife = 2.0 * d * float((forms**2).sum())
    squares = d * (1.0 - np.eye(n))  # E <e_a, e_b>^2
    once = pair_variance(within_form(near)(q), squares)
    surplus = jackknifed_pairs(None, NeighbourKernels.of(near).of_jackknife(weights), squares) - once
    assert jackknife > 1.25 * variance
    assert jackknife - surplus == pytest.approx(variance, rel=0.1)


def test_prompts_add_up_but_for_small_ones_and_the_difference_of_two_sums_is_one_form() -> None:
    prompts = [simulator.prompt(f"p{k}", n, rng=np.random.default_rng([5, k])) for k, n in enumerate((66, 64, 63))]
    samples = [sample_of(p, p.rewards >= 0, "score", seed=1, neighbours=3, left_out=0) for p in prompts]
    weights = Weights(*np.random.default_rng(6).normal(size=(3, 193)))
    q = weights.gain
    expected = 0.0
    for sample, part in zip(samples[:2], (q[:66], q[66:130]), strict=True):
        form = sample.forms["deviation"](part) - sample.forms["within"](part)
        for i in range(len(part)):
            for j in range(i):
                expected += (2.0 * form[i, j]) ** 2 * sample.noise[i, j]
    found = pairs_of(samples, {"deviation": weights, "within": -weights})
    assert found.once == pytest.approx(expected, rel=1e-12)
    pieces = [Weights(*(part[cut] for part in weights)) for cut in (slice(0, 66), slice(66, 130))]
    each = [pairs_of([s], {"deviation": w, "within": -w}).counted for s, w in zip(samples[:2], pieces, strict=True)]
    assert found.counted == pytest.approx(sum(each), rel=1e-12)


def test_a_reward_class_has_the_pairs_of_its_own_responses() -> None:
    """Its advantage is one number, so the pairs add to its exponent's error what they add to the score's."""
    prompt = simulator.prompt("p", 150, rng=np.random.default_rng(7))
    chosen = prompt.rewards == 0
    weights = Weights(*np.random.default_rng(8).normal(size=(3, int(chosen.sum()))))
    score, weighted = (sample_of(prompt, chosen, kind, seed=1, neighbours=5, left_out=0) for kind in ("score", "grpo"))
    factor = weighted.within[0] / score.within[0]
    found = np.array(pairs_of([weighted], {"within": weights})) / factor**2
    assert found == pytest.approx(np.array(pairs_of([score], {"within": weights})), rel=1e-9)


def test_nothing_is_taken_from_the_lower_end_of_the_difference() -> None:
    """Its upper reach is without what pairs count too often, its lower one the jackknife's; below 64 both are."""
    for n, shorter in ((80, True), (60, False)):
        prompt = simulator.prompt("p", n, rng=np.random.default_rng(3), decay=0.4)
        table = law_table([prompt], advantages_studied=["score"], subsets=False, seed=1)
        row = table[table["quantity"] == "exponent_difference"].iloc[0]
        down, up = row["value"] - row["low"], row["high"] - row["value"]
        assert (up < 0.95 * down) if shorter else up == pytest.approx(down)
        assert ("pairs counted once above" in row["method"]) == shorter


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
