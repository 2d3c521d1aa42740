from __future__ import annotations

import time

import numpy as np
import pytest

from gradvar.rollouts.rewards import choose_reward, score_rollouts
from gradvar.rollouts.rewards.answers import (
    as_text,
    exact_score,
    gold_texts,
    gsm8k_flexible_score,
    gsm8k_score,
    last_boxed,
)
from tests.rollouts.rewards.examples import a_prompt, some_rollouts

LONG = 100_000


@pytest.mark.parametrize("ground_truth", [{"nums": [4, 6], "target": 24}, {"numbers": [4, 6.0], "target": "24"}])
def test_countdown_takes_both_names_of_the_numbers(ground_truth: object) -> None:
    reward = choose_reward("countdown", ground_truth)
    rollouts = some_rollouts("<answer>4 * 6</answer>", "<answer>4 + 6</answer>", "<answer>24</answer>", "4 * 6")
    result = score_rollouts(reward, a_prompt(ground_truth, data_source="countdown"), rollouts)
    assert result.rewards.tolist() == [1, 0, 0, 0]
    assert result.rewards.dtype == np.float64
    assert result.unverified == {}


@pytest.mark.parametrize(
    ("response", "gold", "strict", "flexible"),
    [
        ("so it is\n#### 72", "72", 1, 1),
        ("#### 71\n#### 72", "72", 1, 1),
        ("#### 72\n#### 71", "72", 0, 0),
        ("#### 1,072.50", "1072.5", 1, 1),
        ("#### $18.", "18", 1, 1),
        ("#### -3", "-3", 1, 1),
        ("#### 007", "7", 1, 1),
        ("#### -0.00", "0", 1, 1),
        ("#### .5", "0.50", 1, 1),
        (r"the answer is \boxed{72}.", "72", 0, 1),
        ("72 apples", 72, 0, 1),
        ("no number", "72", 0, 0),
        ("#### seventy", "72", 0, 0),
        ("#### 72", "long solution <<3*24=72>> #### 72", 1, 1),
        ("#### 72 because 5 is odd", "72", 1, 0),
        ("#### " + "9" * LONG, "9" * LONG, 1, 1),
    ],
)
def test_gsm8k(response: str, gold: object, strict: int, flexible: int) -> None:
    assert gsm8k_score(response, gold) == strict
    assert gsm8k_flexible_score(response, gold) == flexible


@pytest.mark.parametrize(
    ("response", "gold", "score"),
    [
        ("Paris", "Paris", 1),
        ("  New \n York ", "New York", 1),
        ("paris", "Paris", 0),
        ("It is Paris", "Paris", 0),
        ("It is <answer> Paris\n</answer> I think", "Paris", 1),
        (r"It is \boxed{Rome}, no, \boxed{Paris}", "Paris", 1),
        (r"\boxed{a{b}c}", "a{b}c", 1),
        (r"\boxed{cut", "cut", 0),
        ("yes", ["no", "yes"], 1),
        ("3", 3.0, 1),
        ("", "Paris", 0),
    ],
)
def test_exact(response: str, gold: object, score: int) -> None:
    assert exact_score(response, gold) == score


def test_numbers_become_plain_digits() -> None:
    assert [as_text(x) for x in (42, 100.0, 0.5, 1e-7, 10**20, -3)] == [
        "42",
        "100",
        "0.5",
        "0.0000001",
        "1" + "0" * 20,
        "-3",
    ]
    assert as_text(True) is as_text(None) is as_text({}) is as_text([]) is None
    assert gold_texts(["a", None]) == ()


def test_last_boxed_matches_braces() -> None:
    assert last_boxed(r"\boxed{\frac{1}{2}} and so on") == r"\frac{1}{2}"
    assert last_boxed(r"\boxed{\{1, 2\}}") == r"\{1, 2\}"
    assert last_boxed("none") is None


@pytest.mark.parametrize(
    "text",
    [
        "#### " + " " * LONG,
        "#" * LONG,
        "####$ " * (LONG // 6),
        "1," * LONG,
        "\\boxed{" * (LONG // 7),
        "<answer>" * 9999,
    ],
)
def test_hostile_texts_take_no_time(text: str) -> None:
    start = time.monotonic()
    for score in (gsm8k_score, gsm8k_flexible_score, exact_score):
        assert score(text, "72") == 0
    assert time.monotonic() - start < 2, "a regular expression backtracks"
