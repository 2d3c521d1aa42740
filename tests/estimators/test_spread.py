import math

import numpy as np
import pytest

from gradvar.errors import GradvarError
from gradvar.estimators import deviations, within_length_variance
from gradvar.estimators.spread import deviation_dependence, local_moments, nearest_in_length, within_dependence
from tests.estimators import references, simulator


@pytest.fixture
def case():
    rng = np.random.default_rng(5)
    vectors = rng.normal(size=(9, 4))
    # Squares have no two equal distances from one of them.
    lengths = rng.permutation(np.array([2.0**k for k in range(9)]))
    return vectors, lengths, rng.normal(size=9)


def test_whole_and_fractional_lengths_have_the_same_neighbours():
    lengths = np.random.default_rng(0).integers(2, 12, 40).astype(float)
    whole = nearest_in_length(lengths, 5, rng=np.random.default_rng(1))
    halves = nearest_in_length(lengths + 0.5, 5, rng=np.random.default_rng(1))
    np.testing.assert_array_equal(whole, halves)


def test_deviations_from_the_gram_alone(case):
    vectors, _, factors = case
    gram = references.gram_of(vectors)
    np.testing.assert_allclose(deviations(gram), references.deviation(vectors), rtol=1e-12)
    np.testing.assert_allclose(deviations(gram, factors), references.deviation(factors[:, None] * vectors), rtol=1e-12)


@pytest.mark.parametrize("k", [1, 3, 8, 50])
def test_within_length_variance(case, k):
    vectors, lengths, factors = case
    got = within_length_variance(
        vectors @ vectors.T, lengths, advantages=factors, neighbours=k, rng=np.random.default_rng(0)
    )
    expected = references.within_length(factors[:, None] * vectors, lengths, min(k, 8))
    np.testing.assert_allclose(got, expected, rtol=1e-10)


def test_ties_are_broken_by_the_generator():
    vectors = np.random.default_rng(0).normal(size=(30, 5))
    gram, lengths = vectors @ vectors.T, np.repeat([10.0, 20.0], 15)
    one, again, other = (within_length_variance(gram, lengths, rng=np.random.default_rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert not np.allclose(one, other)


def test_ties_are_drawn_evenly():
    """One response between four equally near ones with k = 1: each is drawn a quarter of the time."""
    gram, lengths = np.diag([0.0, 1.0, 2.0, 3.0, 4.0]), np.array([10.0, 9.0, 9.0, 11.0, 11.0])
    drawn = [
        round(2 * within_length_variance(gram, lengths, neighbours=1, rng=np.random.default_rng(seed))[0])
        for seed in range(400)
    ]
    counts = np.bincount(drawn, minlength=5)[1:]
    assert counts.sum() == 400
    # Binomial(400, 1/4) has sd 8.7: five of them.
    assert (abs(counts - 100) < 44).all(), counts


def test_expected_values():
    """E D_i = (1 - 2/N) v_i + vbar/N, E V_i = v(L) when v is constant: 4000 draws, 5 standard errors."""
    n, draws, rng = 8, 4000, np.random.default_rng(3)
    lengths = np.arange(1.0, n + 1.0)
    spread = np.sqrt(lengths)
    deviation, within = np.zeros((draws, n)), np.zeros((draws, n))
    for t in range(draws):
        g = rng.normal(size=(n, 3)) / np.sqrt(3)
        scaled = g * spread[:, None]
        deviation[t] = deviations(scaled @ scaled.T)
        within[t] = within_length_variance(g @ g.T, lengths, neighbours=3, rng=rng)
    expected = (1 - 2 / n) * lengths + lengths.mean() / n
    assert (abs(deviation.mean(0) - expected) < 5 * deviation.std(0) / np.sqrt(draws)).all()
    assert (abs(within.mean(0) - 1.0) < 5 * within.std(0) / np.sqrt(draws)).all()


def test_d_and_v_differ_where_the_mean_depends_on_length():
    """g = L u exactly: v(L) = 0, while D_i = (L_i - Lbar)^2."""
    lengths = np.arange(10.0, 110.0)
    gram = np.outer(lengths, lengths)
    np.testing.assert_allclose(deviations(gram), (lengths - lengths.mean()) ** 2, rtol=1e-9, atol=1e-9)
    within = within_length_variance(gram, lengths, neighbours=2, rng=np.random.default_rng(0))
    assert within[1:-1].max() < 1.5


def test_repeated_and_single_responses():
    assert (deviations(np.full((4, 4), 0.1)) == 0.0).all()
    assert (within_length_variance(np.full((4, 4), 0.1), np.ones(4), rng=np.random.default_rng(0)) < 1e-15).all()
    np.testing.assert_array_equal(deviations([[3.0]]), [0.0])
    with pytest.raises(GradvarError, match="at least 2"):
        within_length_variance([[3.0]], [5.0], rng=np.random.default_rng(0))


def test_dependences_are_what_taking_a_response_away_changes():
    rng = np.random.default_rng(11)
    scores, _, lengths = simulator.draw(40, rng=rng)
    lengths = lengths + np.arange(40) * 1e-4  # no ties
    gram, q = scores @ scores.T, rng.normal(size=(40, 2))
    full = deviations(gram)
    within = within_length_variance(gram, lengths, neighbours=3, rng=np.random.default_rng(0))
    expected_d, expected_v = np.zeros((40, 2)), np.zeros((40, 2))
    for i in range(40):
        keep = np.delete(np.arange(40), i)
        without = references.deviation(scores[keep])
        expected_d[i] = (full[keep] - without) @ q[keep]
        for j in keep:
            near = sorted((m for m in range(40) if m != j), key=lambda m: abs(lengths[m] - lengths[j]))[:3]
            if i in near:
                left = [m for m in near if m != i]
                reduced = 2 / 3 * float(((scores[j] - scores[left].mean(0)) ** 2).sum())
                expected_v[i] += (within[j] - reduced) * q[j]
    got_v = within_dependence(gram, lengths, neighbours=3, rng=np.random.default_rng(0))(q)
    np.testing.assert_allclose(got_v, expected_v, rtol=1e-9, atol=1e-12)
    got_d = deviation_dependence(gram)(q)
    # Left out are terms of order 1/N^2 a pair.
    assert abs(got_d - expected_d).max() < 0.05 * abs(expected_d).max()
    subset = lengths > np.median(lengths)
    alone = deviation_dependence(gram, subset=subset)(q[subset])
    inside = deviation_dependence(gram)(q * subset[:, None])[subset]
    np.testing.assert_allclose(alone, inside, rtol=1e-12)


@pytest.mark.parametrize(("n", "alike"), [(3, 2), (14, 7), (60, 16)])
def test_local_moments_are_those_of_responses_alike_in_length(n, alike):
    rng = np.random.default_rng(n)
    lengths = 100.0 * np.exp(np.sort(rng.normal(size=n)))
    law = lengths**1.5
    values = law * rng.exponential(size=n)
    spread, skewness = local_moments(lengths, values, law, rng=rng)
    for i in range(n):
        near = sorted(range(n), key=lambda j: abs(lengths[j] - lengths[i]))[:alike]
        relative = [values[j] / law[j] for j in near]
        deviation, mean = np.std(relative, ddof=1) * law[i], np.mean(relative) * law[i]
        assert (spread[i], skewness[i]) == pytest.approx((deviation, 2 * deviation / mean))
    # Where few carry the noise, as many as hold 4 of them on average.
    few = np.arange(n) % 10 == 0
    wider, _ = local_moments(lengths, values, law, carrying=few, rng=rng)
    count = min(max(alike, math.ceil(4 * n / few.sum())), n)
    for i in range(n):
        near = sorted(range(n), key=lambda j: abs(lengths[j] - lengths[i]))[:count]
        assert wider[i] == pytest.approx(np.std([values[j] / law[j] for j in near], ddof=1) * law[i])
    # Nothing spreads where nothing is.
    assert not np.any(local_moments(lengths, 0.0 * law, 0.0 * law, rng=rng))


@pytest.mark.parametrize(
    ("gram", "factors", "words"),
    [
        (np.zeros((2, 3)), None, "square"),
        (np.full((2, 2), np.nan), None, "NaN or infinity"),
        (np.eye(2), [1.0], "2 responses"),
        (np.eye(2), [1.0, np.nan], "finite"),
    ],
)
def test_refuses(gram, factors, words):
    with pytest.raises(GradvarError, match=words):
        deviations(gram, factors)


def test_refuses_neighbours_and_lengths():
    with pytest.raises(GradvarError, match="neighbours"):
        within_length_variance(np.eye(3), [1.0, 2.0, 3.0], neighbours=0, rng=np.random.default_rng(0))
    with pytest.raises(GradvarError, match="lengths of shape"):
        within_length_variance(np.eye(3), [1.0, 2.0], rng=np.random.default_rng(0))
