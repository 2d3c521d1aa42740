"""Rollouts that were made elsewhere: token ids out of a parquet or jsonl file, one row a response.

Columns: `prompt_token_ids` and `response_token_ids`; optional `prompt_id`, `loss_mask`, `reward`, `logprobs`,
`finish_reason`, `text`, `data_source`, `ground_truth`, `extra_info`. Rows of one prompt need not stand together.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradvar.errors import GradvarError
from gradvar.rollouts.files import read_rows
from gradvar.runs.records import FINISH_REASONS, Prompt, Rollout

_SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
_HIGHEST_LOGPROB = 1e-3
"""Rounding in a sampler may lift a log-probability this far above 0 [nats]."""


@dataclass(frozen=True, kw_only=True)
class ImportedPrompt:
    """One prompt of the file with all its rollouts."""

    prompt: Prompt
    rollouts: list[Rollout]
    """In the file's order; rollout_id counts from 0."""
    rewards: list[float] | None
    """One a rollout, NaN where the file has null; None where it has no column `reward`."""


class _RowError(Exception):
    """What is wrong with one row; the caller adds file and row."""


def read_rollouts(
    path: str | Path,
    *,
    vocab_size: int,
    max_positions: int | None,
    tokenizer: Any,
    end_token_ids: Collection[int] | None = None,
) -> list[ImportedPrompt]:
    """Reads rollouts that were sampled elsewhere.

    Args:
        path: A .parquet or .jsonl file.
        vocab_size: Token ids the model knows; every id must be below.
        max_positions: The model's context [tokens]; None where it has none.
        tokenizer: Decodes prompts, and responses whose `text` the file does not give.
        end_token_ids: Tokens that end a response, where the file does not give `finish_reason`; the tokenizer's end
            token if None.

    Returns:
        The prompts in the order of their first row. Without `prompt_id`, rows with equal prompt tokens belong together
        and prompts are numbered from 0.

    Raises:
        GradvarError: The file cannot be read or lacks a column, or a row does not fit the model or itself (which one).
    """
    rows = read_rows(path, suffixes=(".parquet", ".jsonl"))
    columns = {name for row in rows for name in row}
    for name in ("prompt_token_ids", "response_token_ids"):
        if name not in columns:
            raise GradvarError(
                f"{path}: expected the columns prompt_token_ids and response_token_ids, one row a response; "
                f"received {', '.join(sorted(columns)) or 'no columns'}"
            )
    ends = {tokenizer.eos_token_id} if end_token_ids is None else set(end_token_ids)
    names: dict[tuple[int, ...], str] = {}
    prompts: dict[str, Prompt] = {}
    rollouts: dict[str, list[Rollout]] = {}
    rewards: dict[str, list[float]] = {}
    for index, row in enumerate(rows):
        try:
            prompt_ids = _token_ids(row, "prompt_token_ids", vocab_size)
            name = _prompt_id(row, names.setdefault(prompt_ids, str(len(names))), "prompt_id" in columns)
            prompt = _prompt(row, name, prompt_ids, tokenizer, prompts.get(name))
            rollout = _rollout(row, len(rollouts.get(name, ())), vocab_size, tokenizer, ends)
            total = len(prompt_ids) + len(rollout.token_ids)
            if max_positions is not None and total > max_positions:
                raise _RowError(f"prompt and response have {total} tokens, the model's context is {max_positions}")
            reward = _reward(row)
        except (_RowError, GradvarError) as error:
            raise GradvarError(f"{path}, row {index} (the first is 0): {error}") from error
        prompts[name] = prompt
        rollouts.setdefault(name, []).append(rollout)
        rewards.setdefault(name, []).append(reward)
    return [
        ImportedPrompt(prompt=prompt, rollouts=rollouts[name], rewards=rewards[name] if "reward" in columns else None)
        for name, prompt in prompts.items()
    ]


def _list(row: dict[str, Any], column: str) -> list[Any]:
    value = row.get(column)
    if not isinstance(value, list):
        raise _RowError(f"{column}: expected a list, received {value!r:.40}")
    return value


def _token_ids(row: dict[str, Any], column: str, vocab_size: int) -> tuple[int, ...]:
    token_ids = _list(row, column)
    if not token_ids:
        raise _RowError(f"{column} is empty; expected at least one token id")
    for token in token_ids:
        if not isinstance(token, int) or isinstance(token, bool):
            raise _RowError(f"{column}: expected whole numbers, received {token!r:.40}")
        if not 0 <= token < vocab_size:
            raise _RowError(f"{column} holds {token}, and the model knows the token ids 0 to {vocab_size - 1}")
    return tuple(token_ids)


def _prompt_id(row: dict[str, Any], default: str, given: bool) -> str:
    if not given:
        return default
    name = row.get("prompt_id")
    if isinstance(name, bool) or not isinstance(name, int | str) or not _SAFE_NAME.fullmatch(str(name)):
        raise _RowError(
            "prompt_id: expected a number or a name of letters, digits, _, . and - (it names a file), "
            f"received {name!r:.60}"
        )
    return str(name)


def _prompt(row: dict[str, Any], name: str, token_ids: tuple[int, ...], tokenizer: Any, known: Prompt | None) -> Prompt:
    source, answer, extra = row.get("data_source"), row.get("ground_truth"), row.get("extra_info")
    if known is None:
        return Prompt(
            prompt_id=name,
            text=tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False),
            token_ids=token_ids,
            data_source="unknown" if source is None else str(source),
            ground_truth=answer,
            extra=extra,
        )
    if known.token_ids != token_ids:
        raise _RowError(f"prompt_id {name!r} had other prompt_token_ids in an earlier row")
    if (known.data_source, known.ground_truth) != ("unknown" if source is None else str(source), answer):
        raise _RowError(f"prompt {name!r} had another data_source or ground_truth in an earlier row")
    return known


def _rollout(row: dict[str, Any], rollout_id: int, vocab_size: int, tokenizer: Any, ends: Collection[int]) -> Rollout:
    token_ids = _token_ids(row, "response_token_ids", vocab_size)
    reason = row.get("finish_reason")
    if reason is None:
        reason = "stop" if token_ids[-1] in ends else "length"
    if reason not in FINISH_REASONS:
        raise _RowError(f"finish_reason: expected {' or '.join(FINISH_REASONS)}, received {reason!r:.40}")
    text = row.get("text")
    if text is None:
        text = tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Rollout(
        rollout_id=rollout_id,
        token_ids=token_ids,
        text=str(text),
        finish_reason=reason,
        sampler_logprobs=_logprobs(row, len(token_ids)),
        loss_mask=_loss_mask(row, len(token_ids)),
    )


def _loss_mask(row: dict[str, Any], length: int) -> tuple[int, ...] | None:
    if row.get("loss_mask") is None:
        return None
    mask = _list(row, "loss_mask")
    _same_length("loss_mask", mask, length)
    if any(entry not in (0, 1) for entry in mask):
        raise _RowError("loss_mask may hold only 0 and 1")
    if not any(mask):
        raise _RowError("loss_mask is 0 everywhere, so no token carries loss; leave the row out")
    return tuple(int(entry) for entry in mask)


def _logprobs(row: dict[str, Any], length: int) -> tuple[float, ...] | None:
    if row.get("logprobs") is None:
        return None
    values = _list(row, "logprobs")
    _same_length("logprobs", values, length)
    for value in values:
        if not _is_number(value) or not math.isfinite(value) or value > _HIGHEST_LOGPROB:
            raise _RowError(f"logprobs: expected log-probabilities in nats, at most 0, received {value!r:.40}")
    return tuple(float(value) for value in values)


def _reward(row: dict[str, Any]) -> float:
    value = row.get("reward")
    if value is None:
        return math.nan
    if not isinstance(value, bool) and (not _is_number(value) or not math.isfinite(value)):
        raise _RowError(f"reward: expected a number, or null where unverified, received {value!r:.40}")
    return float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _same_length(column: str, values: list[Any], length: int) -> None:
    if len(values) != length:
        raise _RowError(f"{column} has {len(values)} entries for {length} response tokens")
