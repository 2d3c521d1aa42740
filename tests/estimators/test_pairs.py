import numpy as np
import pytest

from gradvar.estimators import aggregator_rho
from gradvar.estimators.additive import Sums, of_these_prompts, ratio_of_signals
from gradvar.estimators.group_products import Layout
from gradvar.estimators.groups import draw_groups, group_moments, moments_of_kinds
from gradvar.estimators.length_bins import bin_products
from gradvar.estimators.pairs import (
    WeightedKernels,
    centred,
    covariance_of_kernels,
    mean_coefficients,
    pair_covariance,
)


def test_mean_coefficients_by_definition():
    rng = np.random.default_rng(0)
    groups = draw_groups(10, 3, 7, rng=rng)
    updates = rng.normal(size=(2, *groups.shape))
    got = mean_coefficients(groups, updates, 10)
    for k in range(2):
        for i in range(10):
            own = updates[k][groups == i]
            assert got[k, i] == pytest.approx(3 * own.mean() if own.size else 0.0)


def test_variance_of_a_mean_over_pairs_of_noise():
    """x of d dimensions without mean: Var of the mean of x_i . x_j is 2 d / (N (N - 1)), all of it pairs'."""
    n, d, draws = 60, 5, 400
    rng = np.random.default_rng(1)
    found = [covariance_of_kernels((x @ x.T)[None])[0, 0] for x in rng.normal(size=(draws, n, d))]
    # Centring takes a share of 2/N; each estimate has a relative error near 0.1.
    assert np.mean(found) == pytest.approx(2 * d / (n * (n - 1)), rel=0.08)


def test_kernels_of_squares_and_directions():
    rng = np.random.default_rng(2)
    scores = rng.normal(size=(9, 4))
    z, w = rng.normal(size=(2, 9)), rng.normal(size=9)
    got = pair_covariance(scores @ scores.T, z, w)

    def kernel(a, b):
        one, two = a[:, None] * scores, b[:, None] * scores
        h = 0.5 * (one @ two.T + two @ one.T)
        h = h - h.mean(0) - h.mean(1)[:, None] + h.mean()
        return h - np.diag(np.diag(h))

    kernels = [kernel(z[0], z[0]), kernel(z[1], z[1]), kernel(z[0], w), kernel(z[1], w)]
    expected = [[2 * (a * b).sum() / (9 * 8) ** 2 for b in kernels] for a in kernels]
    assert got == pytest.approx(np.array(expected))


def degenerate_scores(name, n, rng):
    scores = rng.normal(size=(n, 3))
    if name == "repeated":
        scores[1::2] = scores[0]
    elif name == "outlier":
        scores[0] *= 1e6
    elif name == "zeros":
        scores[::2] = 0.0
    elif name == "mean":
        scores = 1e-2 * scores + 1.0
    return scores


@pytest.mark.parametrize("n", [2, 3, 9, 40])
@pytest.mark.parametrize("name", ["plain", "repeated", "outlier", "zeros", "mean"])
def test_weighted_kernels_are_those_formed(name, n):
    """Covariances and forms of kernels that are not formed, beside forming and centring each."""
    rng = np.random.default_rng([7, n])
    scores = degenerate_scores(name, n, rng)
    gram, weights = scores @ scores.T, rng.normal(size=(4, n))
    weights[1], weights[2] = 3e3 * weights[0], 0.0
    first, second = np.array([0, 1, 2, 3, 0, 3]), np.array([0, 1, 2, 3, 3, 1])
    got = WeightedKernels(gram=gram, weights=weights, first=first, second=second)
    outer = [np.outer(weights[z], weights[w]) for z, w in zip(first, second, strict=True)]
    kernels = np.stack([gram * (one + one.T) / 2 for one in outer])
    size = np.sqrt((kernels**2).sum(axis=(1, 2))) / (n * (n - 1))
    # Of squares much larger than what is left of them rounding is all the difference.
    room = 1e-11 * np.outer(size, size)
    assert (np.abs(got.covariance() - covariance_of_kernels(kernels)) <= room).all()
    assert (np.diagonal(got.covariance()) >= 0.0).all()
    influences = rng.normal(size=(len(first), 2, n))
    influences -= influences.mean(axis=-1, keepdims=True)
    expected = np.stack([u @ h @ u.T for u, h in zip(influences, centred(kernels), strict=True)])
    np.testing.assert_allclose(got.along(influences), expected, rtol=1e-9, atol=1e-12 * n * np.abs(kernels).max())


def test_identical_responses_have_no_pairs():
    """Every update is the same: rho is 1 and its interval is, not what the exponential makes of rounding."""
    score = np.random.default_rng(3).normal(size=20)
    gram, weights = np.full((48, 48), score @ score), np.random.default_rng(4).random((2, 1)) * np.ones((2, 48))
    each = np.arange(2)
    assert (WeightedKernels(gram=gram, weights=weights, first=each, second=each).covariance() == 0.0).all()
    rho, _ = aggregator_rho(
        gram, np.zeros(48), np.full(48, 7.0), "grpo", advantage="score", rng=np.random.default_rng(0)
    )
    assert (rho.value, rho.low, rho.high) == pytest.approx((1.0, 1.0, 1.0))


def test_a_group_left_out_counts_in_no_mean_coefficient():
    rng = np.random.default_rng(6)
    groups = draw_groups(12, 3, 9, rng=rng)
    held = (rng.random(groups.shape[:2]) < 0.5).astype(float)
    updates = rng.normal(size=(2, *groups.shape)) * held[..., None]
    got = mean_coefficients(groups, updates, 12, held)
    for k in range(2):
        for i in range(12):
            mine = [updates[k][p, b][groups[p, b] == i] for p, b in np.argwhere(held) if i in groups[p, b]]
            assert got[k, i] == pytest.approx(3 * np.mean(mine) if mine else 0.0)


def test_pairs_and_bend_of_group_moments():
    rng = np.random.default_rng(5)
    n, size = 24, 4
    scores = rng.normal(size=(n, 3))
    gram, groups = scores @ scores.T, draw_groups(n, size, 40, rng=rng)
    kinds = rng.normal(size=(2, *groups.shape))
    one, two = moments_of_kinds(gram, Layout(groups=groups, kinds=kinds, n_responses=n))
    means = mean_coefficients(groups, kinds, n)

    def kernel(z):
        h = np.outer(z, z) * gram
        h = h - h.mean(0) - h.mean(1)[:, None] + h.mean()
        return h - np.diag(np.diag(h))

    h, g = kernel(means[0]), kernel(means[1])
    assert one.pairs[0, 0] == pytest.approx(2 * (h * h).sum() / (n * (n - 1)) ** 2)
    assert two.pairs[1, 1] == pytest.approx(2 * (g * g).sum() / (n * (n - 1)) ** 2)
    assert one.pairs_of_difference(two, 0.5, 2.0) == pytest.approx(
        2 * ((0.5 * h - 2.0 * g) ** 2).sum() / (n * (n - 1)) ** 2
    )
    # Of kinds that were not measured together nothing is known.
    assert one.pairs_of_difference(group_moments(gram, groups, kinds[1]), 0.5, 2.0) == 0.0
    a, b = -0.3, 1.7
    u = a * (one.same_without.mean() - one.same_without) + b * (one.cross_without.mean() - one.cross_without)
    slope = b + a * (size - 1) / size
    variance, bend = one.combined(a, b, size)
    assert variance == pytest.approx(slope**2 * one.pairs[0, 0])
    assert bend == pytest.approx(
        sum(u[i] * slope * 2 * h[i, j] / (n * (n - 1)) * u[j] for i in range(n) for j in range(n))
    )


def test_between_lengths_error_counts_pairs_once():
    """Equal means in every bin: the estimate's spread is pairs' alone, and the jackknife's variance twice that."""
    n, values, once, jackknife = 64, [], [], []
    bins = np.repeat(np.arange(4), 16)
    for t in range(300):
        g = np.random.default_rng([3, t]).normal(size=(n, 12)) + 0.6
        sums = bin_products(g @ g.T, np.zeros(n), np.arange(1.0, n + 1), bins, advantage="score").signals()
        values.append(sums.value[0])
        once.append(sums.pairs[0, 0])
        moved = sums.without[:, 0] - sums.without[:, 0].mean()
        jackknife.append((n - 1) / n * float(moved @ moved))
    true = np.var(values)
    # 300 draws know a variance to 8%.
    assert np.mean(once) == pytest.approx(true, rel=0.25)
    assert 1.6 < np.mean(jackknife) / true < 2.6


def test_pairs_narrow_fiellers_set_and_halves_an_interval():
    rng = np.random.default_rng(4)
    value, moved = np.array([0.4, 4.0]), rng.normal(0.0, 0.02, (40, 2))
    plain = Sums(value=value, without=value + moved)
    centred = moved - moved.mean(axis=0)
    jackknife = 39 / 40 * centred.T @ centred
    paired = Sums(value=value, without=value + moved, pairs=0.4 * jackknife)
    widths = []
    for one in (plain, paired):
        ratio = ratio_of_signals([one], margin=0.25, level=0.95, method="m")[0]
        widths.append(ratio.high - ratio.low)
    assert widths[1] / widths[0] == pytest.approx(np.sqrt(0.6), rel=0.02)
    # Influences that the halves do not share are noise of the permutations.
    shared, noise = rng.normal(0.0, 0.01, 40), rng.normal(0.0, 0.005, 40)
    halves = tuple((1.0 + shared + sign * noise)[:, None] for sign in (1, -1))
    noisy = Sums(value=np.ones(1), without=(1.0 + shared)[:, None], halves=halves)

    def half_width(sums):
        e = of_these_prompts([sums], lambda p: p[..., 0], level=0.95, method="m")
        return (e.high - e.low) / 2

    one, two = (h[:, 0] - h[:, 0].mean() for h in halves)
    variance = 39 / 40 * max(one @ two, 0.25 * shared.var() * 40)
    assert half_width(noisy) > 1.96 * np.sqrt(variance)
    assert half_width(noisy) < 3.5 * np.sqrt(variance)
