"""The CV in three forms and the paper's order as people read them: relations tested in each form, and what data say."""

from __future__ import annotations

from typing import Any

import pandas as pd

from gradvar.report.numbers import interval, number, rule_name
from gradvar.runs.rows import last_target, overall, row_of

from . import console
from .console import count, verdict

FORMS = {
    "cv_ratio_form_1": "form 1, lengths given, Var = V L",
    "cv_ratio_form_2": "form 2, lengths given, measured",
    "cv_ratio_form_3": "form 3, total, lengths random",
}
CVS = {"cv_form_1": "form 1: V L", "cv_form_2": "form 2: v(L)", "cv_form_3": "form 3: total"}
_SIGNS = {"equal": "=", "at least 1": ">=", "at most 1": "<="}


def print_forms(table: pd.DataFrame, *, margin: float) -> None:
    """Print every CV in its three forms, the order's verdict form by form, the relations it rests on, and every ratio.

    Args:
        table: The table `forms`.
        margin: Around 1, within which CVs count as equal.
    """
    rows = overall(table[table["target"] == last_target(table)]) if len(table) else table
    _print_cvs(rows)
    rows = rows[rows["quantity"].isin(FORMS)] if len(rows) else rows
    if rows.empty:
        return
    words = "grpo = vl_norm 1 <= vl_norm alpha <= dapo = dr_grpo"
    console.result.print(f"[bold]The paper's order of CVs[/bold] ({words}, 0 <= alpha <= 1):")
    for quantity, name in FORMS.items():
        console.result.print(f"  {name}: {_told(relations(rows[rows['quantity'] == quantity]))}")
    tested = relations(rows[rows["quantity"].isin(FORMS)].drop_duplicates(["rule", "alpha", "against"]))
    if len(tested):
        console.result.print(f"  tested: {'; '.join(_sentences(tested))}", markup=False)
        console.result.print(
            f"  = holds where the ratio's interval lies inside [{number(1 / (1 + margin))}, {number(1 + margin)}]",
            markup=False,
        )
    for reference in dict.fromkeys(rows["against"]):
        _print_ratios(rows[rows["against"] == reference], str(reference))


def _print_cvs(rows: pd.DataFrame) -> None:
    """Print the CV itself of every rule, the three forms side by side."""
    if rows.empty:
        return
    values = rows[rows["quantity"].isin(CVS) & rows["rule"].notna()]
    shown = []
    for _, first in values.drop_duplicates(["rule", "alpha"]).iterrows():
        own = {"rule": first["rule"], "alpha": first["alpha"]}
        shown.append([rule_name(first), *[_cv(row_of(values, quantity=quantity, **own)) for quantity in CVS]])
    if not shown:
        return
    size = count(values["group_size"].iloc[0])
    console.table(
        f"The CV of one update of {size} responses in its three forms",
        ["aggregator", *CVS.values()],
        shown,
        caption="Forms 1 and 2: lengths given, by the paper's formula with the fitted V L and with the measured v(L). "
        "Form 3: lengths random, as in training. > : unresolved, a lower bound. Prompts are summed in each rule's own "
        "scale in all three, so that even in form 1 grpo and vl_norm α=1 differ where prompts' lengths do; prompt by "
        "prompt they are equal.",
    )


def _cv(row: Any) -> str:
    if row is None:
        return ""
    if pd.notna(row["value"]):
        return f"{number(row['value'])} {interval(row)}"
    return f"> {number(row['low'])}" if pd.notna(row["low"]) else "unresolved"


def relations(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of which the order claims something, each pair of rules once."""
    claimed = rows[rows["paper"] != "nothing"]
    pairs = [
        frozenset({(rule, None if pd.isna(alpha) else alpha), (against, None)})
        for rule, alpha, against in zip(claimed["rule"], claimed["alpha"], claimed["against"], strict=True)
    ]
    return claimed[~pd.Series(pairs, index=claimed.index, dtype=object).duplicated()]


def _told(rows: pd.DataFrame) -> str:
    from gradvar.estimators.paper_order import NOT_TESTED, UNDETERMINED, VIOLATED, whole_order

    whole = whole_order(list(rows["holds"]))
    if whole == NOT_TESTED:
        return f"{verdict(NOT_TESTED)}: no two rules of the order are compared"
    told = verdict(whole)
    if whole == VIOLATED:
        against = rows[rows["holds"] == VIOLATED]
        told += f", {len(against)} of {len(rows)} relations against it ({'; '.join(_sentences(against))})"
    elif whole == UNDETERMINED:
        open_ = rows[rows["holds"] == UNDETERMINED]
        needs = open_["holds_needs"].max()
        told += f", {len(open_)} of {len(rows)} relations open"
        told += f", {count(needs)} responses a prompt would tell" if pd.notna(needs) else ""
    if not (rows["rule"] == "vl_norm").any():
        told += "; no vl_norm with 0 <= alpha <= 1 is compared"
    return told


def _sentences(rows: pd.DataFrame) -> list[str]:
    """Say the relations, those with one reference and sign together: "dapo, dr_grpo >= grpo"."""
    said: dict[tuple[str, str], list[str]] = {}
    for _, row in rows.iterrows():
        said.setdefault((_SIGNS[str(row["paper"])], str(row["against"])), []).append(_name(row))
    return [f"{', '.join(names)} {sign} {against}" for (sign, against), names in said.items()]


def _name(row: Any) -> str:
    return str(row["rule"]) if pd.isna(row["alpha"]) else f"{row['rule']} {row['alpha']:g}"


def _print_ratios(mine: pd.DataFrame, reference: str) -> None:
    shown = []
    for _, first in mine.drop_duplicates(["rule", "alpha"]).iterrows():
        own = {"rule": first["rule"], "alpha": first["alpha"]}
        cells = [row_of(mine, quantity=quantity, **own) for quantity in FORMS]
        if reference != "grpo" and first["paper"] == "nothing":
            continue
        label = rule_name(first)
        exact = "" if cells[0] is None else number(cells[0]["value"])
        shown.append([label, str(first["paper"]), exact, *[_ratio(cell) for cell in cells[1:]]])
    names = ["aggregator", "paper says", "form 1", "form 2", "form 3"]
    console.table(f"CV over {reference}'s (+ as the paper says, - against it, ? undetermined)", names, shown)


def _ratio(row: Any) -> str:
    if row is None:
        return ""
    sign = {"holds": "[green]+[/green]", "violated": "[red]-[/red]", "undetermined": "[yellow]?[/yellow]"}
    return f"{number(row['value'])}{sign.get(str(row['holds']), ' ')} {interval(row)}"
