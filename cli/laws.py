"""The variance law as people read it: exponents, classes, families, what a pooled exponent hides."""

from __future__ import annotations

import pandas as pd

from gradvar.report.laws import CLASS_COLUMNS, class_table, family_table
from gradvar.report.numbers import interval, number
from gradvar.runs.records import counted
from gradvar.runs.rows import last_target, overall, row_of

from . import console
from .console import at_least, count, verdict

_WHAT = {"deviation": "deviation from the mean", "within": "within-length variance"}
_SIGNS = {"proportional": "[green]+[/green]", "not proportional": "[red]-[/red]"}


def print_exponents(law: pd.DataFrame, *, margin: float) -> None:
    """Print every exponent with its verdict: in words for all targets together, then target by target."""
    from gradvar.runs import EstimateConfig, target_label

    # A margin of the user's own stands beside every verdict that it made.
    usual = margin == EstimateConfig().margin
    beside = "" if usual else f" (margin {margin:g}: [{number(1 - margin)}, {number(1 + margin)}])"

    main = law[(law["scope"] == "all responses") & law["quantity"].isin([f"{what}_exponent" for what in _WHAT])]
    whole = overall(main)
    last = last_target(main)
    for kind in whole["advantage"].unique():
        name = "score (A = 1)" if kind == "score" else f"gradient with {kind} advantages"
        for what, words in _WHAT.items():
            row = row_of(whole, target=last, advantage=kind, quantity=f"{what}_exponent")
            if row is None:
                continue
            console.result.print(
                f"[bold]{name}, {words}[/bold] grows as length to the power "
                f"[bold]{number(row['value'])}[/bold] {interval(row)}: {verdict(row['verdict'])}{beside}"
                f"{_across(main, last, kind, what)}"
                if pd.notna(row["value"])
                else f"[bold]{name}, {words}:[/bold] {verdict(row['verdict'])} ({row['method']})"
            )
    rows = []
    for _, row in whole.iterrows():
        quantity = str(row["quantity"]).removesuffix("_exponent")
        undecided = row["verdict"] == "undetermined"
        rows.append(
            [
                target_label(row["target"]),
                "1" if row["advantage"] == "score" else str(row["advantage"]),
                quantity,
                number(row["value"]),
                interval(row),
                verdict(row["verdict"], short=True),
                at_least(count(row["n_needed"]), row.get("n_needed_at_least")) if undecided else "",
            ]
        )
    level = f"{100 * float(whole['level'].iloc[0]):g}%"
    sizes = f"{counted(whole['clusters'].max(), 'prompt')}, {whole['n'].max()} responses"
    console.table(
        f"Exponent of variance against length: {sizes}{'' if usual else f', margin {margin:g}'}",
        ["target", "A", "quantity", "exponent", f"{level} interval", "verdict", "needs N"],
        rows,
        caption="deviation: squared distance from the mean gradient; within: variance among responses of like length.\n"
        "A: 1 is the score alone. needs N: responses of all prompts together that would decide. Intervals: "
        "these prompts, responses drawn again.\nPer target, Euclidean geometry, on policy, no clipping.",
    )


def _across(law: pd.DataFrame, target: str, kind: str, what: str) -> str:
    """Return the exponent's interval for prompts like these, where enough prompts give one."""
    from gradvar.estimators.intervals import PROMPTS_LIKE_THESE

    if "estimand" not in law:
        return ""
    rows = law[law["prompt_id"].isna() & (law["estimand"] == PROMPTS_LIKE_THESE)]
    row = row_of(rows, target=target, advantage=kind, quantity=f"{what}_exponent")
    return "" if row is None or pd.isna(row["low"]) else f"; prompts like these {interval(row)}"


def print_difference(law: pd.DataFrame) -> None:
    """Print the deviation's exponent minus the within-length one."""
    whole = overall(law[(law["scope"] == "all responses") & (law["quantity"] == "exponent_difference")])
    rows = whole[whole["target"] == last_target(whole)] if len(whole) else whole
    for _, row in rows.iterrows():
        name = "score" if row["advantage"] == "score" else f"{row['advantage']} gradient"
        console.result.print(f"{name}: deviation's exponent minus within's {number(row['value'])} {interval(row)}")


def print_classes(law: pd.DataFrame) -> None:
    """Print the exponent by reward class and without truncated responses, with the spread between prompts."""
    from gradvar.runs import target_label

    last = last_target(law)
    rows = class_table(law, last)
    if len({row[0] for row in rows}) < 2:
        return
    for row in rows:
        row[5] = {"proportional": "[green]+[/green]", "not proportional": "[red]-[/red]"}.get(
            row[5], "[yellow]?[/yellow]"
        )
    console.table(
        f"Exponent by reward class and truncation: {target_label(last)}",
        [name if name != "verdict" else "" for name in CLASS_COLUMNS],
        rows,
        caption="+ proportional to length, - not, ? undetermined. A: 1 is the score alone. tau: standard deviation of "
        "the exponent between prompts; p: of no difference between them.",
    )


def print_families(law: pd.DataFrame) -> None:
    """Print which family explains the variance, and how straight the law is."""
    from gradvar.runs import target_label

    last = last_target(law)
    columns, rows = family_table(law, last)
    if not rows:
        return
    console.table(
        f"Which family fits: {target_label(last)}, all responses",
        columns,
        rows,
        caption="constant, proportional, affine, power: explained, 1 - Gamma quasi-deviance over the constant's; "
        "affine a + b L and power c L^beta hold the proportional law and explain at least as much. line: of variance "
        "on length. curvature: of log(L)² beside the power law; an interval without 0 is lack of fit.",
    )


def print_law_by_prompt(law: pd.DataFrame) -> None:
    """Print the exponents prompt by prompt, where there are several."""
    from gradvar.runs import target_label

    last = last_target(law)
    rows = law[(law["scope"] == "all responses") & (law["target"] == last) & law["prompt_id"].notna()]
    rows = rows[rows["quantity"].isin([f"{what}_exponent" for what in _WHAT])]
    if rows["prompt_id"].nunique() < 2:
        return
    shown = [
        [
            str(row["prompt_id"]),
            "1" if row["advantage"] == "score" else str(row["advantage"]),
            str(row["quantity"]).removesuffix("_exponent"),
            number(row["value"]),
            interval(row),
            verdict(row["verdict"], short=True),
        ]
        for _, row in rows.iterrows()
    ]
    names = ["prompt", "A", "quantity", "exponent", "interval", "verdict"]
    console.table(f"Prompt by prompt: {target_label(last)}", names, shown)
