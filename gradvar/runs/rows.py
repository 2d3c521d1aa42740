"""Choosing rows of the estimate tables."""

from __future__ import annotations

from typing import Any

import pandas as pd

THESE_PROMPTS = "these prompts"
PROMPTS_LIKE_THESE = "prompts like these"
"""The two estimands of pooled rows, as the column `estimand` names them."""
ALL_RESPONSES = "all responses"
"""The scope of rows that are not about a subset."""


def overall(table: pd.DataFrame, *, target: str | None = None, estimand: str = THESE_PROMPTS) -> pd.DataFrame:
    """Return the rows over all prompts; those of the one prompt where there is only one.

    Args:
        table: An estimate table.
        target: Of this target alone.
        estimand: Which of the two, where pooled rows come twice.
    """
    rows = table if target is None else table[table["target"] == target]
    pooled = rows[rows["prompt_id"].isna()]
    if len(pooled):
        # Some tables are about these prompts alone and have no such column.
        return pooled[pooled["estimand"].fillna(THESE_PROMPTS) == estimand] if "estimand" in pooled else pooled
    return rows[rows["prompt_id"] == rows["prompt_id"].iloc[0]] if len(rows) else rows


def last_target(table: pd.DataFrame) -> str:
    """Return the sum of targets where the table has it, else its last target."""
    targets = [str(target) for target in table["target"].unique() if target != "any"]
    return "sum" if "sum" in targets else targets[-1]


def row_of(table: pd.DataFrame | None, **labels: Any) -> Any:
    """Return the first row with these labels (None and NaN mean missing), or None."""
    rows = table
    for name, value in labels.items():
        if rows is None or name not in rows:
            return None
        missing = value is None or (isinstance(value, float) and pd.isna(value))
        rows = rows[rows[name].isna()] if missing else rows[rows[name] == value]
    return rows.iloc[0] if rows is not None and len(rows) else None
