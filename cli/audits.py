"""The assumption audit as people read it: a table of verdicts, then target by target and prompt by prompt."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd
from rich.markup import escape

from gradvar.report.numbers import interval, number
from gradvar.runs.records import counted
from gradvar.runs.rows import last_target, overall

from . import console
from .console import at_least, count, verdict

if TYPE_CHECKING:
    from gradvar.runs import EstimateConfig, Run

JUDGED = {
    "identity_signal": ("0", "the rollouts come from this policy (E s = 0)"),
    "token_covariance_share": ("1", "token gradients are uncorrelated"),
    "deviation_exponent": ("2 deviation", "Var(g) = V L, by the deviation from the mean"),
    "within_exponent": ("2 within", "Var(g) = V L, by the within-length variance"),
    "baseline_ratio": ("3", "responses are independent given the group's baseline"),
    "between_length_share": ("4", r"E\[g | L] = grad J, whatever the length"),
}
"""Quantity to its number in the audit and its words."""

MARGINS = {
    "identity_signal": "identity_margin",
    "token_covariance_share": "token_margin",
    "deviation_exponent": "margin",
    "within_exponent": "margin",
    "baseline_ratio": "baseline_margin",
    "between_length_share": "length_margin",
}
"""Quantity to the option that is its margin."""

_SHORT = {"supported": "[green]+[/green]", "rejected": "[red]-[/red]", "undetermined": "[yellow]?[/yellow]"}


def show_audit(run: Run, tables: Mapping[str, pd.DataFrame], *, as_json: bool) -> None:
    """Show every assumption's figure, interval, margin and verdict."""
    if as_json:
        console.print_json({name: console.records(table) for name, table in tables.items()})
        return
    table = tables["audit"]
    judged = table[table["quantity"].isin(JUDGED) & (table["scope"].isna() | (table["scope"] == "all responses"))]
    _print_assumptions(judged, run.options("audit"))
    _print_policy(table)
    _print_targets(judged)
    _print_prompts(judged)
    _print_tokens(table)
    _print_prefixes(tables.get("prefixes"))
    console.result.print(f"every number: {run.path / 'tables' / 'audit.parquet'}", markup=False, soft_wrap=True)


def _print_assumptions(judged: pd.DataFrame, options: EstimateConfig) -> None:
    from gradvar.estimators.intervals import PROMPTS_LIKE_THESE
    from gradvar.runs import EstimateConfig, target_label

    last = last_target(judged)
    mine = judged[judged["target"] == last]
    usual = EstimateConfig()
    rows = []
    for quantity, (number_, words) in JUDGED.items():
        found = mine[mine["quantity"] == quantity]
        here = overall(found)
        if here.empty:
            continue
        row = here.iloc[0]
        across = found[found["estimand"] == PROMPTS_LIKE_THESE]
        there = across.iloc[0] if len(across) and pd.notna(across.iloc[0]["low"]) else None
        told = f"[bold]{number_.split()[0]} {words}:[/bold] {verdict(row['verdict'])}"
        if getattr(options, MARGINS[quantity]) != getattr(usual, MARGINS[quantity]):
            told += f" (margin {escape(_margin(row))})"
        if row["verdict"] == "undetermined" and pd.notna(row["n_needed"]):
            needed = at_least(count(row["n_needed"]), row.get("n_needed_at_least"))
            told += f", {needed} responses would decide"
        if pd.isna(row["value"]):
            why = str(row["method"]).removeprefix("not estimated; ").removeprefix("not measured: ")
            told += f" ({escape(why)})"
        if there is not None:
            told += f"; prompts like these {verdict(there['verdict'])}"
        console.result.print(told)
        across_words = "" if there is None else interval(there)
        rows.append([number_, number(row["value"]), interval(row), _margin(row), across_words])
    prompts, responses = mine["clusters"].max(), mine["n"].max()
    level = f"{100 * float(mine['level'].iloc[0]):g}%"
    console.table(
        f"The assumptions' figures: {target_label(last)}, {counted(prompts, 'prompt')}, {responses} responses",
        ["#", "figure", f"{level} interval", "margin", "prompts like these"],
        rows,
        caption="supported: the interval lies inside the margin; rejected: wholly outside. 0: the mean score's square "
        "over the noise in a group. 1: share of the squared score from pairs of tokens. 2: exponent. 3: variance with "
        "the group's baseline over that with the baseline of all. 4: variance of the length bins' means over "
        "||E g||². Intervals: these prompts, responses drawn again.\n"
        "Per target, Euclidean geometry, on policy, no clipping.",
    )


def _print_policy(table: pd.DataFrame) -> None:
    found = overall(table[table["quantity"] == "entropy_surplus"])
    if len(found):
        row = found.iloc[0]
        console.result.print(
            f"0, tokens as likely as the policy's own: {verdict(row['verdict'])}, E(log p + entropy) is "
            f"{number(row['value'])} {interval(row)} nats a response"
        )


def _print_targets(judged: pd.DataFrame) -> None:
    from gradvar.runs import target_label

    targets = list(dict.fromkeys(judged["target"]))
    if len(targets) > 1:
        rows = {target_label(str(target)): overall(judged[judged["target"] == target]) for target in targets}
        _print_grid("Target by target, these prompts (+ supported, - rejected, ? undetermined)", "target", rows)


def _print_prompts(judged: pd.DataFrame) -> None:
    mine = judged[(judged["target"] == last_target(judged)) & judged["prompt_id"].notna()]
    rows = {str(prompt): mine[mine["prompt_id"] == prompt] for prompt in dict.fromkeys(mine["prompt_id"])}
    if len(rows) > 1:
        _print_grid("Prompt by prompt (+ supported, - rejected, ? undetermined)", "prompt", rows)


def _print_grid(title: str, what: str, rows: Mapping[str, pd.DataFrame]) -> None:
    shown = []
    for name, own in rows.items():
        cells = [own[own["quantity"] == quantity] for quantity in JUDGED]
        shown.append([name, *[_cell(found.iloc[0]) if len(found) else "" for found in cells]])
    console.table(title, [what, *[number_ for number_, _ in JUDGED.values()]], shown)


def _print_tokens(table: pd.DataFrame) -> None:
    found = table[(table["quantity"] == "token_covariance_share") & (table["scope"] != "all responses")]
    if found.empty:
        return
    mine = overall(found[found["target"] == last_target(found)])
    rows = [
        [str(row["scope"]), number(row["value"]), interval(row), verdict(row["verdict"]), str(row["n"])]
        for _, row in mine.iterrows()
    ]
    console.table(
        "1, share of token covariance by reward and length",
        ["responses", "share", "interval", "verdict", "n"],
        rows,
        caption="Of all responses it is 0 in theory on policy; given reward or length it need not be.",
    )


def _print_prefixes(table: pd.DataFrame | None) -> None:
    if table is None:
        console.result.print(
            "growth inside responses: not measured (gradvar measure RUN --prefixes 8)", style="dim", markup=False
        )
        return
    mine = overall(table[table["target"] == last_target(table)])
    words = {
        "prefix_within": "along responses",
        "prefix_between": "between responses",
        "prefix_difference": "difference",
    }
    rows = [[words[row["quantity"]], number(row["value"]), interval(row)] for _, row in mine.iterrows()]
    console.table(
        "Growth of the squared score with length, inside responses and between them",
        ["quantity", "exponent", "interval"],
        rows,
        caption="1: token gradients uncorrelated and equally large; 2: all one way.",
    )


def _margin(row: Any) -> str:
    low, high = float(row["margin_low"]), float(row["margin_high"])
    if math.isnan(high):
        return ""
    return f"< {number(high)}" if math.isinf(low) else f"[{number(low)}, {number(high)}]"


def _cell(row: Any) -> str:
    words = str(row["verdict"]).split(":")[0]
    return words if pd.isna(row["value"]) else f"{number(row['value'])} {_SHORT.get(words, words)}"
