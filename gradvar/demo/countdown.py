"""CountDown problems and the check of their answers: combine every number once, by + - * /, to reach a target.

The task, its two ranges and the form of the answer are those of TinyZero (github.com/Jiayi-Pan/TinyZero). NumPy and
the standard library only; nothing here evaluates text as code.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

MAX_CHARACTERS = 2_000
"""Longest expression that is read [characters]."""
MAX_DIGITS = 12
"""Longest integer literal that is read [digits]."""
MAX_DEPTH = 100
"""Deepest expression that is read [operations inside one another, and parentheses inside one another]."""

_ALLOWED_TEXT = re.compile(r"[0-9+\-*/() ]+")
_ATTEMPTS_PER_PROBLEM = 20_000


@dataclass(frozen=True)
class CountdownProblem:
    """Numbers to be combined, each exactly once, into a target."""

    nums: tuple[int, ...]
    """The numbers, none negative, in the order in which the prompt shows them."""
    target: int
    """The value to reach exactly."""

    def __post_init__(self) -> None:
        if not self.nums:
            raise ValueError("CountDown problem: expected at least one number, received none.")
        if min(self.nums) < 0:
            raise ValueError(f"CountDown problem: expected no negative number, received {self.nums}.")

    @property
    def key(self) -> tuple[tuple[int, ...], int]:
        """What makes two problems the same one: the numbers in ascending order, and the target."""
        return tuple(sorted(self.nums)), self.target


def generate_problems(
    count: int,
    *,
    n_numbers: int | tuple[int, int],
    number_range: tuple[int, int],
    target_range: tuple[int, int],
    rng: np.random.Generator,
    exclude: Iterable[CountdownProblem] = (),
) -> list[CountdownProblem]:
    """Draws distinct CountDown problems, each with at least one solution.

    The numbers are drawn uniformly; they are then merged two at a time by a random operation (division only where it
    leaves no remainder) until one value is left, which becomes the target if it lies in the range. Targets near the
    numbers' own size are therefore commoner than others.

    Args:
        count: Problems to draw.
        n_numbers: Numbers a problem, or the (fewest, most), both included, drawn uniformly.
        number_range: (smallest, largest) number, both included; not negative.
        target_range: (smallest, largest) target, both included.
        rng: Source of all randomness.
        exclude: Problems not to be drawn, in whatever order their numbers stand.

    Returns:
        `count` problems; no two have the same numbers (in any order) and the same target.

    Raises:
        ValueError: If a range is empty or a number could be negative, or if no new solvable problem was found in
            20,000 attempts: the ranges then hold too few.
    """
    fewest, most = (n_numbers, n_numbers) if isinstance(n_numbers, int) else n_numbers
    _check_range("n_numbers", (fewest, most), smallest=1)
    _check_range("number_range", number_range, smallest=0)
    _check_range("target_range", target_range)
    if count < 0:
        raise ValueError(f"count: expected 0 or more, received {count}.")
    seen = {problem.key for problem in exclude}
    problems: list[CountdownProblem] = []
    attempts = 0
    while len(problems) < count:
        attempts += 1
        if attempts > _ATTEMPTS_PER_PROBLEM:
            raise ValueError(
                f"expected {count} distinct solvable problems with {n_numbers} numbers in {number_range} and targets "
                f"in {target_range}, found {len(problems)}; widen a range or ask for fewer."
            )
        size = int(rng.integers(fewest, most + 1))
        nums = tuple(int(n) for n in rng.integers(number_range[0], number_range[1] + 1, size=size))
        target = _random_value(nums, rng)
        if target_range[0] <= target <= target_range[1]:
            problem = CountdownProblem(nums, target)
            if problem.key not in seen:
                seen.add(problem.key)
                problems.append(problem)
                attempts = 0
    return problems


def tinyzero_problems(
    count: int, *, rng: np.random.Generator, exclude: Iterable[CountdownProblem] = ()
) -> list[CountdownProblem]:
    """Draws problems of TinyZero's kind (its data set Countdown-Tasks-3to4).

    Three or four numbers of 1 to 99, targets of 10 to 99. See `generate_problems` for the arguments.
    """
    return generate_problems(
        count, n_numbers=(3, 4), number_range=(1, 99), target_range=(10, 99), rng=rng, exclude=exclude
    )


def evaluate_expression(text: str) -> Fraction:
    """Computes the exact value of an arithmetic expression.

    Integer literals, + - * /, the unary minus and parentheses are understood; the tree that `ast.parse` returns is
    walked here, and nothing is ever executed. Length, digits and depth are limited (`MAX_CHARACTERS`, `MAX_DIGITS`,
    `MAX_DEPTH`), so no text takes noticeable time or memory.

    Args:
        text: The expression; white space is free.

    Returns:
        Its value.

    Raises:
        ValueError: If the text is anything else, is beyond a limit, or divides by zero.
    """
    return _parse(text)[0]


def extract_answer(response_text: str) -> str | None:
    """Returns what stands in the last `<answer>...</answer>` of a response, stripped, or None if there is none."""
    end = response_text.rfind("</answer>")
    if end < 0:
        return None
    start = response_text.rfind("<answer>", 0, end)
    if start < 0:
        return None
    return response_text[start + len("<answer>") : end].strip()


def check_answer(response_text: str, nums: Sequence[int], target: int) -> bool:
    """Decides whether a response solves a CountDown problem.

    Only the last `<answer>...</answer>` counts. It must be an expression (`evaluate_expression`) whose integer
    literals are the given numbers, each as often as given, and whose value is the target exactly. As in TinyZero,
    an equation such as `<answer>4 * 6 = 24</answer>` is not an expression and is wrong. Stricter than TinyZero: the
    value is compared as a fraction (not within 1e-5). Looser: the answer need not stand on the last line.

    Args:
        response_text: The response, without the prompt (whose instructions may hold an answer tag of their own).
        nums: The problem's numbers.
        target: The problem's target.

    Returns:
        True if the answer is right; False if it is wrong, missing or not readable.
    """
    answer = extract_answer(response_text)
    if answer is None:
        return False
    try:
        value, literals = _parse(answer)
    except ValueError:
        return False
    return sorted(literals) == sorted(int(n) for n in nums) and value == int(target)


def _check_range(name: str, bounds: tuple[int, int], *, smallest: int | None = None) -> None:
    low, high = bounds
    if low > high or (smallest is not None and low < smallest):
        floor = "" if smallest is None else f", the first at least {smallest}"
        raise ValueError(f"{name}: expected (smallest, largest){floor}, received {bounds}.")


def _random_value(nums: tuple[int, ...], rng: np.random.Generator) -> int:
    """Merges random pairs by random operations until one whole value is left."""
    values = list(nums)
    while len(values) > 1:
        i, j = (int(k) for k in rng.choice(len(values), size=2, replace=False))
        a, b = values[i], values[j]
        results = [a + b, a - b, a * b]
        if b != 0 and a % b == 0:
            results.append(a // b)
        values = [v for k, v in enumerate(values) if k not in (i, j)]
        values.append(results[int(rng.integers(len(results)))])
    return values[0]


def _parse(text: str) -> tuple[Fraction, list[int]]:
    """Returns the value of an expression and its integer literals."""
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"expression: expected at most {MAX_CHARACTERS} characters, received {len(text)}.")
    line = " ".join(text.split())
    if not _ALLOWED_TEXT.fullmatch(line):
        raise ValueError(f"expression: expected integers, + - * / and parentheses, received {text[:80]!r}.")
    if max((len(digits) for digits in re.findall("[0-9]+", line)), default=0) > MAX_DIGITS:
        raise ValueError(f"expression: expected integers of at most {MAX_DIGITS} digits, received {text[:80]!r}.")
    try:
        tree = ast.parse(line, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"expression: expected well-formed arithmetic, received {text[:80]!r}.") from error
    literals: list[int] = []
    try:
        return _value(tree.body, literals, MAX_DEPTH), literals
    except ZeroDivisionError as error:
        raise ValueError(f"expression: division by zero in {text[:80]!r}.") from error


def _value(node: ast.expr, literals: list[int], depth: int) -> Fraction:
    """Computes the value of one node, adding the literals under it to `literals` from left to right."""
    if depth == 0:
        raise ValueError(f"expression: expected at most {MAX_DEPTH} operations inside one another.")
    match node:
        case ast.Constant(value=int(number)) if not isinstance(number, bool):
            literals.append(number)
            return Fraction(number)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, literals, depth - 1)
        case ast.BinOp(left=left, op=ast.Add() | ast.Sub() | ast.Mult() | ast.Div() as op, right=right):
            a, b = _value(left, literals, depth - 1), _value(right, literals, depth - 1)
            match op:
                case ast.Add():
                    return a + b
                case ast.Sub():
                    return a - b
                case ast.Mult():
                    return a * b
                case _:
                    return a / b
        case _:
            form = type(node.op if isinstance(node, ast.BinOp | ast.UnaryOp) else node).__name__
            raise ValueError(f"expression: expected only + - * / and integers, received {form}.")
