"""How well cheap numbers stand for exact gradients, as people read it."""

from __future__ import annotations

import pandas as pd

from gradvar.report.numbers import interval, number
from gradvar.runs.rows import last_target, overall, row_of

from . import console

NAMES = {
    "length": "L",
    "w": "W",
    "entropy": "entropy",
    "advantage_square": "A²",
    "advantage_square_length": "A² L",
    "advantage_square_w": "A² W",
    "advantage_square_entropy": "A² entropy",
    "reward_variance": "p(1-p)",
}
"""Proxy to how it is written."""


def print_proxies(table: pd.DataFrame) -> None:
    """Show every proxy's rank correlation with, and share of the variance of, the exact squared gradient."""
    from gradvar.runs import target_label

    told = table[table["proxy"].notna()]
    if told.empty:
        return
    last = last_target(told)
    mine = told[told["target"] == last]
    within = overall(mine[mine["scope"] == "within prompts"])
    between = mine[mine["scope"] == "between prompts"]
    rows = []
    for part, scope in ((within, ""), (between, " (between)")):
        for proxy in dict.fromkeys(part["proxy"]):
            if scope and proxy not in ("length", "reward_variance"):
                continue
            cells = []
            for truth, quantity in (
                ("norm_square", "rank_correlation"),
                ("norm_square", "explained_variance_log"),
                ("within", "rank_correlation"),
            ):
                row = row_of(part, proxy=proxy, truth=truth, quantity=quantity)
                cells.append("" if row is None or pd.isna(row["value"]) else f"{number(row['value'])} {interval(row)}")
            if any(cells):
                rows.append([NAMES.get(str(proxy), str(proxy)) + scope, *cells])
    first = mine.iloc[0]
    names = {"score": "the score"}
    truth = names.get(str(first["advantage"]), f"gradients with {first['advantage']} advantages")
    console.table(
        f"Cheap proxies of the exact squared gradient: {target_label(last)}, {truth}",
        ["proxy", "rank with ||g||²", "log R²", "rank with variance"],
        rows,
        caption="rank: Spearman, within prompts. log R²: explained variance of log ||g||². variance: within-length. W: "
        "sum over tokens of 1 - 2 pi + sum of pi².",
    )
