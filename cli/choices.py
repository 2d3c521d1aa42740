"""What to choose, as people read it: efficiency over alpha, the paper's order, the group size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from gradvar.report.numbers import interval, number

from . import console
from .console import count, verdict
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
        entropy = one_row(rows, quantity="entropy_pressure", rule=row["rule"], alpha=row["alpha"])
        shown.append(
            [
                str(row["rule"]) + ("" if pd.isna(row["alpha"]) else f" α={row['alpha']:g}"),
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


def _pushed(row: Any) -> str:
    if row is None:
        return ""
    side = str(row["verdict"])
    return "?" if side == "undetermined" else side


FORMS = {
    "cv_ratio_form_1": "form 1, lengths given, Var = V L",
    "cv_ratio_form_2": "form 2, lengths given, measured",
    "cv_ratio_form_3": "form 3, total, lengths random",
}


def _print_forms(table: pd.DataFrame) -> None:
    from gradvar.estimators.paper_order import whole_order

    rows = overall_rows(table[table["target"] == last_target(table)]) if len(table) else table
    if rows.empty:
        return
    words = "grpo = vl_norm 1 <= vl_norm alpha <= dapo = dr_grpo"
    console.result.print(f"[bold]The paper's order of CVs[/bold] ({words}):")
    for quantity, name in FORMS.items():
        told = rows[rows["quantity"] == quantity]
        verdicts = list(told["holds"])
        against = sum(v == "violated" for v in verdicts)
        claimed = sum(v not in ("not claimed", "by algebra") for v in verdicts)
        more = f", {against} of {claimed} ratios against it" if against else ""
        console.result.print(f"  {name}: {verdict(whole_order(verdicts))}{more}")
    for reference in dict.fromkeys(rows["against"]):
        mine = rows[rows["against"] == reference]
        shown = []
        for rule, alpha in dict.fromkeys(zip(mine["rule"], mine["alpha"].fillna(-1.0), strict=True)):
            own = mine[(mine["rule"] == rule) & (mine["alpha"].fillna(-1.0) == alpha)]
            cells = [one_row(own, quantity=quantity) for quantity in FORMS]
            if reference != "grpo" and cells[0] is not None and cells[0]["paper"] == "nothing":
                continue
            label = str(rule) + ("" if alpha == -1.0 else f" α={alpha:g}")
            paper = next(str(cell["paper"]) for cell in cells if cell is not None)
            first = "" if cells[0] is None else number(cells[0]["value"])
            shown.append([label, paper, first, *[_ratio(cell) for cell in cells[1:]]])
        names = ["aggregator", "paper says", "form 1", "form 2", "form 3"]
        console.table(f"CV over {reference}'s (+ as the paper says, - against it, ? undetermined)", names, shown)


def _ratio(row: Any) -> str:
    if row is None:
        return ""
    sign = {"holds": "[green]+[/green]", "violated": "[red]-[/red]", "undetermined": "[yellow]?[/yellow]"}
    return f"{number(row['value'])}{sign.get(str(row['holds']), ' ')} {interval(row)}"


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
