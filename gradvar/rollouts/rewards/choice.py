"""Which reward scores which data: verl's source names and what gradvar adds to them."""

from __future__ import annotations

import difflib
import re
from typing import Any

from gradvar.errors import GradvarError
from gradvar.rollouts.rewards import answers
from gradvar.rollouts.rewards.registry import REWARDS, Reward, check_ground_truth, one_by_one
from gradvar.rollouts.rewards.user_function import load_user_function

# verl/utils/reward_score/__init__.py at b178a3cd. What it names exactly is matched more widely here ("openai/gsm8k",
# "gsm8k"; "HuggingFaceH4/MATH-500", "math_dapo", ...); "countdown" is TinyZero's. First match wins.
_SOURCES: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("countdown", re.compile("countdown")),
    ("gsm8k", re.compile("gsm8k")),
    (
        "math",
        re.compile(r"math|open.?reasoner.?zero|\borz|aime|\bamc|numina|olympiad|minerva|deepscale|dapo"),
    ),
)
_VERL_ONLY = re.compile(r"codecontests|apps|codeforces|taco|hiyouga/geometry3k|searchr1_.*")
"""Sources that verl scores by sandboxes, images or retrieval, which gradvar has no counterpart of."""


def _by_source(data_source: str) -> str | None:
    source = data_source.lower().replace("_", " ")
    for name, pattern in _SOURCES:
        if pattern.search(source):
            return name
    if _VERL_ONLY.fullmatch(data_source.lower()):
        raise GradvarError(
            f"data_source {data_source!r}: gradvar has no reward for it ({', '.join(REWARDS)} are there); "
            "give your own by --reward file.py:function"
        )
    return None


def _by_ground_truth(ground_truth: Any, source: str) -> tuple[str, str]:
    if isinstance(ground_truth, dict) and answers.countdown_needs(ground_truth) is None:
        return "countdown", "a dict with numbers and a target"
    texts = answers.gold_texts(ground_truth)
    if ground_truth is None or not any(text.strip() for text in texts):
        received = "no ground truth" if ground_truth is None else f"{ground_truth!r:.60}"
        raise GradvarError(
            f"reward for data_source {source!r}: expected a ground truth (a text, a number, a list of accepted ones, "
            f"or CountDown's nums and target), received {received}; name the answer's column by --answer-column, "
            "or give your own function by --reward file.py:function"
        )
    if all(_is_formula(text) for text in texts):
        return "math", "a number or a formula"
    return "exact", "plain text"


def _is_formula(text: str) -> bool:
    """Whether a text has digits or LaTeX, and no words outside LaTeX commands."""
    bare = re.sub(r"\\[A-Za-z]+", " ", text)
    return bool(re.search(r"[0-9\\]", text)) and not re.search(r"[^\W\d_]{3}", bare)


def choose_reward(data_source: str, ground_truth: Any, override: str | None = None) -> Reward:
    """Choose the reward function for data of one source.

    A user's choice wins. Otherwise the source decides, by verl's names (`default_compute_score`) and their like:
    countdown; gsm8k; math, MATH-500, aime, amc, numina, olympiad, minerva, deepscaler, dapo, Open-Reasoner-Zero.
    A source that says nothing leaves it to the ground truth: a dict with nums and target is CountDown, a number or a
    formula goes to math-verify, other text must match exactly.

    Args:
        data_source: Where the problem came from.
        ground_truth: The gold answer.
        override: A registry name (`REWARDS`), or `file.py:function` of verl's form.

    Raises:
        GradvarError: If there is no such reward, none fits, or the ground truth is missing or not what it needs.
    """
    source = data_source if len(data_source) <= 60 else data_source[:57] + "..."
    if override is not None and override not in REWARDS:
        return _user_reward(override)
    if override is not None:
        name, why = override, "as asked"
    elif (found := _by_source(data_source)) is not None:
        name, why = found, f"because data_source is {source!r}"
    else:
        name, shape = _by_ground_truth(ground_truth, source)
        why = f"because data_source {source!r} names no reward and the ground truth is {shape}"
    rule = REWARDS[name]
    check_ground_truth(f"data_source {source!r}", rule.name, rule.needs, ground_truth)
    return Reward(name=name, why=f"{name}, {why}", needs=rule.needs, score=rule.score, label=name)


def _user_reward(override: str) -> Reward:
    if ":" not in override and not override.endswith(".py"):
        near = difflib.get_close_matches(override, REWARDS, n=1)
        raise GradvarError(
            f"reward {override!r}: expected one of {', '.join(REWARDS)} or file.py:function"
            + (f"; did you mean {near[0]!r}?" if near else "")
        )
    function = load_user_function(override)
    return Reward(
        name=override,
        why=f"{override}, as asked",
        needs=lambda ground_truth: None,
        score=one_by_one(function.score),
        label=f"{override} sha256:{function.digest}",
    )
