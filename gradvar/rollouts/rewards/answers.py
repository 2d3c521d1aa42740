"""The rewards that need no process of their own: CountDown, GSM8K, exact match. Text in, 1 or 0 out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from gradvar.demo.countdown import check_answer, extract_answer

_NUMBER = r"-?(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)"
_HASHES = re.compile(rf"####[ \t]*(?:\$[ \t]*)?({_NUMBER})")
_ANY_NUMBER = re.compile(_NUMBER)


def countdown_score(response: str, ground_truth: Any) -> float:
    """Return 1 if the last `<answer>` uses every number exactly once and makes the target.

    TinyZero and verl's forks of it give 0.1 for a well-formed wrong answer; here it is 0.
    """
    nums, target = _countdown_problem(ground_truth)
    return float(check_answer(response, nums, target))


def countdown_needs(ground_truth: Any) -> str | None:
    """Return what is expected if this is not a CountDown ground truth, else None."""
    try:
        _countdown_problem(ground_truth)
    except (TypeError, ValueError, KeyError, OverflowError):
        return '{"nums": [whole numbers], "target": whole number} ("numbers" for "nums" will do)'
    return None


def gsm8k_score(response: str, ground_truth: Any) -> float:
    """Return 1 if the number after the last `####` equals the gold one: verl's "strict", its default.

    As verl does it, but numbers are compared by value (18 = 18.00 = 18.), a dollar sign may stand before the number,
    and the whole response is searched (verl: its last 300 characters).
    """
    found = _HASHES.findall(response)
    return float(bool(found) and _same_number(found[-1]) == gsm8k_gold(ground_truth))


def gsm8k_flexible_score(response: str, ground_truth: Any) -> float:
    r"""Return 1 if the last number of the response, boxed or not, equals the gold one: verl's "flexible"."""
    found = _ANY_NUMBER.findall(response)
    return float(bool(found) and _same_number(found[-1]) == gsm8k_gold(ground_truth))


def gsm8k_gold(ground_truth: Any) -> str | None:
    """Return the gold number (after the last `####`, or the whole text), in one spelling; None if there is none."""
    text = as_text(ground_truth)
    if text is None:
        return None
    number = _ANY_NUMBER.fullmatch(text.rpartition("####")[2].strip().removeprefix("$").removesuffix(".").strip())
    return None if number is None else _same_number(number.group())


def gsm8k_needs(ground_truth: Any) -> str | None:
    """Return what is expected if this is not a GSM8K ground truth, else None."""
    return None if gsm8k_gold(ground_truth) is not None else "a number, or a solution that ends in '#### number'"


def exact_score(response: str, ground_truth: Any) -> float:
    r"""Return 1 if the answer is the gold text (one of them, for a list), runs of white space taken as one space.

    The answer is what stands in the last `<answer>...</answer>`, else in the last `\boxed{...}`, else the whole
    response. Case counts.
    """
    answer = extract_answer(response)
    if answer is None:
        answer = last_boxed(response)
    answer = " ".join((response if answer is None else answer).split())
    return float(answer in {" ".join(text.split()) for text in gold_texts(ground_truth)})


def text_needs(ground_truth: Any) -> str | None:
    """Return what is expected if this is no text, no number and no list of those, else None."""
    texts = gold_texts(ground_truth)
    return None if texts and all(text.strip() for text in texts) else "a text or a number, or a list of accepted ones"


def gold_texts(ground_truth: Any) -> tuple[str, ...]:
    """Return the accepted answers as texts: one for a text or number, all of a list; none for anything else."""
    many = ground_truth if isinstance(ground_truth, list | tuple) else [ground_truth]
    texts = [as_text(item) for item in many]
    return tuple(text for text in texts if text is not None) if None not in texts else ()


def as_text(value: Any) -> str | None:
    """Return a text as it is and a number in plain digits (never 1e-07), None for anything else."""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        number = Decimal(repr(value))
        return format(number.normalize() if number == number.to_integral_value() else number, "f")
    return None


def last_boxed(text: str) -> str | None:
    r"""Return what stands in the last `\boxed{...}`, braces matched, None if there is none or it is cut."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start += len("\\boxed{")
    depth = 1
    for brace in re.compile(r"(?<!\\)[{}]").finditer(text, start):
        depth += 1 if brace.group() == "{" else -1
        if depth == 0:
            return text[start : brace.start()]
    return None


def _countdown_problem(ground_truth: Any) -> tuple[Sequence[int], int]:
    nums = ground_truth["nums"] if "nums" in ground_truth else ground_truth["numbers"]
    if not isinstance(nums, list | tuple) or not nums:
        raise TypeError
    return [_whole(n) for n in nums], _whole(ground_truth["target"])


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise TypeError
    number = int(value)
    if isinstance(value, float) and number != value:
        raise ValueError
    return number


def _same_number(text: str) -> str:
    """Return one spelling of all texts for one number, without computing with it (it may have any length)."""
    sign = "-" if text.startswith("-") else ""
    whole, _, decimals = text.removeprefix("-").replace(",", "").partition(".")
    whole, decimals = whole.lstrip("0") or "0", decimals.rstrip("0")
    number = f"{whole}.{decimals}" if decimals else whole
    return number if number == "0" else sign + number
