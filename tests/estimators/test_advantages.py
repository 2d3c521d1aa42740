import numpy as np
import pytest

from gradvar.errors import GradvarError
from gradvar.estimators import ADVANTAGES, advantages
from tests.estimators import references


@pytest.mark.parametrize("kind", list(ADVANTAGES))
def test_matches_the_definition_alone_and_stacked(kind):
    rng = np.random.default_rng(0)
    rewards, lengths = rng.normal(size=(3, 5, 7)), rng.integers(1, 50, size=(3, 5, 7)).astype(float)
    stacked = advantages(rewards, kind, lengths=lengths)
    for i in range(3):
        for j in range(5):
            expected = references.advantage(list(rewards[i, j]), kind, list(lengths[i, j]))
            np.testing.assert_allclose(stacked[i, j], expected, rtol=1e-12, atol=1e-15)


def test_grpo_is_verls_formula():
    """verl compute_grpo_outcome_advantage, commit b178a3c: (score - mean) / (torch.std + 1e-6)."""
    torch = pytest.importorskip("torch")
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    expected = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
    np.testing.assert_allclose(advantages(rewards.numpy(), "grpo"), expected.numpy(), rtol=1e-14)


@pytest.mark.parametrize("kind", ["grpo", "mean", "rloo", "opo"])
def test_equal_rewards_give_exactly_zero(kind):
    # 0.1 is not a binary fraction: its mean over 7 differs from it by rounding.
    assert (advantages(np.full(7, 0.1), kind, lengths=np.arange(1.0, 8.0)) == 0.0).all()


def test_centred_advantages_sum_to_zero():
    rewards = np.random.default_rng(1).normal(size=9)
    for kind in ("grpo", "mean", "rloo"):
        assert abs(advantages(rewards, kind).sum()) < 1e-12


def test_opo_balances_the_length_weighted_rewards():
    rewards, lengths = np.array([1.0, 0.0, 1.0]), np.array([10.0, 50.0, 200.0])
    assert abs((lengths * advantages(rewards, "opo", lengths=lengths)).sum()) < 1e-12


@pytest.mark.parametrize(
    ("rewards", "kind", "lengths", "words"),
    [
        ([1.0, 0.0], "ppo", None, "unknown advantage 'ppo': expected one of grpo"),
        ([1.0, np.nan], "grpo", None, "1 rewards are not finite"),
        ([1.0], "rloo", None, "at least 2"),
        ([1.0, 0.0], "opo", None, "give lengths"),
        ([1.0, 0.0], "opo", [3.0], "do not match"),
        ([], "raw", None, "at least one response"),
    ],
)
def test_refuses(rewards, kind, lengths, words):
    with pytest.raises(GradvarError, match=words):
        advantages(rewards, kind, lengths=lengths)


def test_score_needs_no_reward():
    np.testing.assert_array_equal(advantages([np.nan, 1.0], "score"), [1.0, 1.0])
