"""Whether sampled tokens are as likely as the policy's own, from the log-probabilities that a run holds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from gradvar.estimators.sampler_agreement import EntropyBalance, entropy_balance
from gradvar.runs import PromptScores, Run, TableRow, estimate_table

MISMATCH = 1e-3
"""p value of the entropy balance below which rollouts are said not to come from the policy."""


def entropy_rows(run: Run, groups: Sequence[PromptScores], level: float, seed: int) -> pd.DataFrame:
    """Rows of the entropy balance, prompt by prompt and over all: a test of sampler and policy, without gradients.

    Args:
        run: A run with measures.
        groups: What was measured; the first target stands for all, which hold the same responses.
        level: Nominal coverage.
        seed: For the record.
    """
    found = {}
    for scores in groups:
        if scores.target == groups[0].target and scores.log_probs is not None and len(scores.log_probs) > 1:
            measures = run.measures(scores.prompt_id).select(scores.rollout_ids)
            found[scores.prompt_id] = (scores.log_probs, measures.entropy)
    if not found:
        return pd.DataFrame()
    tests: dict[str | None, EntropyBalance] = {
        name: entropy_balance([lp], [h], level=level) for name, (lp, h) in found.items()
    }
    if len(found) > 1:
        log_probs, entropies = zip(*found.values(), strict=True)
        tests[None] = entropy_balance(log_probs, entropies, level=level)
    rows = []
    for name, test in tests.items():
        verdict = "rejected" if test.p_value < MISMATCH / len(found) else "not rejected"
        labels: dict[str, Any] = {"target": "any", "prompt_id": name, "advantage": "score"}
        p_value = replace(test.surplus, value=test.p_value, low=math.nan, high=math.nan, seed=seed)
        rows.append(
            TableRow(quantity="entropy_surplus", estimate=replace(test.surplus, seed=seed), verdict=verdict, **labels)
        )
        rows.append(TableRow(quantity="entropy_p_value", estimate=p_value, **labels))
    return estimate_table(rows)
