"""Prompts and rollouts for the tests of this folder."""

from __future__ import annotations

from typing import Any

from gradvar.runs.records import Prompt, Rollout


def a_prompt(ground_truth: Any, *, data_source: str = "math", extra: Any = None, prompt_id: str = "7") -> Prompt:
    return Prompt(
        prompt_id=prompt_id,
        text="?",
        token_ids=(1,),
        data_source=data_source,
        ground_truth=ground_truth,
        extra=extra,
    )


def some_rollouts(*texts: str) -> list[Rollout]:
    """Rollouts whose ids are 10, 11, ...: not their rows."""
    return [
        Rollout(rollout_id=10 + row, token_ids=(1, 2), text=text, finish_reason="stop")
        for row, text in enumerate(texts)
    ]
