"""Shares of the variance against their definition on gradients, and their intervals."""

import numpy as np
import pytest

from gradvar.estimators import variance_share_table
from gradvar.runs import PromptScores


def group(gradients, target, prompt_id):
    n = len(gradients)
    return PromptScores(
        prompt_id=prompt_id,
        target=target,
        gram=gradients @ gradients.T,
        rewards=np.ones(n),
        lengths=np.arange(1.0, n + 1),
        truncated=np.zeros(n, dtype=bool),
    )


def test_shares_are_those_of_the_gradients_variance_and_sum_to_one():
    rng = np.random.default_rng(0)
    parts = {(t, q): rng.normal(size=(12, 5)) * (1 + 2 * k) for k, t in enumerate("ab") for q in "xyz"}
    table = variance_share_table([group(g, t, q) for (t, q), g in parts.items()])

    def variance(target, prompt):
        g = parts[target, prompt]
        return np.sum((g - g.mean(axis=0)) ** 2) / (len(g) - 1)

    one = table[(table["target"] == "a") & (table["prompt_id"] == "y")].iloc[0]
    assert one["value"] == pytest.approx(variance("a", "y") / (variance("a", "y") + variance("b", "y")))
    pooled = table[table["prompt_id"].isna() & (table["estimand"] == "these prompts")].set_index("target")["value"]
    above = sum(variance("a", q) for q in "xyz")
    assert pooled["a"] == pytest.approx(above / (above + sum(variance("b", q) for q in "xyz")))
    assert pooled.sum() == pytest.approx(1)
    across = table[table["estimand"] == "prompts like these"]
    assert across["low"].isna().all()  # three prompts are too few


def test_the_replicate_of_a_response_is_the_share_without_it():
    from gradvar.estimators.shares import _variances

    gradients = np.random.default_rng(1).normal(size=(6, 4))
    _, left = _variances(gradients @ gradients.T)
    for i in range(6):
        without = np.delete(gradients, i, axis=0)
        assert left[i] == pytest.approx(np.sum((without - without.mean(axis=0)) ** 2) / 4)


def test_the_interval_covers_the_true_share():
    rng = np.random.default_rng(2)
    truth, covered, trials = 4 / 5, 0, 200
    for _ in range(trials):
        small, large = rng.normal(size=(2, 40, 6)) * np.array([1.0, 2.0])[:, None, None]
        table = variance_share_table([group(small, "a", "q"), group(large, "b", "q")]).set_index("target")
        covered += table.loc["b", "low"] <= truth <= table.loc["b", "high"]
    # 200 trials at 95%: three standard errors are 0.046
    assert covered / trials > 0.90
