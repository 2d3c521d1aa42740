"""The share of silent groups of a prompt and over several, and what its intervals cover."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import special, stats
from statsmodels.stats.proportion import proportion_confint

from gradvar.estimators.silent_shares import share_interval, silent_estimate, silent_rows
from tests.estimators import references, simulator
from tests.estimators.test_tables import prompts


def jackknife(rewards, n):
    """Half-width from the share without each response in turn."""
    without = [references.silent_share([*rewards[:i], *rewards[i + 1 :]], n) for i in range(len(rewards))]
    return stats.norm.ppf(0.975) * math.sqrt((len(rewards) - 1) * np.var(without))


@pytest.mark.parametrize("counts", [(40, 24), (32, 32), (5, 59), (20, 10, 6), (36, 0)])
def test_one_prompt_by_walking_through_every_chance_of_the_commonest_reward(counts):
    rewards, n = np.repeat([0.0, 1.0, 0.5][: len(counts)], counts), 4
    found = silent_estimate(rewards, n, level=0.95, seed=3)
    most, total = max(counts), sum(counts)
    others = sorted(counts)[:-1]
    part = sum((k / max(sum(others), 1)) ** n for k in others) or 1.0
    low, high = proportion_confint(most, total, method="wilson")
    q = np.linspace(low, high, 20_001)
    shares = q**n + part * (1 - q) ** n
    half = jackknife(rewards, n) if len(counts) > 2 else 0.0
    assert found.value == pytest.approx(references.silent_share(list(rewards), n))
    assert found.low == pytest.approx(max(min(shares.min(), found.value - half), 0.0))
    assert found.high == pytest.approx(max(shares.max(), found.value + half))
    assert (found.n, found.seed, found.level) == (total, 3, 0.95)


@pytest.mark.parametrize(("n", "least", "most"), [(16, 0.92, 1.0), (64, 0.93, 0.99), (512, 0.94, 0.96)])
def test_exact_coverage_of_one_prompt(n, least, most):
    """Every count of right responses, weighted by its binomial probability."""
    found = [silent_estimate(np.repeat([0.0, 1.0], (n - k, k)), 8, level=0.95, seed=None) for k in range(n + 1)]
    for p in (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.45, 0.5, 0.7, 0.9):
        truth = p**8 + (1 - p) ** 8
        held = [one.low - 1e-12 <= truth <= one.high + 1e-12 for one in found]
        assert least <= stats.binom.pmf(np.arange(n + 1), n, p) @ held <= most


@pytest.mark.parametrize("chances", [(1 / 3, 1 / 3, 1 / 3), (0.45, 0.45, 0.1), (0.1,) * 10])
def test_three_rewards_and_more_are_covered(chances):
    """Their shares among themselves taken for known: 56 to 76%."""
    rng = np.random.default_rng(2)
    truth, hits = sum(p**8 for p in chances), 0
    for _ in range(200):
        found = silent_estimate(rng.choice(len(chances), size=64, p=chances), 8, level=0.95, seed=None)
        hits += found.low <= truth <= found.high
        assert 0.0 <= found.low <= found.value <= found.high <= 1.0
    assert hits >= stats.binom.ppf(1e-4, 200, 0.93), hits


@pytest.mark.parametrize("p", [0.5, 0.005])
def test_many_prompts_whose_intervals_have_one_side_are_covered(p):
    """64 prompts of 64 responses, 100 times: with half-widths in squares alone 82 to 84%, all missed on one side."""
    rng = np.random.default_rng(7)
    [one] = prompts(1, n=64, targets=("a",), signal=3.0)
    hits = 0
    for _ in range(100):
        drawn = [replace(one, rewards=(rng.random(64) < p).astype(float)) for _ in range(64)]
        here = silent_rows(drawn, (8,), {"target": "a"}, level=0.95, seed=0)[0].estimate
        hits += here.low <= p**8 + (1 - p) ** 8 <= here.high
    assert hits >= stats.binom.ppf(1e-3, 100, 0.93), hits


def test_groups_of_one_are_all_silent():
    found = silent_estimate(np.array([0.0, 1.0, 1.0]), 1, level=0.95, seed=None)
    assert (found.value, found.low, found.high) == pytest.approx((1.0, 1.0, 1.0))


def test_over_these_prompts_half_widths_add_in_squares():
    several = prompts(3, n=48, targets=("a",), signal=3.0)
    here = silent_rows(several, (4,), {"target": "a"}, level=0.95, seed=0)[0].estimate
    own = [silent_estimate(s.rewards, 4, level=0.95, seed=None) for s in several]
    mean = sum(one.value for one in own) / 3
    assert here.value == pytest.approx(mean)
    least = sum(jackknife(s.rewards, 4) ** 2 for s in several)
    below, above = (
        sum((end - one.value) ** 2 for end, one in zip(ends, own, strict=True))
        for ends in ([one.low for one in own], [one.high for one in own])
    )
    assert below < least < above
    assert here.low == pytest.approx(mean - math.sqrt(least) / 3)
    assert here.high == pytest.approx(mean + math.sqrt(above) / 3)


@pytest.mark.parametrize("count", [4, 16])
def test_mean_silent_share_is_covered_where_few_prompts_are_silent(count):
    """500 pools of prompts whose chances lie around a half: 74% and 86% covered by t on the share itself."""
    rng = np.random.default_rng(8)
    chances = stats.beta(2, 2).ppf((np.arange(4000) + 0.5) / 4000)
    truth = np.mean(chances**8 + (1 - chances) ** 8)
    right = rng.binomial(32, rng.beta(2, 2, (500, count)))
    shares = (special.comb(right, 8) + special.comb(32 - right, 8)) / special.comb(32, 8)
    ends = np.array([share_interval(own, 0.95) for own in shares])
    hits = int(((ends[:, 0] <= truth) & (truth <= ends[:, 1])).sum())
    assert hits >= stats.binom.ppf(1e-4, 500, 0.9), hits
    assert ((ends[:, 0] <= shares.mean(axis=1)) & (shares.mean(axis=1) <= ends[:, 1])).all()


def test_silent_shares_that_are_all_one_number():
    assert share_interval(np.zeros(4), 0.95) == (0.0, pytest.approx(1 - 0.025 ** (1 / 4)))
    assert share_interval(np.ones(4), 0.95) == (pytest.approx(0.025 ** (1 / 4)), 1.0)
    assert share_interval(np.array([0.0, 0.0, 0.0, 1e-9]), 0.95)[1] == pytest.approx(1 - 0.025 ** (1 / 4))
    assert share_interval(np.array([1.0, 1.0, 1.0, 1 - 1e-9]), 0.95)[0] == pytest.approx(0.025 ** (1 / 4))
    assert np.isnan(share_interval(np.full(4, 0.25), 0.95)).all()
    assert np.isnan(share_interval(np.array([0.0, 0.5, 1.0]), 0.95)).all()


@pytest.mark.parametrize(("count", "why"), [(3, "not given below 4 prompts"), (5, "the shares are equal")])
def test_a_share_without_interval_says_why(count, why):
    rewards = np.repeat([0.0, 1.0], 16)
    alike = [replace(simulator.prompt(str(k), 32, rng=np.random.default_rng(k)), rewards=rewards) for k in range(count)]
    made = silent_rows(alike, (4,), {"target": "a"}, level=0.95, seed=0)
    (without,) = [row for row in made if math.isnan(row.estimate.low)]
    assert without.estimate.method.endswith(why)
