"""Search traces: right arithmetic, right answers, the stated distribution, one seed one text."""

import math
import re

import numpy as np
import pytest

from gradvar.demo import CountdownProblem, check_answer
from gradvar.demo.traces import (
    MAX_VALUE,
    Step,
    TraceSettings,
    chance_per_attempt,
    search_problems,
    search_trace,
    steps,
)

SETTINGS = TraceSettings()
PROBLEM = CountdownProblem((3, 7, 12), 16)


def traces(problem: CountdownProblem, count: int, settings: TraceSettings = SETTINGS, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [search_trace(problem, settings=settings, rng=rng) for _ in range(count)]


def test_same_seed_same_traces() -> None:
    assert traces(PROBLEM, 5, seed=3) == traces(PROBLEM, 5, seed=3)
    assert traces(PROBLEM, 5, seed=3) != traces(PROBLEM, 5, seed=4)


def test_every_line_of_a_trace_is_right() -> None:
    for trace in traces(PROBLEM, 200):
        *lines, last = trace.split("\n")
        for first, second in zip(lines[::2], lines[1::2], strict=True):
            a, op, b, r, rest, again = re.fullmatch(r"(\d+)([-+*/])(\d+)=(\d+) left (\d+) (\d+)", first).groups()  # type: ignore[union-attr]
            assert r == again
            assert sorted((int(a), int(b), int(rest))) == sorted(PROBLEM.nums)
            assert Step(int(a), op, int(b), int(r)) in steps(int(a), int(b))
            c, op, d, r, verdict = re.fullmatch(r"(\d+)([-+*/])(\d+)=(\d+) (yes|low|high)", second).groups()  # type: ignore[union-attr]
            assert sorted((c, d)) == sorted((rest, again))
            assert Step(int(c), op, int(d), int(r)) in steps(int(c), int(d))
            assert verdict == ("yes" if int(r) == PROBLEM.target else "low" if int(r) < PROBLEM.target else "high")
        if lines[-1].endswith("yes"):
            assert check_answer(last, PROBLEM.nums, PROBLEM.target), trace
        else:
            assert last == "give up"


def test_steps_stay_within_the_numbers_that_are_tokens() -> None:
    assert [str(step) for step in steps(4, 12)] == ["12+4=16", "12-4=8", "12*4=48", "12/4=3"]
    assert [str(step) for step in steps(60, 50)] == ["60-50=10"]
    assert [str(step) for step in steps(5, 0)] == ["5+0=5", "5-0=5", "5*0=0"]
    assert all(step.result <= MAX_VALUE for a in range(100) for b in range(a + 1) for step in steps(a, b))


def test_the_chance_of_an_attempt_is_what_single_attempts_show() -> None:
    one = TraceSettings(budget_median=1.0, budget_sigma=0.0)
    count, chance = 4000, chance_per_attempt(PROBLEM)
    share = np.mean(["answer" in trace for trace in traces(PROBLEM, count, one)])
    assert 0 < chance < 1
    assert abs(share - chance) < 5 * math.sqrt(chance * (1 - chance) / count)


def test_listed_problems_lie_in_the_stated_ranges() -> None:
    settings = TraceSettings(number_range=(1, 6), target_range=(10, 30), chance_range=(0.02, 0.2))
    problems = search_problems(settings)
    assert problems == search_problems(settings)
    assert len({problem.key for problem in problems}) == len(problems) > 50
    for problem in problems:
        assert 0.02 <= chance_per_attempt(problem) <= 0.2
        assert all(1 <= n <= 6 for n in problem.nums)
        assert 10 <= problem.target <= 30


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="chance_range: expected"):
        TraceSettings(chance_range=(0.0, 0.5))
    with pytest.raises(ValueError, match="budget: expected"):
        TraceSettings(budget_median=50.0, budget_limit=40)
    with pytest.raises(ValueError, match="three numbers"):
        chance_per_attempt(CountdownProblem((1, 2, 3, 4), 10))
