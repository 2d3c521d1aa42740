"""What to choose, as people read it: efficiency over alpha, the paper's order, the group size."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from . import console
from .console import count, interval, number, verdict
from .verdicts import last_target, one_row, overall_rows

if TYPE_CHECKING:
    from gradvar.runs import Run


def show_alpha(run: Run, *, as_json: bool) -> None:
    """Show the advice in one sentence and the tables it rests on."""
    from gradvar.stages import advice

    tables = {name: run.table(name) for name in ("alpha", "forms", "planning")}
    if as_json:
        console.print_json({"advice": advice(run), **{k: console.records(table) for k, table in tables.items()}})
        return
    if (sentence := advice(run)) is not None:
        console.result.print(sentence, style="bold", markup=False)
    _print_efficiency(tables["alpha"])
    _print_forms(tables["forms"])
    _print_planning(tables["planning"])
    console.result.print(f"every number: {run.path / 'tables' / 'alpha.parquet'}", markup=False, soft_wrap=True)


def _print_efficiency(table: pd.DataFrame) -> None:
    rows = overall_rows(table[table["target"] == last_target(table)])
    shown = []
    for _, row in rows[(rows["quantity"] == "eta") & rows["rule"].notna()].iterrows():
        cosine = one_row(rows, quantity="cosine", rule=row["rule"], alpha=row["alpha"])
        pressure = one_row(rows, quantity="length_pressure", rule=row["rule"], alpha=row["alpha"])
        shown.append(
            [
                str(row["rule"]) + ("" if pd.isna(row["alpha"]) else f" α={row['alpha']:g}"),
                number(row["value"]),
                interval(row),
                "" if cosine is None else f"{number(cosine['value'])} {interval(cosine)}",
                "" if pressure is None else str(pressure["verdict"]),
            ]
        )
    if not shown:
        console.result.print("[yellow]No efficiency: every reward is equal, or there are too few rollouts.[/yellow]")
        return
    console.table(
        "Efficiency eta = cos² rho of one update, and its direction's cosine with grad J",
        ["aggregator", "eta", "interval", "cosine (1: unbiased)", "length"],
        shown,
        caption="Higher is better. length: whether the update pushes the mean length up or down.",
    )


def _print_forms(table: pd.DataFrame) -> None:
    rows = overall_rows(table[table["target"] == last_target(table)])
    rows = rows[rows["quantity"] == "cv_ratio_form_2"]
    shown = [
        [
            str(row["rule"]) + ("" if pd.isna(row["alpha"]) else f" α={row['alpha']:g}"),
            number(row["value"]),
            interval(row),
            str(row["paper"]),
            verdict(row["holds"]),
        ]
        for _, row in rows.iterrows()
    ]
    if shown:
        names = ["aggregator", "ratio", "interval", "paper says", "verdict"]
        console.table("CV over grpo's, given the lengths: does the paper's order hold?", names, shown)


def _print_planning(table: pd.DataFrame) -> None:
    rows = overall_rows(table[table["target"] == last_target(table)])
    values = rows[rows["quantity"] == "cv"]
    shown = [
        [str(row["group_size"]), number(row["value"]), interval(row), verdict(row["verdict"])]
        for _, row in values[values["group_size"].notna()].iterrows()
    ]
    if not shown:
        return
    console.table("CV of grpo against group size", ["responses", "CV", "interval", "verdict"], shown)
    needed = one_row(rows, quantity="responses_for_cv_1")
    if needed is not None and pd.notna(needed["value"]):
        low, high = count(needed["low"]), count(needed["high"])
        console.result.print(f"CV 1 takes {count(needed['value'])} responses a prompt [{low}, {high}].", markup=False)
