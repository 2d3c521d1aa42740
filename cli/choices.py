"""What to choose, as people read it: efficiency over alpha, the paper's order, the group size."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pandas as pd

from gradvar.report.numbers import interval, number, rule_name
from gradvar.runs.rows import last_target, overall, row_of

from . import console
from .console import count, verdict
from .orders import print_forms

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
    rows = overall(table[table["target"] == last_target(table)])
    shown = []
    for _, row in rows[(rows["quantity"] == "eta") & rows["rule"].notna()].iterrows():
        cosine = row_of(rows, quantity="cosine", rule=row["rule"], alpha=row["alpha"])
        pressure = row_of(rows, quantity="length_pressure", rule=row["rule"], alpha=row["alpha"])
        entropy = row_of(rows, quantity="entropy_pressure", rule=row["rule"], alpha=row["alpha"])
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
            "No efficiency: rewards are equal or unverified, gradients are 0, or there are too few rollouts.",
            style="yellow",
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
    rows = overall(table[table["target"] == last_target(table)])
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
    rows = overall(table[table["target"] == last_target(table)])
    values = rows[(rows["quantity"] == "cv") & rows["group_size"].notna()]
    for name, own in values.groupby(values.apply(rule_name, axis=1), sort=False) if len(values) else ():
        _print_sizes(str(name), own, rows)
    for _, needed in rows[rows["quantity"] == "responses_for_cv_1"].iterrows():
        console.result.print(_needed(needed, table), markup=False)
    scale = row_of(rows, quantity="gradient_noise_scale")
    if scale is not None:
        console.result.print(_scale(scale, table), markup=False)


def _print_sizes(name: str, values: pd.DataFrame, rows: pd.DataFrame) -> None:
    """Print one rule's CV and efficiency size by size."""
    shown = []
    for _, row in values.iterrows():
        same = {"group_size": row["group_size"]}
        eta = row_of(rows, quantity="eta", rule=row["rule"], alpha=row["alpha"], **same)
        silent = row_of(rows, quantity="silent_share", **same)
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
    console.table(
        f"CV and efficiency of {name} against group size",
        ["n", "CV", "interval", "eta", "silent", "verdict"],
        shown,
        caption="extrapolated: variance as 1/n from the largest size of which every prompt holds three groups. silent: "
        "groups whose rewards are all equal.",
    )


def _needed(row: Any, table: pd.DataFrame) -> str:
    """Say how many responses a rule's CV of 1 takes, or from where on that cannot be told."""
    name = rule_name(row)
    if pd.isna(row["value"]):
        least = f", more than {count(row['low'])} responses a prompt" if pd.notna(row["low"]) else ""
        return f"CV <= 1 of {name}: unresolved{least}."
    low, high = count(row["low"]), count(row["high"])
    most = "at most " if row["verdict"] == "at most" else ""
    return (
        f"CV <= 1 of {name} takes {most}{count(row['value'])} responses a prompt [{low}, {high}]"
        f"{_across(table, row, count)}."
    )


def _scale(row: Any, table: pd.DataFrame) -> str:
    """Say the gradient's own noise scale."""
    words = "Noise scale of the gradient itself, tr Sigma / ||grad J||² of one response, A = r - E r:"
    if pd.notna(row["value"]):
        return f"{words} {number(row['value'])} responses {interval(row)}{_across(table, row, number)}."
    least = f", above {number(row['low'])} responses" if pd.notna(row["low"]) else ""
    needed = row.get("n_needed")
    more = f"; {count(needed)} responses a prompt would tell" if pd.notna(needed) and math.isfinite(needed) else ""
    return f"{words} unresolved{least}{more}."


def _across(table: pd.DataFrame, row: Any, write: Callable[[Any], str]) -> str:
    """Return the same row's interval for prompts like these, where enough prompts give one."""
    from gradvar.estimators.intervals import PROMPTS_LIKE_THESE

    if "estimand" not in table:
        return ""
    rows = table[table["prompt_id"].isna() & (table["estimand"] == PROMPTS_LIKE_THESE)]
    same = {name: row.get(name) for name in ("target", "quantity", "rule", "alpha") if name in table}
    like = row_of(rows, **same)
    if like is None or pd.isna(like["low"]):
        return ""
    return f"; prompts like these [{write(like['low'])}, {write(like['high'])}]"
