"""Batches formed of the measured responses: against every batch that can be formed, and against the law in B."""

import itertools

import numpy as np
import pytest

from gradvar.estimators.aggregation import find_rule
from gradvar.estimators.batches import prompt_parts
from gradvar.estimators.formed_batches import formed_moments
from tests.estimators.population import exact_products
from tests.estimators.test_batches import drawn_groups, small_prompts, update_of


@pytest.mark.parametrize(("rule", "alpha"), [("dapo", None), ("vl_norm", 1.0)])
def test_formed_batches_are_the_literal_means_over_all_batches(rule, alpha):
    """Two prompts to a batch, two responses each, weights over the four responses together."""
    prompts, gradients = small_prompts(np.random.default_rng(3), responses=4)
    groups, coefficients = drawn_groups(prompts, rule, alpha, size=2, permutations=1500, seed=5)
    found = formed_moments(
        prompts,
        exact_products(prompts, gradients),
        groups,
        coefficients,
        find_rule(rule),
        [2],
        alpha=alpha,
        max_length=40.0,
        rng=np.random.default_rng(6),
    )[2]
    pairs = [np.array(pair) for pair in itertools.combinations(range(4), 2)]
    other = [next(b for b in range(6) if not set(pairs[a]) & set(pairs[b])) for a in range(6)]
    updates = {
        (j, k): [[update_of([(j, a), (k, b)], gradients, prompts, rule, alpha, "batch") for b in pairs] for a in pairs]
        for j, k in itertools.combinations(range(4), 2)
    }
    power = np.mean([u @ u for of in updates.values() for row in of for u in row])
    given = np.mean([of[a][b] @ of[other[a]][other[b]] for of in updates.values() for a in range(6) for b in range(6)])
    mean = {pair: np.mean(of, axis=(0, 1)) for pair, of in updates.items()}
    disjoint = [(a, b) for a in mean for b in mean if not set(a) & set(b)]
    signal = np.mean([mean[a] @ mean[b] for a, b in disjoint])
    assert found.power == pytest.approx([power], rel=0.03)
    assert found.given == pytest.approx([given], rel=0.05, abs=0.03 * power)
    assert found.signal == pytest.approx([signal], rel=0.05, abs=0.03 * power)


def test_formed_batches_with_group_weights_are_the_law_in_b():
    """Forming batches of a rule whose scope does not matter gives what a single group's moments give."""
    prompts, gradients = small_prompts(np.random.default_rng(8), prompts=6)
    groups, coefficients = drawn_groups(prompts, "grpo", None, size=2, permutations=400, seed=2)
    exact = exact_products(prompts, gradients)
    law = prompt_parts(prompts, exact, groups, coefficients).batch(2)
    formed = formed_moments(
        prompts, exact, groups, coefficients, find_rule("grpo"), [2], alpha=None, max_length=40.0,
        rng=np.random.default_rng(1),
    )[2]  # fmt: skip
    for name in ("power", "given", "signal"):
        assert getattr(formed, name) == pytest.approx(getattr(law, name), rel=0.03, abs=0.01 * law.power[0])
        without = f"{name}_without"
        assert getattr(formed, without) == pytest.approx(getattr(law, without), rel=0.1, abs=0.03 * law.power[0])
