"""The schemas of problem files, recognised by their columns.

Each schema is one entry of `SCHEMAS`: its name, the columns that give it away, and a function from row to parts. Data
sources are verl's names, so that reward functions written for verl find what they expect.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradvar.errors import GradvarError
from gradvar.rollouts.problems import Problem, ProblemSet

COUNTDOWN_SOURCE = "countdown"
GSM8K_SOURCE = "openai/gsm8k"
MATH500_SOURCE = "HuggingFaceH4/MATH-500"
ORZ_SOURCE = "Open-Reasoner-Zero"
UNKNOWN_SOURCE = "unknown"

_ANSWER_COLUMNS = ("answer", "ground_truth", "final_answer")


class _RowError(Exception):
    """What is wrong with one row; the caller adds file and row."""


@dataclass(frozen=True, kw_only=True)
class _Parts:
    """A row taken apart by its schema, before checks common to all."""

    question: Any
    answer: Any
    has_answer: bool
    data_source: str
    extra: Any = None
    fields: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Schema:
    """One known kind of problem file."""

    name: str
    columns: str
    """Columns for people, as shown where nothing was recognised."""
    recognises: Callable[[set[str], dict[str, Any]], bool]
    """From all columns and the first row."""
    parts: Callable[[dict[str, Any]], _Parts]


def countdown_question(nums: Sequence[int], target: int) -> str:
    """Returns TinyZero's wording of a CountDown problem (github.com/Jiayi-Pan/TinyZero), without the conversation."""
    return (
        f"Using the numbers {list(nums)}, create an equation that equals {target}. You can use basic arithmetic "
        "operations (+, -, *, /) and each number can only be used once. Show your work in <think> </think> tags. And "
        "return the final answer in <answer> </answer> tags, for example <answer> (1 + 2) / 3 </answer>."
    )


def convert_rows(path: Path, rows: list[Any], *, prompt_column: str | None, answer_column: str | None) -> ProblemSet:
    """Turns a file's rows into problems; see `problems.read_problems`."""
    if isinstance(rows[0], list):
        rows = [_from_orz_dialogue(path, index, row) for index, row in enumerate(rows)]
        orz = True
    else:
        orz = False
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise GradvarError(f"{path}, row {index}: expected an object with named columns, received {row!r:.40}")
    columns = list(dict.fromkeys(name for row in rows for name in row))
    for option, column in (("--prompt-column", prompt_column), ("--answer-column", answer_column)):
        if column is not None and column not in columns:
            raise GradvarError(f"{path}: {option} {column!r} is not a column; the file has {_names(columns)}")
    schema = _ORZ if orz else next((s for s in SCHEMAS if s.recognises(set(columns), rows[0])), None)
    if schema is None and prompt_column is None:
        known = "; ".join(f"{s.columns} ({s.name})" for s in SCHEMAS)
        raise GradvarError(
            f"{path}: no known schema: the file has {_names(columns)}; known are {known}; "
            "name the columns with --prompt-column and --answer-column"
        )
    problems = []
    for index, row in enumerate(rows):
        try:
            problems.append(_problem(index, row, schema, prompt_column, answer_column))
        except _RowError as error:
            raise GradvarError(f"{path}, row {index} (the first is 0): {error}") from error
    name = schema.name if schema is not None else "own columns"
    chosen = [f"{what} from {col!r}" for what, col in (("prompt", prompt_column), ("answer", answer_column)) if col]
    return ProblemSet(schema=f"{name} ({', '.join(chosen)})" if chosen else name, problems=problems)


def _problem(
    index: int, row: dict[str, Any], schema: Schema | None, prompt_column: str | None, answer_column: str | None
) -> Problem:
    if schema is not None:
        parts = schema.parts(row)
    else:
        parts = _Parts(question=None, answer=None, has_answer=False, data_source=_source(row, UNKNOWN_SOURCE))
    question = parts.question if prompt_column is None else _message_list(row.get(prompt_column))
    answer = parts.answer if answer_column is None else row.get(answer_column)
    if question is None or question in ("", []):
        raise _RowError(f"the prompt{f' (column {prompt_column!r})' if prompt_column else ''} is null or empty")
    if answer is None and (parts.has_answer or answer_column is not None):
        raise _RowError(f"the answer{f' (column {answer_column!r})' if answer_column else ''} is null")
    fields = {name: value for name, value in row.items() if _is_field(value)} | (parts.fields or {})
    return Problem(
        row=index,
        question=_checked_question(question),
        data_source=parts.data_source,
        ground_truth=answer,
        extra=parts.extra,
        fields=fields,
    )


def _checked_question(question: Any) -> str | list[dict[str, str]]:
    if isinstance(question, str):
        return question
    if not isinstance(question, list):
        raise _RowError(f"the prompt is neither text nor a list of messages: {question!r:.60}")
    messages = []
    for message in question:
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise _RowError(f"a message of the prompt has no role or no content: {message!r:.60}")
        if not isinstance(message["content"], str):
            raise _RowError(f"a message's content is not text: {message['content']!r:.60}; only text can be sampled")
        messages.append({"role": str(message["role"]), "content": message["content"]})
    return messages


def _message_list(value: Any) -> Any:
    """Reads a message list that csv or json hold as text; anything else is returned as it is."""
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        parsed = _json_cell(value)
        if isinstance(parsed, list) and all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in parsed):
            return parsed
    return value


def _json_cell(value: Any) -> Any:
    """Reads a JSON list or object that a csv cell holds as text; anything else is returned as it is."""
    if isinstance(value, str) and value.strip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (json.JSONDecodeError, RecursionError):
            return value
    return value


def _is_field(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(isinstance(item, int | float) and not isinstance(item, bool) for item in value)
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def _source(row: dict[str, Any], default: str) -> str:
    source = row.get("data_source")
    return source if isinstance(source, str) and source else default


def _names(columns: Sequence[str]) -> str:
    shown = ", ".join(columns[:20]) + (", ..." if len(columns) > 20 else "")
    return f"the columns {shown}" if columns else "no columns"


def _number(value: Any, what: str) -> int:
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?[0-9]{1,18}\s*", value):
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise _RowError(f"{what}: expected a whole number, received {value!r:.40}")


def _numbers(value: Any) -> list[int]:
    if isinstance(value, str):
        value = re.split(r"[\s,]+", value.strip().strip("[]()").strip())
    if not isinstance(value, list) or not value:
        raise _RowError(f"nums: expected a list of whole numbers, received {value!r:.40}")
    return [_number(item, "nums") for item in value]


def _countdown_parts(row: dict[str, Any]) -> _Parts:
    raw = row.get("nums") if row.get("nums") is not None else row.get("numbers")
    for name, value in (("nums", raw), ("target", row.get("target"))):
        if value is None:
            raise _RowError(f"the {'prompt' if name == 'nums' else 'answer'} ({name}) is null")
    nums, target = _numbers(raw), _number(row["target"], "target")
    return _Parts(
        question=countdown_question(nums, target),
        answer={"target": target, "numbers": nums},
        has_answer=True,
        data_source=_source(row, COUNTDOWN_SOURCE),
        extra=row.get("extra_info"),
        fields={"nums": nums, "target": target},
    )


def _verl_parts(row: dict[str, Any]) -> _Parts:
    model = _json_cell(row.get("reward_model"))
    answer = model.get("ground_truth") if isinstance(model, dict) else None
    fields: dict[str, Any] = {}
    if isinstance(answer, dict) and "target" in answer and ("numbers" in answer or "nums" in answer):
        fields = {"nums": answer.get("numbers", answer.get("nums")), "target": answer["target"]}
    return _Parts(
        question=_message_list(row.get("prompt")),
        answer=answer,
        has_answer=True,
        data_source=_source(row, UNKNOWN_SOURCE),
        extra=_json_cell(row.get("extra_info")),
        fields=fields,
    )


def _from_orz_dialogue(path: Path, index: int, row: Any) -> dict[str, Any]:
    try:
        question, answer = row[0]["value"], row[1]["ground_truth"]["value"]
    except (TypeError, KeyError, IndexError) as error:
        raise GradvarError(
            f'{path}, row {index} (the first is 0): expected [{{"value": question}}, {{"ground_truth": '
            f'{{"value": answer}}}}], received {row!r:.60}'
        ) from error
    return {"question": question, "answer": answer}


def _orz_parts(row: dict[str, Any]) -> _Parts:
    return _Parts(question=row["question"], answer=row["answer"], has_answer=True, data_source=ORZ_SOURCE)


def _gsm8k_parts(row: dict[str, Any]) -> _Parts:
    solution = row.get("answer")
    final = None
    if solution is not None:
        before, mark, after = str(solution).rpartition("####")
        if not mark or not after.strip():
            raise _RowError(f"the answer has no final number after ####: {before or after!r:.60}")
        final = after.strip().replace(",", "")
    return _Parts(
        question=row.get("question"),
        answer=final,
        has_answer=True,
        data_source=_source(row, GSM8K_SOURCE),
        extra={"question": row.get("question"), "answer": solution},
    )


def _math_parts(row: dict[str, Any]) -> _Parts:
    extra = {name: row[name] for name in ("solution", "subject", "level", "unique_id") if name in row}
    return _Parts(
        question=row.get("problem"),
        answer=row.get("answer"),
        has_answer=True,
        data_source=_source(row, MATH500_SOURCE),
        extra=extra or None,
    )


def _plain_parts(row: dict[str, Any]) -> _Parts:
    answers = [name for name in _ANSWER_COLUMNS if name in row]
    question = _message_list(row["prompt"]) if "prompt" in row else row.get("question")
    if isinstance(question, list) and question and all(isinstance(m, dict) and "value" in m for m in question):
        question = question[0]["value"]  # Open-Reasoner-Zero's evaluation files
    return _Parts(
        question=question,
        answer=row[answers[0]] if answers else None,
        has_answer=bool(answers),
        data_source=_source(row, UNKNOWN_SOURCE),
        extra=_json_cell(row.get("extra_info")),
    )


def _looks_like_gsm8k(columns: set[str], first: dict[str, Any]) -> bool:
    return {"question", "answer"} <= columns and "####" in str(first.get("answer"))


_ORZ = Schema(
    name="Open-Reasoner-Zero",
    columns='[{"value"}, {"ground_truth": {"value"}}] in a json list',
    recognises=lambda columns, first: False,
    parts=_orz_parts,
)

SCHEMAS: tuple[Schema, ...] = (
    Schema(
        name="verl",
        columns="prompt, reward_model",
        recognises=lambda columns, first: {"prompt", "reward_model"} <= columns,
        parts=_verl_parts,
    ),
    _ORZ,
    Schema(
        name="CountDown",
        columns="nums, target",
        recognises=lambda columns, first: "target" in columns and bool(columns & {"nums", "numbers"}),
        parts=_countdown_parts,
    ),
    Schema(
        name="GSM8K",
        columns="question, answer with ####",
        recognises=_looks_like_gsm8k,
        parts=_gsm8k_parts,
    ),
    Schema(
        name="MATH-500",
        columns="problem, answer",
        recognises=lambda columns, first: {"problem", "answer"} <= columns,
        parts=_math_parts,
    ),
    Schema(
        name="plain prompts",
        columns="prompt or question, and answer where there is one",
        recognises=lambda columns, first: bool(columns & {"prompt", "question"}),
        parts=_plain_parts,
    ),
)
"""Tried in this order; the first that recognises the columns is taken."""
