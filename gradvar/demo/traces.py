r"""Search traces: the texts that the bundled policy learns to write.

A trace tries the operations of a CountDown problem of three numbers line by line, at random and without memory, until
an attempt reaches the target or a randomly drawn budget of attempts is used up:

    12-7=5 left 3 5
    5*3=15 low
    7*3=21 left 12 21
    21+12=33 high
    7-3=4 left 12 4
    12+4=16 yes
    <answer>12+(7-3)</answer>

or, at the end of its budget, `give up`. The number of attempts is therefore the smaller of a geometric and a
lognormal draw, so that right and wrong responses both come in many lengths.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement

import numpy as np

from gradvar.demo.countdown import CountdownProblem

MAX_VALUE = 99
"""Largest value a trace writes: every number up to it is one token of the policy's tokenizer."""


@dataclass(frozen=True, kw_only=True)
class TraceSettings:
    """What problems are searched, and for how long."""

    number_range: tuple[int, int] = (1, 20)
    """Smallest and largest number of a problem."""
    target_range: tuple[int, int] = (10, 99)
    """Smallest and largest target."""
    chance_range: tuple[float, float] = (0.015, 0.1)
    """Smallest and largest chance that a single attempt succeeds; problems outside are left out."""
    budget_median: float = 12.0
    """Median of the lognormal from which the budget is drawn [attempts]."""
    budget_sigma: float = 0.9
    """Standard deviation of the logarithm of the budget."""
    budget_limit: int = 45
    """Largest budget; a larger draw is drawn again [attempts]."""

    def __post_init__(self) -> None:
        low, high = self.chance_range
        if not 0 < low < high <= 1:
            raise ValueError(f"chance_range: expected 0 < low < high <= 1, received {self.chance_range}.")
        if not 1 <= self.budget_median <= self.budget_limit or self.budget_sigma < 0:
            raise ValueError(
                "budget: expected 1 <= median <= limit and sigma >= 0, received "
                f"{self.budget_median}, {self.budget_limit} and {self.budget_sigma}."
            )


@dataclass(frozen=True)
class Step:
    """One operation of a trace, the larger operand first."""

    left: int
    operator: str
    right: int
    result: int

    def __str__(self) -> str:
        return f"{self.left}{self.operator}{self.right}={self.result}"


def steps(a: int, b: int) -> list[Step]:
    """Lists the operations a trace may try on two numbers: whole results of 0 to `MAX_VALUE`."""
    a, b = max(a, b), min(a, b)
    found = [Step(a, "+", b, a + b), Step(a, "-", b, a - b), Step(a, "*", b, a * b)]
    if b > 0 and a % b == 0:
        found.append(Step(a, "/", b, a // b))
    return [step for step in found if step.result <= MAX_VALUE]


def chance_per_attempt(problem: CountdownProblem) -> float:
    """Computes the probability that one attempt of a trace reaches the target.

    Args:
        problem: A problem of three numbers.

    Returns:
        The probability under the trace's own choice: uniform over first operations, then over second ones.
    """
    chances = []
    for first, rest in _first_steps(problem.nums):
        second = steps(first.result, rest)
        chances.append(sum(step.result == problem.target for step in second) / len(second) if second else 0.0)
    return sum(chances) / len(chances)


def search_trace(problem: CountdownProblem, *, settings: TraceSettings, rng: np.random.Generator) -> str:
    """Writes one random search for a solution.

    Args:
        problem: A problem of three numbers.
        settings: The budget's distribution.
        rng: Source of all randomness.

    Returns:
        The trace, as in the module's example; without the prompt and without an end token.
    """
    first_steps = _first_steps(problem.nums)
    lines: list[str] = []
    for _ in range(_draw_budget(settings, rng)):
        first, rest = first_steps[int(rng.integers(len(first_steps)))]
        second_steps = steps(first.result, rest)
        second = second_steps[int(rng.integers(len(second_steps)))]
        lines.append(f"{first} left {rest} {first.result}")
        if second.result == problem.target:
            lines += [f"{second} yes", f"<answer>{_expression(first, rest, second)}</answer>"]
            return "\n".join(lines)
        lines.append(f"{second} {'low' if second.result < problem.target else 'high'}")
    return "\n".join([*lines, "give up"])


def search_problems(settings: TraceSettings) -> list[CountdownProblem]:
    """Lists every problem of three numbers, in ascending order, that the settings admit.

    Args:
        settings: The ranges of numbers and targets, and of the chance that one attempt succeeds.

    Returns:
        The problems, in ascending order of numbers and target.
    """
    (low, high), (smallest, largest) = settings.chance_range, settings.target_range
    problems = []
    for nums in combinations_with_replacement(range(settings.number_range[0], settings.number_range[1] + 1), 3):
        first_steps = _first_steps(nums)
        chances: dict[int, float] = defaultdict(float)
        for first, rest in first_steps:
            second_steps = steps(first.result, rest)
            for second in second_steps:
                chances[second.result] += 1 / len(second_steps) / len(first_steps)
        problems += [
            CountdownProblem(nums, target)
            for target in sorted(chances)
            if smallest <= target <= largest and low <= chances[target] <= high
        ]
    return problems


def _first_steps(nums: Sequence[int]) -> list[tuple[Step, int]]:
    """Lists every first operation with the number that it leaves over."""
    if len(nums) != 3:
        raise ValueError(f"search trace: expected three numbers, received {len(nums)}.")
    pairs = [(nums[0], nums[1], nums[2]), (nums[0], nums[2], nums[1]), (nums[1], nums[2], nums[0])]
    return [(step, rest) for a, b, rest in pairs for step in steps(a, b) if steps(step.result, rest)]


def _draw_budget(settings: TraceSettings, rng: np.random.Generator) -> int:
    while True:
        budget = round(math.exp(rng.normal(math.log(settings.budget_median), settings.budget_sigma)))
        if 1 <= budget <= settings.budget_limit:
            return budget


def _expression(first: Step, rest: int, second: Step) -> str:
    """Writes both steps as one expression: the second, with the first in parentheses in the place of its result."""
    inner = f"({first.left}{first.operator}{first.right})"
    if second.left == first.result and second.right == rest:
        return f"{inner}{second.operator}{rest}"
    return f"{rest}{second.operator}{inner}"
