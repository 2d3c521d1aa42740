"""Problems are solvable and distinct; the checker accepts what is right and nothing else."""

import time
from fractions import Fraction

import numpy as np
import pytest

from gradvar.demo import (
    CountdownProblem,
    check_answer,
    evaluate_expression,
    extract_answer,
    generate_problems,
    tinyzero_problems,
)


def reachable(values: tuple[Fraction, ...]) -> set[Fraction]:
    """Every value that some expression over all of these numbers has, by trying everything."""
    if len(values) == 1:
        return set(values)
    found: set[Fraction] = set()
    for i, a in enumerate(values):
        for j, b in enumerate(values):
            if i == j:
                continue
            rest = tuple(v for k, v in enumerate(values) if k not in (i, j))
            results = [a + b, a - b, a * b] + ([a / b] if b else [])
            for result in results:
                found |= reachable((*rest, result))
    return found


def assert_solvable(problem: CountdownProblem) -> None:
    assert problem.target in reachable(tuple(Fraction(n) for n in problem.nums)), f"no solution: {problem}"


def test_tinyzero_problems_are_solvable_distinct_and_in_range() -> None:
    problems = tinyzero_problems(40, rng=np.random.default_rng(0))
    assert len({problem.key for problem in problems}) == 40
    assert {len(problem.nums) for problem in problems} == {3, 4}
    for problem in problems:
        assert all(1 <= n <= 99 for n in problem.nums)
        assert 10 <= problem.target <= 99
        assert_solvable(problem)


@pytest.mark.parametrize(
    ("n_numbers", "number_range", "target_range"),
    [(1, (3, 9), (1, 9)), (2, (0, 4), (-3, 3)), ((2, 4), (1, 12), (1, 1000)), (5, (1, 3), (1, 5))],
)
def test_any_count_and_range(
    n_numbers: int | tuple[int, int], number_range: tuple[int, int], target_range: tuple[int, int]
) -> None:
    problems = generate_problems(
        6,
        n_numbers=n_numbers,
        number_range=number_range,
        target_range=target_range,
        rng=np.random.default_rng(1),
    )
    assert len({problem.key for problem in problems}) == 6
    # Trying everything with five numbers takes seconds a problem.
    for problem in problems[: 1 if n_numbers == 5 else 6]:
        assert all(number_range[0] <= n <= number_range[1] for n in problem.nums)
        assert target_range[0] <= problem.target <= target_range[1]
        assert_solvable(problem)


def test_the_generator_is_seeded_and_leaves_out_what_it_is_told() -> None:
    first = tinyzero_problems(20, rng=np.random.default_rng(5))
    assert first == tinyzero_problems(20, rng=np.random.default_rng(5))
    assert first != tinyzero_problems(20, rng=np.random.default_rng(6))
    reversed_first = [CountdownProblem(p.nums[::-1], p.target) for p in first]
    others = tinyzero_problems(20, rng=np.random.default_rng(5), exclude=reversed_first)
    assert not {p.key for p in first} & {p.key for p in others}


def test_impossible_requests_are_refused() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="found 0; widen a range"):
        generate_problems(1, n_numbers=2, number_range=(1, 2), target_range=(50, 60), rng=rng)
    with pytest.raises(ValueError, match="found 3; widen a range"):
        generate_problems(4, n_numbers=1, number_range=(1, 3), target_range=(1, 9), rng=rng)
    with pytest.raises(ValueError, match="n_numbers: expected"):
        generate_problems(1, n_numbers=0, number_range=(1, 2), target_range=(1, 2), rng=rng)
    with pytest.raises(ValueError, match="number_range: expected"):
        generate_problems(1, n_numbers=2, number_range=(-1, 2), target_range=(1, 2), rng=rng)
    with pytest.raises(ValueError, match="target_range: expected"):
        generate_problems(1, n_numbers=2, number_range=(1, 2), target_range=(3, 2), rng=rng)
    with pytest.raises(ValueError, match="count: expected"):
        generate_problems(-1, n_numbers=2, number_range=(1, 2), target_range=(1, 2), rng=rng)
    with pytest.raises(ValueError, match="at least one number"):
        CountdownProblem((), 3)
    with pytest.raises(ValueError, match="no negative number"):
        CountdownProblem((1, -2), 3)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1+2*3", Fraction(7)),
        (" ( 1 + 2 ) * 3 ", Fraction(9)),
        ("8/3/4", Fraction(2, 3)),
        ("7-2-1", Fraction(4)),
        ("-(3-5)*-2", Fraction(-4)),
        ("1 +\n 2", Fraction(3)),
    ],
)
def test_expressions_have_their_exact_value(text: str, value: Fraction) -> None:
    assert evaluate_expression(text) == value


HOSTILE = [
    "",
    "10**10**10",
    "9**9",
    "7//2",
    "7%2",
    "1<<9",
    "~1",
    "+1",
    "x",
    "True",
    "1.5",
    "1e9",
    "0x10",
    "1_0",
    "1j",
    "007",
    "'a'*9",
    "(1,2)",
    "()",
    "[1]",
    "1 2",
    "1(2)",
    "1+",
    "(1",
    "1)",
    "1=1",
    "1==1",
    "3 if 1 else 2",
    "a:=3",
    "lambda:0",
    "__import__('os').getcwd()",
    "().__class__",
    "print(1)",
    "1/0",
    "1/(2-2)",
    "9" * 13,
    "9" * 5000,
    "(" * 900 + "1" + ")" * 900,
    "(" * 90 + "1",
    "-" * 1999 + "1",
    "1+" * 999 + "1",
    "1+" * 10**6 + "1",
    "٣+٤",
    "1\x00+1",
    "１+１",  # full-width digits, which Python would read as names or numbers
]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: repr(text[:20]))
def test_anything_else_is_refused_at_once(text: str) -> None:
    start = time.perf_counter()
    with pytest.raises(ValueError, match="expression"):
        evaluate_expression(text)
    assert not check_answer(f"<answer>{text}</answer>", [1, 2], 3)
    assert time.perf_counter() - start < 1.0


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("<answer>(7-3)*12/2</answer>", True),
        ("thinking\n<answer> 12 * (7 - 3) / 2 </answer>\nbye", True),
        ("<answer>1</answer> no, <answer>(7-3)*12/2</answer>", True),
        ("<answer>(7-3)*12/2</answer> no, <answer>1</answer>", False),
        ("<answer> or <answer>(7-3)*12/2</answer>", True),
        ("(7-3)*12/2", False),
        ("<answer>(7-3)*12/2", False),
        ("</answer>(7-3)*12/2<answer>", False),
        ("<answer></answer>", False),
        ("<answer>(7-3)*12/2=24</answer>", False),
        ("<answer>24</answer>", False),
        ("<answer>12*2</answer>", False),
        ("<answer>(7-3)*12/2+7-7</answer>", False),
        ("<answer>7*3+12/2</answer>", False),
        ("<answer>(73-1)/(2+1)</answer>", False),
    ],
)
def test_answers(response: str, right: bool) -> None:
    assert check_answer(response, [3, 7, 12, 2], 24) is right


def test_division_is_exact() -> None:
    assert check_answer("<answer>8/(3-8/3)</answer>", [8, 3, 8, 3], 24)
    assert check_answer("<answer>1/3*3</answer>", [1, 3, 3], 1)
    close = [1_000_000, 3, 333_333]
    assert evaluate_expression("1000000/3-333333") == Fraction(1, 3)
    assert not check_answer("<answer>1000000/3-333333</answer>", close, 0)
    assert not check_answer("<answer>(100000000000+0)/99999999999</answer>", [100000000000, 0, 99999999999], 1)


def test_numbers_given_twice_must_be_used_twice() -> None:
    assert check_answer("<answer>5+5</answer>", [5, 5], 10)
    assert not check_answer("<answer>5+5</answer>", [5, 10], 10)
    assert not check_answer("<answer>2*5</answer>", [5, 5], 10)
    assert check_answer("<answer>5+5</answer>", np.array([5, 5]), np.int64(10))  # type: ignore[arg-type]


def test_the_last_answer_is_extracted() -> None:
    assert extract_answer("a <answer> 1 </answer> b <answer>\n2\n</answer> c") == "2"
    assert extract_answer("nothing") is None
    assert extract_answer("<answer>1") is None
