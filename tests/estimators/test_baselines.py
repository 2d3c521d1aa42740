"""What a response owes to the baseline that it shares with the others."""

import numpy as np
import pytest

from gradvar.estimators import deviations
from gradvar.estimators.baselines import advantage_dependence
from tests.estimators import references, simulator


@pytest.mark.parametrize("kind", ["grpo", "mean", "rloo", "opo", "raw"])
def test_shared_baseline_by_leaving_each_response_out(kind):
    """sum over j != i of q_j (D_j - D_j with the baseline of the others), the mean gradient left alone."""
    rng = np.random.default_rng(8)
    scores, _, lengths = simulator.draw(9, rng=rng)
    rewards = rng.integers(0, 4, 9).astype(float)
    gram = references.gram_of(scores)
    a = references.advantage(rewards, kind, lengths)
    whole = references.deviation(a[:, None] * scores)
    pull = rng.normal(size=(9, 2))
    chosen = np.arange(9) != 4
    expected = np.zeros((9, 2))
    for i in range(9):
        others = [j for j in range(9) if j != i]
        inside = references.advantage(rewards[others], kind, lengths[others])
        # A = p r + q on the others, extended to the one left out.
        p, q = np.polyfit(rewards[others], inside, 1)
        moved = references.deviation((p * rewards + q)[:, None] * scores)
        expected[i] = sum((pull[j] * (whole[j] - moved[j]) for j in others), np.zeros(2))
    found = advantage_dependence(rewards, kind, lengths)(lambda x: deviations(gram, x))(pull)
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-8)
    part = advantage_dependence(rewards, kind, lengths, subset=chosen)(lambda x: deviations(gram, x)[chosen])
    pull[4] = 0.0
    again = advantage_dependence(rewards, kind, lengths)(lambda x: deviations(gram, x))(pull)
    np.testing.assert_allclose(part(pull[chosen]), again[chosen], rtol=1e-8, atol=1e-8)
