"""The gradient noise scale against its literal definition, a simulated population, and where it is unresolved."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from gradvar.estimators.noise_scale import noise_moments, noise_scale_table
from tests.estimators import simulator
from tests.estimators.test_tables import only, pick, prompts


def literal(gram, rewards):
    """Means over all different responses, term by term."""
    n = range(len(rewards))
    norms = [
        (rewards[i] - rewards[j]) * (rewards[i] - rewards[k]) * gram[i, i] for i, j, k in itertools.permutations(n, 3)
    ]
    signal = [
        (rewards[i] - rewards[k]) * (rewards[j] - rewards[m]) * gram[i, j]
        for i, j, k, m in itertools.permutations(n, 4)
    ]
    return math.fsum(norms) / len(norms), math.fsum(signal) / len(signal)


def test_moments_and_replicates_are_the_definition():
    rng = np.random.default_rng(0)
    scores, rewards = rng.normal(size=(8, 5)), rng.normal(size=8) + 3.0
    gram = scores @ scores.T
    found = noise_moments(gram, rewards)
    assert (found.same, found.cross) == pytest.approx(literal(gram, rewards), rel=1e-10)
    for m in range(8):
        kept = np.delete(np.arange(8), m)
        expected = literal(gram[np.ix_(kept, kept)], rewards[kept])
        assert (found.same_without[m], found.cross_without[m]) == pytest.approx(expected, rel=1e-10)


LAW = {"beta": 1.0, "signal": 2.5, "p": 0.4}


def truth():
    """From a million lengths and rewards: ||s||^2 and E[s | r] are the simulator's own formulas."""
    lengths, rewards, _, chance = simulator.draw_lengths_and_rewards(1_000_000, rng=np.random.default_rng(9), p=0.4)
    mu = rewards.mean()
    mean = LAW["signal"] * float(((rewards - mu) * (rewards - chance)).mean())
    squares = (lengths / simulator.TYPICAL_LENGTH) ** LAW["beta"] + LAW["signal"] ** 2 * (rewards - chance) ** 2
    return float(((rewards - mu) ** 2 * squares).mean()), mean**2


def test_moments_are_unbiased_and_the_interval_covers():
    norms, signal = truth()
    scale = norms / signal - 1.0
    made, hits = [], 0
    for t in range(300):
        one = simulator.prompt("p", 64, rng=np.random.default_rng([5, t]), **LAW)
        found = noise_moments(one.gram, one.rewards)
        made.append((found.same, found.cross))
        row = only(noise_scale_table([one]), prompt_id="p")
        hits += row["low"] <= scale <= row["high"]
    means, errors = np.mean(made, axis=0), np.std(made, axis=0, ddof=1) / math.sqrt(300)
    assert (np.abs(means - [norms, signal]) < 4 * errors).all(), (means, (norms, signal), errors)
    assert hits >= stats.binom.ppf(1e-4, 300, 0.94), hits


def test_it_is_n_cv_squared_of_a_mean_with_a_known_baseline():
    norms, signal = truth()
    rng = np.random.default_rng(3)
    updates = []
    for _ in range(4000):
        scores, rewards, _ = simulator.draw(16, rng=rng, **LAW)
        updates.append((rewards - 0.4) @ scores / 16)
    updates = np.array(updates)
    spread = updates.var(axis=0, ddof=1).sum()
    assert 16 * spread / signal == pytest.approx(norms / signal - 1.0, rel=0.06)


def test_a_constant_added_to_the_rewards_or_a_factor_changes_nothing():
    one = prompts(1, n=32, targets=("a",), signal=3.0)[0]
    plain = only(noise_scale_table([one]))
    for other in (replace(one, rewards=7.0 + 3.0 * one.rewards), replace(one, gram=9.0 * one.gram)):
        assert only(noise_scale_table([other]))["value"] == pytest.approx(plain["value"], rel=1e-9)


def test_without_a_signal_it_is_unresolved_with_a_lower_bound():
    lost = prompts(1, n=48, targets=("a",), signal=0.0)
    row = only(noise_scale_table(lost, seed=2))
    assert row["verdict"] == "unresolved"
    assert math.isnan(row["value"])
    assert row["low"] > 0
    assert row["high"] == math.inf
    assert row["n_needed"] > 48


def test_pooled_rows_and_prompts_that_say_nothing():
    groups = prompts(5, n=48, targets=("a", "b"), signal=3.0)
    groups = [replace(g, rewards=np.ones(48)) if g.prompt_id == "p0" else g for g in groups]
    groups = [g.select(np.arange(4)) if g.prompt_id == "p1" else g for g in groups]
    table = noise_scale_table(groups, seed=4)
    assert set(table["target"]) == {"a", "b", "sum"}
    assert (table["seed"] == 4).all()
    assert only(table, target="a", prompt_id="p0")["verdict"] == "silent: all rewards equal"
    assert "fewer than 5" in only(table, target="a", prompt_id="p1")["method"]
    pooled = only(table, target="a", prompt_id=None, estimand="these prompts")
    assert (pooled["clusters"], pooled["n"]) == (3, 144)
    found = [noise_moments(g.gram, g.rewards) for g in groups if g.target == "a" and g.prompt_id > "p1"]
    same, cross = sum(m.same for m in found), sum(m.cross for m in found)
    assert pooled["value"] == pytest.approx(same / cross - 1.0)
    like = only(table, target="a", prompt_id=None, estimand="prompts like these")
    assert math.isnan(like["low"])  # three prompts are too few
    assert pick(table, prompt_id=None)["method"].str.startswith("tr Sigma").all()
