"""Runs side by side as people read them: each run's numbers, then the differences to the first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from gradvar.report.numbers import interval, number
from gradvar.runs.records import counted
from gradvar.runs.rows import last_target, row_of

from . import console

if TYPE_CHECKING:
    from gradvar.runs import Run
    from gradvar.stages import Comparison

QUANTITIES = {
    "deviation_exponent": "exponent, deviation",
    "within_exponent": "exponent, within length",
    "cv": "CV",
    "noise_scale": "noise scale n CV², responses",
    "eta": "efficiency eta",
    "alpha_star_eta": "best alpha by eta",
    "alpha_star_cv": "best alpha by CV",
}
"""Quantity to its words."""


def show_comparison(run: Run, found: Comparison, *, as_json: bool) -> None:
    """Show what is shared, every run's numbers, and the differences."""
    if as_json:
        facts = {"shared": found.shared, "prompts": found.prompts, "notes": list(found.notes)}
        console.print_json({**facts, "compare": console.records(found.table)})
        return
    names = list(found.prompts)
    for name in names[1:]:
        console.result.print(
            f"{name}: {counted(found.prompts[name], 'prompt')}, "
            f"{found.shared[name]} of them (by their text) also among the "
            f"{found.prompts[names[0]]} of {names[0]}",
            markup=False,
        )
    for note in found.notes:
        console.result.print(note, style="yellow", markup=False)
    _print_runs(found.table, names)
    for name in names[1:]:
        if found.shared[name]:
            _print_differences(found.table, name, names[0])
    console.result.print(f"every number: {run.path / 'tables' / 'compare.parquet'}", markup=False, soft_wrap=True)


def _print_runs(table: pd.DataFrame, names: list[str]) -> None:
    from gradvar.runs import target_label

    last = last_target(table)
    own = table[table["against"].isna() & table["prompt_id"].isna() & (table["target"] == last)]
    rows = []
    for quantity, words in QUANTITIES.items():
        found = [row_of(own, quantity=quantity, run=name) for name in names]
        rows.append([words, *[cell for row in found for cell in (_cell(row), _prompts(row))]])
    first = row_of(own, quantity="cv")
    rule = "" if first is None else _rule(first)
    console.table(
        f"Runs side by side: {target_label(last)}{rule}",
        ["quantity", *[heading for name in names for heading in (name, "prompts")]],
        rows,
        caption="Over all prompts of each run, which may differ. > : unresolved, lower bound.",
    )


def _print_differences(table: pd.DataFrame, name: str, reference: str) -> None:
    last = last_target(table)
    mine = table[(table["against"] == reference) & (table["run"] == name) & (table["target"] == last)]
    pooled = mine[mine["prompt_id"].isna()]
    rows = []
    for quantity, words in QUANTITIES.items():
        for suffix in ("difference", "ratio"):
            these = row_of(pooled, quantity=f"{quantity}_{suffix}", estimand="these prompts")
            across = row_of(pooled, quantity=f"{quantity}_{suffix}", estimand="prompts like these")
            if these is None:
                continue
            rows.append(
                [
                    f"{words}, {suffix}",
                    number(these["value"]),
                    interval(these),
                    _side(these),
                    _prompts(these),
                    ""
                    if across is None or pd.isna(across["value"])
                    else f"{number(across['value'])} {interval(across)}",
                ]
            )
    console.table(
        f"{name} against {reference}, shared prompts",
        ["quantity", "difference", "interval", "verdict", "prompts", "prompts like these"],
        rows,
        caption="Over the shared prompts that have an estimate in both runs, other than above: a prompt whose rewards "
        "are all equal in "
        "one of them, or with too few responses there, is left out of both.",
    )


def _cell(row: Any) -> str:
    if row is None:
        return "–"
    if pd.isna(row["value"]):
        return f"> {number(row['low'])}" if pd.notna(row["low"]) else "–"
    return f"{number(row['value'])} {interval(row)}"


def _prompts(row: Any) -> str:
    return "" if row is None or (pd.isna(row["value"]) and pd.isna(row["low"])) else str(row["clusters"])


def _side(row: Any) -> str:
    style = {"higher": "bold", "lower": "bold"}.get(str(row["verdict"]), "yellow")
    return f"[{style}]{row['verdict']}[/{style}]"


def _rule(row: Any) -> str:
    alpha = "" if pd.isna(row["alpha"]) else f" α={row['alpha']:g}"
    return f", {row['rule']}{alpha}, group of {row['group_size']}, {row['advantage']} advantages"
