"""What to choose, as people read it: efficiency over alpha, the paper's order, the group size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from gradvar.report.numbers import interval, number, rule_name

from . import console
from .console import count, verdict
from .orders import print_forms
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
    _print_ratios(tables["alpha"])
    print_forms(tables["forms"], margin=run.options("alpha").equality_margin)
    _print_planning(tables["planning"])
    console.result.print(f"every number: {run.path / 'tables' / 'alpha.parquet'}", markup=False, soft_wrap=True)


def _print_efficiency(table: pd.DataFrame) -> None:
    rows = overall_rows(table[table["target"] == last_target(table)])
    shown = []
    for _, row in rows[(rows["quantity"] == "eta") & rows["rule"].notna()].iterrows():
        cosine = one_row(rows, quantity="cosine", rule=row["rule"], alpha=row["alpha"])
        pressure = one_row(rows, quantity="length_pressure", rule=row["rule"], alpha=row["alpha"])
        entropy = one_row(rows, quantity="entropy_pressure", rule=row["rule"], alpha=row["alpha"])
        shown.append(
            [
                rule_name(row),
                number(row["value"]),
                interval(row),
                "" if cosine is None else f"{number(cosine['value'])} {interval(cosine)}",
                _pushed(pressure),
                _pushed(entropy),
            ]
        )
    if not shown:
        console.result.print(
            "[yellow]No efficiency: every reward is equal or unverified, or there are too few rollouts.[/yellow]"
        )
        return
    console.table(
        "Efficiency eta = cos² rho of one update, and its direction's cosine with grad J",
        ["aggregator", "eta", "interval", "cosine", "length", "entropy"],
        shown,
        caption="Higher is better. cosine 1: unbiased. length, entropy: where an update pushes their means.",
    )


def _print_ratios(table: pd.DataFrame) -> None:
    """Print every rule's efficiency over that of the best vl_norm, on the same groups."""
    rows = overall_rows(table[table["target"] == last_target(table)])
    rows = rows[(rows["quantity"] == "eta_ratio") & rows["value"].notna()]
    if rows.empty:
        return
    shown = [[rule_name(row), number(row["value"]), interval(row), str(row["verdict"])] for _, row in rows.iterrows()]
    best = rows["against_alpha"].iloc[0]
    console.table(
        f"Efficiency over that of vl_norm at its best alpha = {best:g}, paired",
        ["aggregator", "eta ratio", "interval", "verdict"],
        shown,
        caption="lower: makes measurably less of an update. 1 minus the ratio is the efficiency lost.",
    )


def _pushed(row: Any) -> str:
    if row is None:
        return ""
    side = str(row["verdict"])
    return "?" if side == "undetermined" else side


def _print_planning(table: pd.DataFrame) -> None:
    rows = overall_rows(table[table["target"] == last_target(table)])
    values = rows[(rows["quantity"] == "cv") & rows["group_size"].notna()]
    shown = []
    for _, row in values.iterrows():
        eta = one_row(rows, quantity="eta", group_size=row["group_size"])
        silent = one_row(rows, quantity="silent_share", group_size=row["group_size"])
        shown.append(
            [
                str(row["group_size"]),
                number(row["value"]) if pd.notna(row["value"]) else f"> {number(row['low'])}",
                interval(row),
                "" if eta is None else f"{number(eta['value'])} {interval(eta)}",
                "" if silent is None else f"{100 * silent['value']:.3g}%",
                verdict(row["verdict"]),
            ]
        )
    if not shown:
        return
    console.table(
        "CV and efficiency of grpo against group size",
        ["n", "CV", "interval", "eta", "silent", "verdict"],
        shown,
        caption="extrapolated: variance as 1/n from the largest estimated size. silent: groups whose rewards are all "
        "equal.",
    )
    needed = one_row(rows, quantity="responses_for_cv_1")
    if needed is not None and pd.notna(needed["value"]):
        low, high = count(needed["low"]), count(needed["high"])
        console.result.print(
            f"CV <= 1 takes {'at most ' if needed['verdict'] == 'at most' else ''}{count(needed['value'])} responses a "
            f"prompt [{low}, {high}]{_across(table)}.",
            markup=False,
        )


def _across(table: pd.DataFrame) -> str:
    """Return the noise scale's interval for prompts like these, where enough prompts give one."""
    from gradvar.estimators.intervals import PROMPTS_LIKE_THESE

    if "estimand" not in table:
        return ""
    rows = table[table["prompt_id"].isna() & (table["estimand"] == PROMPTS_LIKE_THESE)]
    row = one_row(rows, target=last_target(table), quantity="responses_for_cv_1")
    if row is None or pd.isna(row["low"]):
        return ""
    return f"; prompts like these [{count(row['low'])}, {count(row['high'])}]"
