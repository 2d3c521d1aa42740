from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from gradvar.errors import GradvarError
from gradvar.rollouts.rewards import REWARDS, choose_reward, score_rollouts
from tests.rollouts.rewards.examples import a_prompt, some_rollouts

COUNTDOWN = {"numbers": [1, 2], "target": 3}


@pytest.mark.parametrize(
    ("data_source", "ground_truth", "name"),
    [
        ("countdown", COUNTDOWN, "countdown"),
        ("Jiayi-Pan/Countdown-Tasks-3to4", COUNTDOWN, "countdown"),
        ("openai/gsm8k", "72", "gsm8k"),
        ("HuggingFaceH4/MATH-500", r"\frac12", "math"),
        ("DigitalLearningGmbH/MATH-lighteval", "x", "math"),
        ("lighteval/MATH", "x", "math"),
        ("math_dapo", "34", "math"),
        ("math", "34", "math"),
        ("aime2024", "34", "math"),
        ("numina_cn_k12", "34", "math"),
        ("numina_olympiads", "34", "math"),
        ("math-ai/amc23", 27.0, "math"),
        ("Open-Reasoner-Zero", "Evelyn", "math"),
        ("unknown", "42", "math"),
        ("unknown", 0.5, "math"),
        ("unknown", r"\sqrt{x}", "math"),
        ("unknown", ["1/2", "0.5"], "math"),
        ("unknown", "Paris", "exact"),
        ("unknown", "A", "exact"),
        ("unknown", "3 blind mice", "exact"),
        ("unknown", COUNTDOWN, "countdown"),
    ],
)
def test_the_source_chooses_then_the_ground_truth(data_source: str, ground_truth: Any, name: str) -> None:
    reward = choose_reward(data_source, ground_truth)
    assert reward.name == reward.label == name
    assert reward.why.startswith(f"{name}, because")
    assert data_source in reward.why


def test_what_is_said() -> None:
    assert choose_reward("countdown", COUNTDOWN).why == "countdown, because data_source is 'countdown'"
    assert choose_reward("countdown", "7", "exact").why == "exact, as asked"


def test_an_override_wins() -> None:
    for name in REWARDS:
        ground_truth = COUNTDOWN if name == "countdown" else "72"
        assert choose_reward("searchR1_nq", ground_truth, name).name == name


@pytest.mark.parametrize(
    ("data_source", "ground_truth", "override", "words"),
    [
        ("unknown", None, None, ["expected a ground truth", "--answer-column", "file.py:function"]),
        ("unknown", "  ", None, ["expected a ground truth"]),
        ("unknown", {"a": 1}, None, ["expected a ground truth", "{'a': 1}"]),
        ("math", None, None, ["math needs", "received none"]),
        ("math", ["1", None], None, ["math needs"]),
        ("math", {"value": 1}, None, ["math needs"]),
        ("unknown", True, None, ["expected a ground truth"]),
        ("openai/gsm8k", "seventy", None, ["gsm8k needs", "'seventy'"]),
        ("countdown", "24", None, ["countdown needs", '"nums"']),
        ("countdown", {"nums": [], "target": 3}, None, ["countdown needs"]),
        ("countdown", {"nums": [1.5], "target": 3}, None, ["countdown needs"]),
        ("countdown", {"nums": [1, 2], "target": float("inf")}, None, ["countdown needs"]),
        ("countdown", {"nums": [1, 2]}, None, ["countdown needs"]),
        ("codecontests", "x", None, ["codecontests", "no reward", "--reward file.py:function"]),
        ("searchR1_nq", {"target": ["x"]}, None, ["no reward"]),
        ("math", "1", "maths", ["'maths'", "countdown, math, gsm8k", "did you mean 'math'"]),
        ("math", "1", "", ["expected one of"]),
    ],
)
def test_mistakes_end_in_one_line(data_source: str, ground_truth: Any, override: str | None, words: list[str]) -> None:
    with pytest.raises(GradvarError) as caught:
        choose_reward(data_source, ground_truth, override)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_a_prompt_whose_ground_truth_does_not_fit_is_named() -> None:
    reward = choose_reward("openai/gsm8k", "72")
    with pytest.raises(GradvarError, match="prompt 12: the reward gsm8k needs"):
        score_rollouts(reward, a_prompt(None, prompt_id="12"), some_rollouts("#### 72"))


def test_progress_counts_the_responses() -> None:
    done: list[int] = []
    reward = choose_reward("openai/gsm8k", "72")
    score_rollouts(reward, a_prompt("72"), some_rollouts("a", "b", "c"), on_progress=done.append)
    assert sum(done) == 3


def test_importing_the_rewards_loads_no_torch() -> None:
    program = "import gradvar.rollouts.rewards, sys; raise SystemExit('torch' in sys.modules or 'sympy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
