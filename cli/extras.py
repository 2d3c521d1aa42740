"""DAPO's extras with and without, as people read them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from gradvar.report.numbers import interval, number
from gradvar.runs.rows import last_target, overall, row_of

from . import console

if TYPE_CHECKING:
    from gradvar.runs import Run

_SHORT = {
    "none": "none",
    "overlong filtering": "filtering",
    "soft overlong punishment": "punishment",
    "dynamic sampling": "sampling",
}


def print_extras(run: Run) -> None:
    """Show what each extra does to every rule's CV and direction."""
    from gradvar.runs import target_label

    table = run.table("extras")
    last = last_target(table)
    mine = table[table["target"] == last]
    told = overall(mine[mine["extra"].notna() & mine["rule"].notna()])
    if told.empty:
        return
    affected = mine[mine["quantity"] == "affected"].groupby("extra")["value"].mean()
    rows = []
    for rule, alpha in told[["rule", "alpha"]].drop_duplicates().itertuples(index=False):
        of_rule = told[(told["rule"] == rule) & (told["alpha"].isna() if pd.isna(alpha) else told["alpha"] == alpha)]
        for extra in dict.fromkeys(told["extra"]):
            own = of_rule[of_rule["extra"] == extra]
            cv, ratio = row_of(own, quantity="cv"), row_of(own, quantity="cv_ratio")
            turned = row_of(own, quantity="cosine_difference")
            share = "" if extra not in affected else f"{100 * affected[extra]:.3g}%"
            if cv is None:
                continue
            bound = "–" if pd.isna(cv["low"]) else f"> {number(cv['low'])}"
            plain = f"{number(cv['value'])} {interval(cv)}" if pd.notna(cv["value"]) else bound
            name = str(rule) + ("" if pd.isna(alpha) else f" α={alpha:g}")
            rows.append([name, _SHORT[str(extra)], share, plain, _cell(ratio), _cell(turned)])
    console.table(
        f"DAPO's extras, each beside the plain update: {target_label(last)}",
        ["aggregator", "extra", "affects", "CV", "CV ratio", "cosine change"],
        rows,
        caption="filtering: truncated responses carry no loss; punishment: soft, added to the reward; sampling: groups "
        "whose rewards differ. affects: share of responses, of groups for sampling. cosine: with grad J of the "
        "plain reward. Paired, these prompts. > : unresolved, lower bound.",
    )
    console.result.print(
        f"every number of the extras: {run.path / 'tables' / 'extras.parquet'}", markup=False, soft_wrap=True
    )


def _cell(row: Any) -> str:
    return "" if row is None else f"{number(row['value'])} {interval(row)}"
