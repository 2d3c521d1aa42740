"""The table of the score identity E s = 0: assumption 0, per prompt and over all prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pandas as pd

from gradvar.estimators.cv import NO_GRADIENT
from gradvar.estimators.identity import UNDETERMINED, IdentityCheck, identity_from_parts, identity_parts
from gradvar.estimators.inputs import arrange, generator, has_gradient
from gradvar.estimators.intervals import THESE_PROMPTS
from gradvar.runs.records import PromptScores, TableRow, estimate_table, no_estimate


def identity_table(
    groups: Sequence[PromptScores],
    *,
    group_size: int = 8,
    margin: float = 0.1,
    level: float = 0.95,
    seed: int,
) -> pd.DataFrame:
    """Check E s = 0 for every prompt and target, and over all prompts together.

    Quantities: "identity_signal" (n ||E s||^2 / E||s||^2, verdict and n_needed) and "identity_p_value". A prompt whose
    scores are all 0 has the verdict "no gradient", one of a single response "undetermined"; neither counts in pooled
    rows.

    Raises:
        GradvarError: As `score_identity` and `arrange` do.
    """
    rows: list[TableRow] = []
    for target, prompts in arrange(groups).items():
        parts = {}
        for name, scores in prompts.items():
            missing = why_no_identity(scores)
            if missing is None:
                parts[name] = identity_parts(scores.gram, rng=generator(seed, name, "identity"))
                continue
            why, verdict = missing
            none = no_estimate(f"not estimated; {why}", n=len(scores.lengths), level=level)
            needed = math.inf if verdict == NO_GRADIENT else 2.0
            check = IdentityCheck(signal=none, p_value=none, verdict=verdict, n_needed=needed)
            rows += _identity_rows(check, target, name, group_size, seed)
        for name, part in parts.items():
            check = identity_from_parts([part], group_size=group_size, margin=margin, level=level)
            rows += _identity_rows(check, target, name, group_size, seed)
        if len(parts) > 1:
            check = identity_from_parts(list(parts.values()), group_size=group_size, margin=margin, level=level)
            rows += _identity_rows(check, target, None, group_size, seed)
    return estimate_table(rows)


def why_no_identity(scores: PromptScores) -> tuple[str, str] | None:
    """Why a prompt has no check of E s = 0, and its verdict; None where it has one."""
    if not has_gradient(scores):
        return NO_GRADIENT, NO_GRADIENT
    if len(scores.lengths) < 2:
        return "fewer than 2 responses: different ones are compared", UNDETERMINED
    return None


def _identity_rows(
    check: IdentityCheck, target: str, prompt_id: str | None, group_size: int, seed: int
) -> list[TableRow]:
    return [
        TableRow(
            quantity=quantity,
            estimate=replace(estimate, seed=seed),
            target=target,
            prompt_id=prompt_id,
            advantage="score",
            group_size=group_size,
            verdict=check.verdict if quantity == "identity_signal" else None,
            extra={
                "n_needed": check.n_needed if quantity == "identity_signal" else math.nan,
                "estimand": THESE_PROMPTS,
            },
        )
        for quantity, estimate in (("identity_signal", check.signal), ("identity_p_value", check.p_value))
    ]
