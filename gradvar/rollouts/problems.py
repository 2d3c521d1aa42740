"""Problems out of files: what is asked, what the gold answer is, where it came from.

`read_problems` reads jsonl, json, parquet and csv, and recognises the usual schemas by their columns (`schemas`).
Loads neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gradvar.errors import GradvarError
from gradvar.rollouts.files import read_rows

Message = dict[str, str]
"""One turn of a conversation: {"role": ..., "content": ...}."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One problem as its file gave it, before any template."""

    row: int
    """Place in the file, from 0; as text it is the prompt's name in the run."""
    question: str | list[Message]
    """What is asked: text, or a conversation."""
    data_source: str
    """Where the problem comes from, in verl's names; chooses the reward function."""
    ground_truth: Any = None
    """The gold answer: any JSON value, None where the file has none."""
    extra: Any = None
    """Whatever else the file carried for the reward function: any JSON value."""
    fields: dict[str, Any] = field(default_factory=dict)
    """Placeholders for template files: the row's texts, numbers and lists of numbers."""


@dataclass(frozen=True, kw_only=True)
class ProblemSet:
    """The problems of one file."""

    schema: str
    """What the file was taken for, in words."""
    problems: list[Problem]
    """In the file's order; `problems[i].row == i`."""


def read_problems(
    path: str | Path, *, prompt_column: str | None = None, answer_column: str | None = None
) -> ProblemSet:
    """Reads the problems of a .jsonl, .json, .parquet or .csv file.

    Args:
        path: The file.
        prompt_column: Column that holds the question (text or a message list), where the schema is not a known one or
            another column is wanted. The gold answer stays the known schema's, if there is one.
        answer_column: Column that holds the gold answer.

    Returns:
        The problems and the name of the schema they were recognised as.

    Raises:
        GradvarError: The file cannot be read, has no rows or no recognised columns, or a prompt or answer is null.
    """
    from gradvar.rollouts.schemas import convert_rows

    return convert_rows(Path(path), read_rows(path), prompt_column=prompt_column, answer_column=answer_column)


def select_problems(
    problems: Sequence[Problem],
    *,
    n_prompts: int | None = None,
    prompt_ids: Sequence[str] | None = None,
    rng: np.random.Generator,
) -> list[Problem]:
    """Chooses problems: the first `n_prompts` of one random permutation, or those named.

    With the same generator seed a larger `n_prompts` keeps the earlier choice and adds to it.

    Args:
        problems: All problems of a file.
        n_prompts: How many to choose; None takes all, in the file's order.
        prompt_ids: Row numbers as text, in the wanted order, instead of a random choice.
        rng: Source of the permutation; not used with `prompt_ids`.

    Returns:
        The chosen problems.

    Raises:
        GradvarError: More are wanted than there are, a name is unknown or named twice, or both ways are asked for.
    """
    if n_prompts is not None and prompt_ids is not None:
        raise GradvarError("--n-prompts and --prompt-ids were both given; give one of them")
    if prompt_ids is not None:
        by_id = {str(problem.row): problem for problem in problems}
        unknown = [name for name in prompt_ids if name not in by_id]
        if unknown:
            raise GradvarError(
                f"prompt id {unknown[0]!r} is not in the file: expected row numbers from 0 to {len(problems) - 1}"
            )
        if len(set(prompt_ids)) < len(prompt_ids):
            twice = next(name for name in prompt_ids if list(prompt_ids).count(name) > 1)
            raise GradvarError(f"prompt id {twice!r} was given twice; name each once")
        return [by_id[name] for name in prompt_ids]
    if n_prompts is None:
        return list(problems)
    if not 1 <= n_prompts <= len(problems):
        raise GradvarError(
            f"--n-prompts {n_prompts}: the file has {len(problems)} problems; give a number from 1 to {len(problems)}"
        )
    order = rng.permutation(len(problems))
    return [problems[index] for index in order[:n_prompts]]
