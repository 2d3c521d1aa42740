import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from gradvar.estimators import find_rule, group_products
from gradvar.estimators.bias import (
    Jackknifed,
    _bent_reach,
    cosine,
    estimate_of,
    eta_estimate,
    inner_product,
    jackknifed,
    log_efficiency,
    log_noise,
    log_rho,
    pressure,
    scale,
)
from gradvar.estimators.group_products import Layout, half_differences, reaches
from gradvar.estimators.groups import draw_groups, group_coefficients
from gradvar.estimators.intervals import effective_degrees, t_quantile
from gradvar.estimators.surplus import _slopes
from gradvar.estimators.update_products import entropy_direction, length_direction, products, reward_direction
from tests.estimators import references, simulator


def parts(scores, rewards, lengths, groups, rules, log_probs=None):
    updates = np.stack(
        [
            group_coefficients(groups, rewards, lengths, find_rule(r), advantage="grpo", alpha=alpha, max_length=3000.0)
            for r, alpha in rules
        ]
    )
    aims = [reward_direction(rewards, groups), length_direction(lengths, groups)]
    if log_probs is not None:
        aims.append(entropy_direction(log_probs, groups))
    layout = Layout(groups=groups, kinds=np.concatenate([updates, aims]), n_responses=len(scores))
    return products(scores @ scores.T, layout, len(aims))


def test_products_and_replicates_by_definition():
    rng = np.random.default_rng(0)
    scores, rewards, lengths = simulator.draw(11, rng=rng, signal=1.0)
    log_probs = -lengths * rng.random(11)
    groups = draw_groups(11, 3, 5, rng=rng)
    rules = [("grpo", None), ("vl_norm", 0.75)]
    got = parts(scores, rewards, lengths, groups, rules, log_probs)

    def vectors(members, kind):
        m = list(map(int, members))
        if kind in rules:
            return references.update(scores, rewards, lengths, m, kind[0], "grpo", alpha=kind[1], max_length=3000.0)
        values = {"J": rewards, "L": lengths, "H": -log_probs}[kind][m]
        a = references.advantage(list(values), "rloo")
        return sum(x * scores[i] for x, i in zip(a, m, strict=True)) / 3

    def mean(one, two, without):
        terms = []
        for p in groups:
            kept = [g for g in p if without not in g]
            if one == two == "same":
                continue
            terms += [vectors(a, one) @ vectors(b, two) for a, b in itertools.permutations(kept, 2)]
        return np.mean(terms)

    for row, without in [(0, None), (1, 0), (6, 5), (11, 10)]:
        for k, rule in enumerate(rules):
            own = [vectors(g, rule) @ vectors(g, rule) for p in groups for g in p if without not in g]
            assert got.same[row, k] == pytest.approx(np.mean(own), rel=1e-9)
            assert got.cross[row, k] == pytest.approx(mean(rule, rule, without), rel=1e-8)
            for j, aim in enumerate("JLH"):
                assert got.mixed[row, k, j] == pytest.approx(mean(rule, aim, without), rel=1e-8, abs=1e-12)
        for j, aim in enumerate("JLH"):
            assert got.direction[row, j] == pytest.approx(mean(aim, aim, without), rel=1e-8)


def test_statistics_are_the_formulas_and_pool_by_sums():
    made = []
    for seed in range(2):
        rng = np.random.default_rng(seed)
        scores, rewards, lengths = simulator.draw(40, rng=rng, signal=3.0)
        made.append(parts(scores, rewards, lengths, draw_groups(40, 8, 64, rng=rng), [("grpo", None), ("dapo", None)]))
    same, cross = (sum(getattr(m, f)[0] for m in made) for f in ("same", "cross"))
    mixed, direction = sum(m.mixed[0] for m in made), sum(m.direction[0] for m in made)
    noise = jackknifed(made, log_noise)
    np.testing.assert_allclose(1 - np.exp(noise.value), mixed[:, 0] ** 2 / (direction[0] * same))
    np.testing.assert_allclose(jackknifed(made, cosine).value, mixed[:, 0] / np.sqrt(cross * direction[0]))
    np.testing.assert_allclose(jackknifed(made, scale).value, mixed[:, 0] / direction[0])
    np.testing.assert_allclose(jackknifed(made, pressure(1)).value, mixed[:, 1] / mixed[:, 0])
    # cos^2 rho
    np.testing.assert_allclose(1 - np.exp(noise.value), jackknifed(made, cosine).value ** 2 * cross / same, rtol=1e-12)
    eta = eta_estimate(made, noise, 0, level=0.95, method="m")
    assert eta.low < eta.value < eta.high < 1
    # The replicates hold the other prompt fixed.
    one = made[0]
    expected = (one.mixed[5, 0, 0] + made[1].mixed[0, 0, 0]) / (one.direction[5, 0] + made[1].direction[0, 0])
    assert jackknifed(made, scale).replicates[0][4, 0] == pytest.approx(expected)


def test_rloo_mean_update_is_the_reference_itself():
    """dr_grpo with the rloo advantage is grad J times a constant: cosine 1, scale n x, eta = rho."""
    rng = np.random.default_rng(2)
    scores, rewards, lengths = simulator.draw(64, rng=rng, signal=2.0)
    groups = draw_groups(64, 8, 64, rng=rng)
    c = group_coefficients(groups, rewards, lengths, find_rule("dr_grpo"), advantage="rloo", max_length=50.0)
    kinds = np.stack([c, reward_direction(rewards, groups)])
    got = products(scores @ scores.T, Layout(groups=groups, kinds=kinds, n_responses=len(scores)), 1)
    assert jackknifed([got], cosine).value[0] == pytest.approx(1.0)
    assert jackknifed([got], scale).value[0] == pytest.approx(1 / 50)
    assert 1 - math.exp(jackknifed([got], log_noise).value[0]) == pytest.approx(got.cross[0, 0] / got.same[0, 0])


def test_length_pressure_has_the_sign_of_the_correlation():
    """Score = rewards and lengths along two axes: the update along reward moves length by their covariance."""
    rng = np.random.default_rng(3)
    n = 128
    rewards = (rng.random(n) < 0.5).astype(float)
    lengths = 100.0 + 50.0 * rewards + rng.integers(0, 20, n)
    scores = rng.normal(size=(n, 3)) * 0.05
    scores[:, 0] += rewards - 0.5
    groups = draw_groups(n, 8, 64, rng=rng)
    got = parts(scores, rewards, lengths, groups, [("dr_grpo", None)])
    # E s = 0, so grad J = cov(r, s) and grad E[L] = cov(L, s): along axis 0 they differ by cov(L, r)/var(r) = 50.
    assert jackknifed([got], pressure(1)).value[0] == pytest.approx(50.0, rel=0.1)


def test_noise_alone_is_unresolved():
    rng = np.random.default_rng(5)
    scores = rng.normal(size=(48, 300))
    rewards, lengths = np.arange(48) % 2.0, np.full(48, 10.0) + np.arange(48)
    got = parts(scores, rewards, lengths, draw_groups(48, 8, 64, rng=rng), [("grpo", None)])
    eta = eta_estimate([got], jackknifed([got], log_noise), 0, level=0.95, method="m")
    assert math.isnan(eta.value)
    assert "unresolved" in eta.method


def test_errors_without_the_surplus_are_those_of_drawing_again():
    """A jackknife's errors of eta are too wide by the few permutations and by pairs; without both they are not."""
    law = {"beta": 1.0, "signal": 1.2, "dimensions": 60, "decay": 0.97}
    values, raw, errors = [], [], []
    for seed in range(150):
        rng = np.random.default_rng([9, seed])
        scores, rewards, lengths = simulator.draw(64, rng=rng, **law)
        got = parts(scores, rewards, lengths, draw_groups(64, 8, 96, rng=rng), [("dapo", None)])
        noise = jackknifed([got], log_noise)
        values.append(noise.value[0])
        errors.append(noise.error()[0])
        raw.append(replace(noise, surplus=None).error()[0])
    # The spread of 150 values is known to 6%.
    spread = np.std(values)
    assert np.sqrt(np.mean(np.square(raw))) / spread > 1.2
    assert 0.9 < np.sqrt(np.mean(np.square(errors))) / spread < 1.2


@pytest.mark.parametrize("directions", [1, 2])
def test_slopes_are_the_derivatives(directions):
    """By same, cross, mixed with each direction and each direction, from the formulas."""
    rng = np.random.default_rng(5)
    same, cross = 2.0 + rng.random(4), 0.5 + rng.random(4)
    mixed, direction = 0.2 + rng.random((4, directions)), 1.0 + rng.random(directions)
    along, own = mixed[:, 0], direction[0]
    none = np.zeros(4)
    eta = along**2 / (own * same)
    expected = {
        log_noise: np.array([eta / same, none, -2 * eta / along, eta / own]) / (1 - eta),
        log_efficiency: (-1 / same, none, 2 / along, none),
        log_rho: (-1 / same, 1 / cross, none, none),
        cosine: (
            none,
            -along / 2 / np.sqrt(cross**3 * own),
            1 / np.sqrt(cross * own),
            -along / 2 / np.sqrt(cross * own**3),
        ),
        scale: (none, none, none + 1 / own, -along / own**2),
        inner_product(0): (none, none, none + 1, none),
    }
    for statistic, (by_same, by_cross, by_mixed, by_direction) in expected.items():
        rest = [none] * (directions - 1)
        got = _slopes([same, cross, mixed, direction], statistic)
        np.testing.assert_allclose(got, [by_same, by_cross, by_mixed, *rest, by_direction, *rest], rtol=1e-7, atol=1e-9)
    if directions == 2:
        got = _slopes([same, cross, mixed, direction], pressure(1))
        np.testing.assert_allclose(got, [none, none, -mixed[:, 1] / along**2, 1 / along, none, none], atol=1e-8)


def test_biases_and_quantiles_of_all_statistics_are_those_of_each():
    rng = np.random.default_rng(6)
    replicates = [rng.normal(size=(n, 4)) for n in (12, 30)]
    for one in replicates:
        one[:, 1] = 2.0
        one[3, 2], one[4, 3] = np.nan, np.inf
    value = rng.normal(size=4)
    made = Jackknifed(value=value, replicates=replicates, n=42, clusters=2)
    with np.errstate(invalid="ignore"):
        for k in range(4):
            influence = np.concatenate([r[:, k].mean() - r[:, k] for r in replicates])
            bias = sum((len(r) - 1) * (r[:, k].mean() - value[k]) for r in replicates)
            assert made.bias[k] == pytest.approx(bias, nan_ok=True)
            for level in (0.9, 0.95):
                quantile = t_quantile(level, effective_degrees(influence, 40))
                assert made.quantiles(level)[k] == pytest.approx(quantile)
    assert replace(made, degrees=3.0).quantiles(0.95) == pytest.approx([t_quantile(0.95, 3.0)] * 4)


def test_a_layout_serves_several_grams_kept_or_found_anew(monkeypatch):
    """More permutations than a chunk holds, and not a multiple; places in the Gram kept or not."""
    rng = np.random.default_rng(7)
    groups = draw_groups(20, 4, 2 * (group_products.PLACES // 80) + 3, rng=rng)
    kinds = rng.normal(size=(3, *groups.shape))
    layout = Layout(groups=groups, kinds=kinds, n_responses=20)
    anew = Layout(groups=groups, kinds=kinds, n_responses=20)
    monkeypatch.setattr(group_products, "MOST_PLACES", 0)
    assert all(chunk.places is None for chunk in anew.chunks)
    monkeypatch.undo()
    for _ in range(2):
        scores = rng.normal(size=(20, 3))
        gram = scores @ scores.T
        seen = 0
        for one, two in zip(reaches(gram, layout), reaches(gram, anew), strict=True):
            np.testing.assert_array_equal(one.beyond, two.beyond)
            np.testing.assert_array_equal(one.inside, two.inside)
            for p, permutation in enumerate(groups[one.where]):
                updates = np.einsum("kbn,bnd->kbd", kinds[:, one.where][:, p], scores[permutation])
                for b, members in enumerate(permutation):
                    others = np.delete(updates, b, axis=1).sum(axis=1)
                    np.testing.assert_allclose(one.inside[p, b], scores[members] @ updates[:, b].T, atol=1e-12)
                    np.testing.assert_allclose(one.beyond[p, b], scores[members] @ others.T, atol=1e-12)
                seen += 1
        assert seen == len(groups)


def test_half_differences_are_the_noise_of_the_permutations():
    """Their mean square is that of replicates about those of all permutations there are."""
    rng = np.random.default_rng(3)
    scores, rewards, lengths = simulator.draw(24, rng=rng, signal=2.0)
    many = parts(scores, rewards, lengths, draw_groups(24, 8, 20_000, rng=rng), [("grpo", None)])
    truth = many.cross[1:, 0] - many.cross[1:, 0].mean()
    seen, told = [], []
    for _ in range(60):
        few = parts(scores, rewards, lengths, draw_groups(24, 8, 32, rng=rng), [("grpo", None)])
        seen.append(np.mean((few.cross[1:, 0] - few.cross[1:, 0].mean() - truth) ** 2))
        told.append(np.mean(few.noise[1][:, 0] ** 2))
    assert np.mean(told) == pytest.approx(np.mean(seen), rel=0.2)


def test_an_odd_permutation_counts_in_the_noise():
    """Three permutations leave two halves of one each, whose differences are a third too large."""
    rng = np.random.default_rng(8)
    drawn = rng.normal(size=(3, 4000))
    (noise,) = half_differences(3, [[np.append(0.0, some.mean(axis=0))] for some in (drawn, drawn[:1], drawn[1:2])])
    assert noise.var() == pytest.approx(1.0 / 3.0, rel=0.1)


def test_a_scale_curved_in_the_share_of_correct_responses_is_covered():
    """Dr. GRPO's scale is nearly 1/sqrt(p (1 - p)): at half the responses correct a jackknife sees no slope."""
    law = {"beta": 2.0, "signal": 3.0, "decay": 0.7}

    def group_means(count):
        """E[(r - p) A] with grpo's advantage, over that with rloo's, times n over n M."""
        k = np.arange(9)
        chance = stats.binom.pmf(k, 8, 0.4)
        share = k / 8
        spread = np.sqrt(8 / 7 * share * (1 - share))
        along = np.where(spread > 0, 8 * share * (1 - share) / np.where(spread > 0, spread, 1.0), 0.0)
        return float((chance * along).sum() / (chance * 8 / 7 * 8 * share * (1 - share)).sum() / count)

    truth = group_means(3000.0)
    plain, covered = 0, 0
    for seed in range(150):
        rng = np.random.default_rng([31, seed])
        scores, rewards, lengths = simulator.draw(64, rng=rng, **law)
        got = parts(scores, rewards, lengths, draw_groups(64, 8, 64, rng=rng), [("dr_grpo", None)])
        made = jackknifed([got], scale)
        for result in (made, replace(made, curved=None)):
            found = estimate_of(result, 0, level=0.95, method="m")
            inside = found.low <= truth <= found.high
            if result is made:
                covered += inside
            else:
                plain += inside
    # Three standard errors of 150 draws at 95% are 5%.
    assert covered / 150 > 0.91
    assert plain < covered


def test_a_parabola_reaches_as_far_as_its_values():
    """-s t + b t^2 + b over |t| <= q on a grid, from 0 outwards on either side, b / 2 further where the vertex is."""
    for slope, bend, skewness in itertools.product((-3.0, 0.0, 0.3, 3.0), (-0.5, 0.0, 0.5), (-0.3, 0.0, 0.4)):
        further = skewness * (2 * 2.0**2 + 1) / 6  # Hall (1992)
        t = np.linspace(-2.0 - max(further, 0.0), 2.0 - min(further, 0.0), 40001)
        values = -slope * t + bend * (t**2 + 1.0)
        expected = max(-values.min() + max(bend, 0.0) / 2, 0.0), max(values.max() - min(bend, 0.0) / 2, 0.0)
        assert _bent_reach(slope, bend, skewness, 2.0) == pytest.approx(expected, abs=1e-6)


def test_where_few_are_right_a_share_may_be_larger_than_seen():
    """With 5 of 64 right the scale is large by chance and by its own bias: its low end allows for both."""
    rng = np.random.default_rng(8)
    scores, _, lengths = simulator.draw(64, rng=rng)
    for right, widened in ((5, True), (32, False)):
        rewards = (np.arange(64) < right).astype(float)
        got = parts(scores, rewards, lengths, draw_groups(64, 8, 64, rng=rng), [("dr_grpo", None)])
        result = jackknifed([got], scale)
        (slope, bend, skewness) = result.curved[0]
        centred = rewards - rewards.mean()
        assert skewness == pytest.approx((centred**3).sum() / (centred @ centred) ** 1.5, rel=0.05, abs=1e-3)
        found = estimate_of(result, 0, level=0.95, method="m")
        symmetric = replace(result, curved=[(slope, bend, 0.0)])
        plain = estimate_of(symmetric, 0, level=0.95, method="m")
        assert (found.low < plain.low - 1e-6) == widened
        assert found.low <= plain.low
        # Nearly all of the bias moves the end, beside what the share explains and the rest of the error.
        t = float(result.quantiles(0.95)[0])
        further = max(skewness, 0.0) * (2 * t**2 + 1) / 6
        rest = t * math.sqrt(max(float(result.error()[0]) ** 2 - float(slope[0]) ** 2, 0.0))
        moved = math.hypot(rest, abs(float(slope[0])) * (t + further)) + max(float(result.bias[0]), 0.0)
        if widened:
            assert skewness > 1 / 3
            assert found.value - found.low == pytest.approx(moved)


@pytest.mark.parametrize("correct", [1, 2])
def test_rounding_is_no_signal(correct):
    """With one correct response no two groups of a permutation have an update, with two none is left without either."""
    rng = np.random.default_rng(correct)
    scores, _, lengths = simulator.draw(64, rng=rng)
    rewards = np.zeros(64)
    rewards[:correct] = 1.0
    got = parts(scores, rewards, lengths, draw_groups(64, 8, 33, rng=rng), [("grpo", None), ("dapo", None)])
    gone = np.array([got.mixed[correct - 1, 0, 0], got.cross[correct - 1, 1], got.direction[correct - 1, 0]])
    assert (gone == 0.0).all()
    for statistic in (scale, pressure(1)):
        found = estimate_of(jackknifed([got], statistic), 0, level=0.95, method="m")
        assert math.isnan(found.value)
        assert (found.low, found.high) == (-math.inf, math.inf)
