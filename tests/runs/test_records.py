"""The records refuse what cannot be, and Grams add as inner products of disjoint blocks do."""

import math

import numpy as np
import pytest

from gradvar.errors import GradvarError
from gradvar.runs import TABLE_COLUMNS, Estimate, PromptScores, Rollout, ScoreGram, TableRow, estimate_table


def make_gram(target: str, gradients: np.ndarray, **changes) -> ScoreGram:
    facts = {
        "target": target,
        "matrix": gradients @ gradients.T,
        "rollout_ids": tuple(range(len(gradients))),
        "dtype": "float64",
        "include_bias": True,
        "temperature": 1.0,
    }
    return ScoreGram(**{**facts, **changes})


def test_sum_of_grams_is_the_gram_of_the_joined_gradients():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(5, 3)), rng.normal(size=(5, 4))
    both = make_gram("a", first) + make_gram("b", second)
    joined = np.hstack([first, second])
    np.testing.assert_allclose(both.gram(), joined @ joined.T, rtol=1e-12)
    assert both.target == "a + b"


@pytest.mark.parametrize("changes", [{"temperature": 0.5}, {"dtype": "bfloat16"}, {"include_bias": False}])
def test_grams_measured_another_way_do_not_add(changes):
    gradients = np.ones((3, 2))
    with pytest.raises(ValueError, match="differ"):
        make_gram("a", gradients) + make_gram("b", gradients, **changes)


def test_a_target_is_not_counted_twice():
    gradients = np.ones((3, 2))
    both = make_gram("a", gradients) + make_gram("b", gradients)
    with pytest.raises(ValueError, match="twice"):
        both + make_gram("b", gradients)


def test_gram_needs_float64_of_the_right_shape():
    with pytest.raises(ValueError, match="float64"):
        make_gram("a", np.ones((3, 2)), matrix=np.ones((3, 3), dtype=np.float32))
    with pytest.raises(ValueError, match=r"\(3, 3\)"):
        make_gram("a", np.ones((3, 2)), matrix=np.ones((2, 2)))


def test_length_counts_tokens_that_carry_loss():
    rollout = Rollout(rollout_id=0, token_ids=(5, 6, 7, 8), text="", finish_reason="stop", loss_mask=(1, 0, 0, 1))
    assert rollout.length == 2
    assert Rollout(rollout_id=0, token_ids=(5, 6, 7), text="", finish_reason="stop").length == 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"token_ids": ()}, "empty"),
        ({"finish_reason": "abort"}, "finish_reason"),
        ({"sampler_logprobs": (-1.0,)}, "1 entries for 2"),
        ({"loss_mask": (1, 2)}, "only 0 and 1"),
        ({"loss_mask": (0, 0)}, "no token carries loss"),
    ],
)
def test_impossible_rollouts_are_refused(changes, words):
    facts = {"rollout_id": 3, "token_ids": (1, 2), "text": "", "finish_reason": "stop"}
    with pytest.raises(GradvarError, match=words):
        Rollout(**{**facts, **changes})


def test_selecting_keeps_rows_and_columns_together():
    gram = np.arange(16.0).reshape(4, 4)
    scores = PromptScores(
        prompt_id="0",
        target="t",
        gram=gram,
        rewards=np.array([1.0, np.nan, 0.0, 1.0]),
        lengths=np.arange(1.0, 5.0),
        truncated=np.array([False, True, False, True]),
        log_probs=-np.arange(4.0),
    )
    kept = scores.verified()
    np.testing.assert_array_equal(kept.gram, gram[np.ix_([0, 2, 3], [0, 2, 3])])
    np.testing.assert_array_equal(kept.lengths, [1, 3, 4])
    np.testing.assert_array_equal(kept.truncated, [False, False, True])
    np.testing.assert_array_equal(kept.log_probs, [0, -2, -3])


def test_table_has_the_designed_columns_and_no_invented_zeros():
    estimate = Estimate(value=math.nan, low=0.5, high=math.inf, level=0.95, method="m", n=8, clusters=1, seed=None)
    table = estimate_table([TableRow(quantity="cv", estimate=estimate, target="t", extra={"needed": 99})])
    assert list(table.columns) == [*TABLE_COLUMNS, "needed"]
    row = table.iloc[0]
    assert math.isnan(row["value"])
    assert math.isnan(row["alpha"])
    assert row["prompt_id"] is None or math.isnan(row["prompt_id"])
    assert row["high"] == math.inf
