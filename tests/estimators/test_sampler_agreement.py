"""Sampler against policy: token by token, and by the policy's entropy alone."""

import math

import numpy as np
import pytest
from scipy import stats

from gradvar.estimators.sampler_agreement import entropy_balance, sampler_agreement


def test_differences_are_counted_where_the_mask_says():
    found = sampler_agreement([[-1.0, -2.0], [-0.5, -3.0, -1.0]], [[-1.0, -2.5], [-0.5, -1.0, -1.0]], [None, [1, 0, 1]])
    assert found.n_tokens == 4
    assert found.mean_abs == pytest.approx(0.5 / 4)
    assert found.mean_difference == pytest.approx(0.5 / 4)
    assert (found.max_abs, found.worst_response, found.worst_token) == (0.5, 0, 1)


def test_nothing_to_compare_is_an_error():
    with pytest.raises(ValueError, match="no token"):
        sampler_agreement([[-1.0]], [[-1.0]], [[0]])


def draw(rng, temperature, n):
    """Responses of geometric length from a three-token policy whose last token ends them, sampled at a temperature."""
    logits = np.array([1.0, 0.3, -1.0])
    policy = np.exp(logits) / np.exp(logits).sum()
    sampler = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
    entropy = -float(policy @ np.log(policy))
    lp, h = np.zeros(n), np.zeros(n)
    for i in range(n):
        token = -1
        while token != 2:
            token = rng.choice(3, p=sampler)
            lp[i] += math.log(policy[token])
            h[i] += entropy
    return lp, h


def test_the_balance_is_the_mean_with_a_t_interval():
    rng = np.random.default_rng(0)
    lp, h = rng.normal(size=50), rng.normal(size=50)
    test = entropy_balance([lp], [h], level=0.9)
    expected = stats.ttest_1samp(lp + h, 0.0)
    low, high = expected.confidence_interval(0.9)
    assert test.p_value == pytest.approx(expected.pvalue)
    assert (test.surplus.low, test.surplus.high) == (pytest.approx(low), pytest.approx(high))


def test_the_size_is_right_and_a_wrong_temperature_is_found():
    rng = np.random.default_rng(1)
    draws = 200
    rejected = sum(
        entropy_balance(*zip(draw(rng, 1.0, 60), strict=False), level=0.95).p_value < 0.05 for _ in range(draws)
    )
    assert abs(rejected - 0.05 * draws) < 4 * math.sqrt(draws * 0.05 * 0.95)
    cold = [draw(rng, 0.7, 200) for _ in range(3)]
    test = entropy_balance(*zip(*cold, strict=True), level=0.95)
    assert test.surplus.low > 0
    assert test.p_value < 1e-3
    warm = [draw(rng, 1.5, 200) for _ in range(3)]
    assert entropy_balance(*zip(*warm, strict=True), level=0.95).surplus.high < 0


def test_one_response_is_an_error():
    with pytest.raises(ValueError, match="two responses"):
        entropy_balance([[-1.0]], [[1.0]], level=0.95)
