"""The estimates as people read them: the law in words, the aggregators as a table, the whole result."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from gradvar.report.numbers import interval, number, rule_name

from . import console
from .console import count, verdict

if TYPE_CHECKING:
    from gradvar.runs import Run

_WHAT = {"deviation": "deviation from the mean", "within": "within-length variance"}


def show_law(run: Run, *, as_json: bool) -> None:
    """Show the exponents with their verdicts, and the score identity."""
    from .proxies import print_proxies  # which reads this file's rows

    tables = {name: run.table(name) for name in ("law", "identity", "proxies")}
    law, identity = tables["law"], tables["identity"]
    if as_json:
        console.print_json({name: console.records(table) for name, table in tables.items()})
        return
    _print_identity(identity)
    _print_exponents(law, margin=run.options("fit").margin)
    _print_difference(law)
    _print_law_by_prompt(law)
    print_proxies(tables["proxies"])
    console.result.print(f"every number: {run.path / 'tables' / 'law.parquet'}", markup=False, soft_wrap=True)


def show_cv(run: Run, *, extras: bool = False, as_json: bool) -> None:
    """Show every aggregator's CV, pooled, prompt by prompt, and of batches of prompts where they were measured."""
    from . import batching
    from .extras import print_extras  # which reads this file's rows

    table = run.table("cv")
    if as_json:
        batches = batching.batch_records(run)
        more = {"batches": batches} if batches is not None else {}
        if extras:
            more["extras"] = console.records(run.table("extras"))
        console.print_json({"cv": console.records(table), **more})
        return
    _print_aggregators(table)
    _print_prompts(table)
    if extras:
        print_extras(run.table("extras"))
    batching.print_batches(run)
    console.result.print(f"every number: {run.path / 'tables' / 'cv.parquet'}", markup=False, soft_wrap=True)


def show_results(run: Run, figures: Sequence[Path], *, as_json: bool) -> None:
    """Show the verdict, the aggregators, and where everything was saved."""
    from gradvar.stages import advice, disagreement

    law, identity, cv = run.table("law"), run.table("identity"), run.table("cv")
    tables = sorted((run.path / "tables").glob("*.parquet"))
    if as_json:
        console.print_json(
            {
                "run": str(run.path),
                "disagreement": disagreement(run),
                "law": console.records(law),
                "identity": console.records(identity),
                "cv": console.records(cv),
                "advice": advice(run),
                "tables": [str(path) for path in tables],
                "figures": [str(path) for path in figures if path.suffix != ".html"],
                "report": next((str(path) for path in figures if path.suffix == ".html"), None),
            }
        )
        return
    line = disagreement(run)
    if line is not None:
        console.result.print(line, style="bold red", markup=False)
    _print_identity(identity)
    _print_exponents(law, margin=run.options("fit").margin)
    _print_aggregators(cv)
    console.result.print(advice(run), style="bold", markup=False)
    for kind, paths in (("figures", [p for p in figures if p.suffix == ".png"]), ("tables", tables)):
        console.result.print(f"{kind}:", style="bold")
        for path in paths:
            console.result.print(f"  {path}", markup=False, soft_wrap=True)
    for path in figures:
        if path.suffix == ".html":
            console.result.print(
                f"next: open {path} in a browser; gradvar audit {run.path}", markup=False, soft_wrap=True
            )


def overall_rows(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows over all prompts, as drawn; of the one prompt where there is only one."""
    from gradvar.estimators.intervals import THESE_PROMPTS

    pooled = table[table["prompt_id"].isna()]
    if len(pooled):
        both = "estimand" in pooled  # some tables are about these prompts alone
        return pooled[pooled["estimand"] == THESE_PROMPTS] if both else pooled
    return table[table["prompt_id"] == table["prompt_id"].iloc[0]] if len(table) else table


def last_target(table: pd.DataFrame) -> str:
    """Return the sum of targets where the table has it, else its last target."""
    targets = [t for t in table["target"].unique() if t != "any"]
    return "sum" if "sum" in targets else targets[-1]


def _print_identity(identity: pd.DataFrame) -> None:
    from gradvar.runs import target_label

    pooled = identity[identity["prompt_id"].isna()]
    rows = pooled if len(pooled) else identity
    signals = rows[rows["quantity"] == "identity_signal"]
    if len(signals):
        row = signals[signals["target"] == last_target(signals)].iloc[0]
        p_values = rows[(rows["quantity"] == "identity_p_value") & rows["target"].isin(signals["target"])]
        worst = p_values.sort_values("value").iloc[0]
        console.result.print(
            f"[bold]Rollouts come from this policy (E s = 0):[/bold] {verdict(row['verdict'])}, ||E s||² is "
            f"{number(row['value'])} {interval(row)} of the noise in a group of {row['group_size']}; smallest p "
            f"{number(worst['value'])} ({target_label(str(worst['target']))})"
        )
    surplus, p = one_row(rows, quantity="entropy_surplus"), one_row(rows, quantity="entropy_p_value")
    if surplus is None:
        return
    console.result.print(
        f"[bold]Tokens as likely as the policy's own:[/bold] {verdict(surplus['verdict'])}, E(log p + entropy) is "
        f"{number(surplus['value'])} {interval(surplus)} nats a response, p {number(p['value'])}"
    )
    if surplus["verdict"] == "rejected":
        sure = "surer" if surplus["value"] > 0 else "less sure"
        console.result.print(
            f"THESE ROLLOUTS DO NOT COME FROM THIS POLICY AT THIS TEMPERATURE: their sampler was {sure} than the "
            "policy (another temperature, top-p, top-k, checkpoint or tokenizer). What follows does not hold for it.",
            style="bold red",
            markup=False,
        )


def _print_exponents(law: pd.DataFrame, *, margin: float) -> None:
    from gradvar.runs import EstimateConfig, target_label

    # A margin of the user's own stands beside every verdict that it made.
    usual = margin == EstimateConfig().margin
    beside = "" if usual else f" (margin {margin:g}: [{number(1 - margin)}, {number(1 + margin)}])"

    main = law[(law["scope"] == "all responses") & law["quantity"].isin([f"{what}_exponent" for what in _WHAT])]
    overall = overall_rows(main)
    last = last_target(main)
    for kind in overall["advantage"].unique():
        name = "score (A = 1)" if kind == "score" else f"gradient with {kind} advantages"
        for what, words in _WHAT.items():
            row = one_row(overall, target=last, advantage=kind, quantity=f"{what}_exponent")
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
    for _, row in overall.iterrows():
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
                count(row["n_needed"]) if undecided else "",
            ]
        )
    level = f"{100 * float(overall['level'].iloc[0]):g}%"
    sizes = f"{overall['clusters'].max()} prompts, {overall['n'].max()} responses"
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
    row = one_row(rows, target=target, advantage=kind, quantity=f"{what}_exponent")
    return "" if row is None or pd.isna(row["low"]) else f"; prompts like these {interval(row)}"


def _print_difference(law: pd.DataFrame) -> None:
    overall = overall_rows(law[(law["scope"] == "all responses") & (law["quantity"] == "exponent_difference")])
    rows = overall[overall["target"] == last_target(overall)] if len(overall) else overall
    for _, row in rows.iterrows():
        name = "score" if row["advantage"] == "score" else f"{row['advantage']} gradient"
        console.result.print(f"{name}: deviation's exponent minus within's {number(row['value'])} {interval(row)}")


def _print_law_by_prompt(law: pd.DataFrame) -> None:
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


def _print_aggregators(cv: pd.DataFrame) -> None:
    from gradvar.runs import target_label

    last = last_target(cv)
    overall = overall_rows(cv[(cv["target"] == last) & cv["rule"].notna()])
    values = overall[overall["quantity"] == "cv"]
    if values.empty:
        console.result.print("[yellow]No aggregator can be compared: every reward is equal within its prompt.[/yellow]")
        return
    rows = []
    unresolved = bool(values["value"].isna().any())
    for _, row in values.iterrows():
        same = {"rule": row["rule"], "alpha": row["alpha"]}
        rho = one_row(overall, quantity="rho", **same)
        ratio = one_row(overall, quantity="cv_ratio", **same)
        cells = [
            rule_name(row),
            number(row["value"]) if pd.notna(row["value"]) else f"> {number(row['low'])}",
            interval(row),
            "" if rho is None else f"{number(rho['value'])} {interval(rho)}",
            "" if ratio is None else f"{number(ratio['value'])} {interval(ratio)}",
        ]
        rows.append([*cells, "" if pd.notna(row["value"]) else count(row["n_needed"])] if unresolved else cells)
    first = values.iloc[0]
    columns = ["aggregator", "CV", "interval", "rho = 1/(1+CV²)", "CV over grpo's"]
    open_ended = " > : unresolved (rho's interval reaches 0), lower bound, and the responses a prompt that would do."
    console.table(
        f"Total CV of each aggregator's update: {target_label(last)}, group of {first['group_size']}, "
        f"{first['advantage']} advantages, {first['clusters']} prompts",
        [*columns, "N a prompt"] if unresolved else columns,
        rows,
        caption="Lower is less noise. Lengths random, as training sees them; these prompts, responses drawn "
        "again.\nRatios are paired; grpo's side is widened for shorter responses than the sample holds."
        + (open_ended if unresolved else ""),
    )


def _print_prompts(cv: pd.DataFrame) -> None:
    from gradvar.runs import target_label

    last = last_target(cv)
    rows = cv[(cv["target"] == last) & cv["prompt_id"].notna() & (cv["quantity"] == "cv")]
    columns: list[str] = []
    table: dict[str, dict[str, str]] = {}
    for _, row in rows.iterrows():
        cells = table.setdefault(str(row["prompt_id"]), {})
        if row["rule"] is None or pd.isna(row["rule"]):
            cells[""] = str(row["verdict"])
            continue
        name = rule_name(row)
        columns = list(dict.fromkeys([*columns, name]))
        cells[name] = number(row["value"]) if pd.notna(row["value"]) else f"> {number(row['low'])}"
    if len(table) < 2:
        return
    shown = [[prompt, *[cells.get(name, "") for name in columns], cells.get("", "")] for prompt, cells in table.items()]
    first = rows.iloc[0]
    title = (
        f"CV prompt by prompt: {target_label(last)}, group of {first['group_size']}, {first['advantage']} advantages "
        "(> : unresolved, lower bound)"
    )
    console.table(title, ["prompt", *columns, ""], shown)


def one_row(table: pd.DataFrame, **labels: Any) -> Any:
    """Return the first row with these labels (None and NaN mean missing), or None."""
    rows = table
    for name, value in labels.items():
        missing = value is None or (isinstance(value, float) and pd.isna(value))
        rows = rows[rows[name].isna()] if missing else rows[rows[name] == value]
    return rows.iloc[0] if len(rows) else None
