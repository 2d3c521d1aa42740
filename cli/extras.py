"""DAPO's extras with and without, as people read them."""

from __future__ import annotations

from typing import Any

import pandas as pd

from gradvar.report.numbers import interval, number
from gradvar.runs.rows import last_target, overall, row_of

from . import console

_SHORT = {
    "none": "none",
    "overlong filtering": "filtering",
    "soft overlong punishment": "punishment",
    "dynamic sampling": "sampling",
}


def print_extras(table: pd.DataFrame) -> None:
    """Show what each extra does to every rule's CV and direction."""
    from gradvar.runs import target_label

    last = last_target(table)
    mine = table[table["target"] == last]
    told = overall(mine[mine["extra"].notna() & mine["rule"].notna()])
    if told.empty:
        return
    affected = mine[mine["quantity"] == "affected"].groupby("extra")["value"].mean()
    rows = []
    for rule in dict.fromkeys(told["rule"]):
        for extra in dict.fromkeys(told["extra"]):
            own = told[(told["rule"] == rule) & (told["extra"] == extra)]
            cv, ratio = row_of(own, quantity="cv"), row_of(own, quantity="cv_ratio")
            turned = row_of(own, quantity="cosine_difference")
            share = "" if extra not in affected else f"{100 * affected[extra]:.3g}%"
            plain = number(cv["value"]) if pd.notna(cv["value"]) else f"> {number(cv['low'])}"
            rows.append([str(rule), _SHORT[str(extra)], share, plain, _cell(ratio), _cell(turned)])
    console.table(
        f"DAPO's extras, each beside the plain update: {target_label(last)}",
        ["aggregator", "extra", "affects", "CV", "CV ratio", "cosine change"],
        rows,
        caption="filtering: truncated responses carry no loss; punishment: soft, added to the reward; sampling: groups "
        "whose rewards differ. affects: share of responses, of groups for sampling. cosine: with grad J of the "
        "plain reward. Paired, these prompts.",
    )


def _cell(row: Any) -> str:
    return "" if row is None else f"{number(row['value'])} {interval(row)}"
