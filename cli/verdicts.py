"""The estimates as people read them: the law in words, the aggregators as a table, the whole result."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from gradvar.report.laws import contradictions
from gradvar.report.numbers import interval, number, rule_name
from gradvar.runs.records import counted
from gradvar.runs.rows import last_target, overall, row_of

from . import console
from .console import at_least, count, verdict
from .laws import print_classes, print_difference, print_exponents, print_families, print_law_by_prompt

if TYPE_CHECKING:
    from gradvar.runs import Run


def show_law(run: Run, *, as_json: bool) -> None:
    """Show the exponents with their verdicts, and the score identity."""
    from .proxies import print_proxies  # which reads this file's rows

    tables = {name: run.table(name) for name in ("law", "identity", "proxies")}
    law, identity = tables["law"], tables["identity"]
    if as_json:
        hidden = contradictions(law, last_target(law))
        console.print_json({**{name: console.records(table) for name, table in tables.items()}, "hidden": hidden})
        return
    _print_identity(identity)
    print_exponents(law, margin=run.options("fit").margin)
    print_difference(law)
    print_classes(law)
    print_families(law)
    for sentence in contradictions(law, last_target(law)):
        console.result.print(f"HIDDEN BY THE POOLED EXPONENT: {sentence}", style="bold red", markup=False)
    print_law_by_prompt(law)
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
        print_extras(run)
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
    print_exponents(law, margin=run.options("fit").margin)
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


def _print_identity(identity: pd.DataFrame) -> None:

    pooled = identity[identity["prompt_id"].isna()]
    rows = pooled if len(pooled) else identity
    signals = rows[rows["quantity"] == "identity_signal"]
    if len(signals):
        row = signals[signals["target"] == last_target(signals)].iloc[0]
        p_values = rows[(rows["quantity"] == "identity_p_value") & rows["target"].isin(signals["target"])]
        known = pd.notna(row["value"])
        signal = f", ||E s||² is {number(row['value'])} {interval(row)} of the noise in a group of {row['group_size']}"
        console.result.print(
            f"[bold]Rollouts come from this policy (E s = 0):[/bold] {verdict(row['verdict'])}"
            + (signal + _p_values(p_values) if known else "")
        )
    surplus, p = row_of(rows, quantity="entropy_surplus"), row_of(rows, quantity="entropy_p_value")
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


def _p_values(rows: pd.DataFrame) -> str:
    """Say p of all targets together, and the smallest with how many it is the smallest of."""
    from gradvar.runs import target_label

    last = last_target(rows)
    own = row_of(rows, target=last)
    said = f"; p {number(own['value'])} ({target_label(last)})"
    others = rows[rows["target"] != last].sort_values("value")
    if len(others):
        worst = others.iloc[0]
        single = target_label(str(worst["target"]))
        said += f", smallest of the {len(others)} single targets' {number(worst['value'])} ({single})"
    return said


def _print_aggregators(cv: pd.DataFrame) -> None:
    from gradvar.runs import target_label

    last = last_target(cv)
    whole = overall(cv[(cv["target"] == last) & cv["rule"].notna()])
    values = whole[whole["quantity"] == "cv"]
    if values.empty:
        console.result.print(f"No aggregator can be compared: {_reasons(cv)}.", style="yellow", markup=False)
        return
    rows = []
    unresolved = bool(values["value"].isna().any())
    for _, row in values.iterrows():
        same = {"rule": row["rule"], "alpha": row["alpha"]}
        rho = row_of(whole, quantity="rho", **same)
        ratio = row_of(whole, quantity="cv_ratio", **same)
        cells = [
            rule_name(row),
            number(row["value"]) if pd.notna(row["value"]) else f"> {number(row['low'])}",
            interval(row),
            "" if rho is None else f"{number(rho['value'])} {interval(rho)}",
            "" if ratio is None else f"{number(ratio['value'])} {interval(ratio)}",
        ]
        needed = at_least(count(row["n_needed"]), row.get("n_needed_at_least"))
        rows.append([*cells, "" if pd.notna(row["value"]) else needed] if unresolved else cells)
    first = values.iloc[0]
    columns = ["aggregator", "CV", "interval", "rho = 1/(1+CV²)", "CV over grpo's"]
    open_ended = (
        " > : unresolved (rho's interval reaches 0), lower bound, and the responses a prompt that would do; ≥ : at "
        "least, where rho is not above 0 or has no interval."
    )
    console.table(
        f"Total CV of each aggregator's update: {target_label(last)}, group of {first['group_size']}, "
        f"{first['advantage']} advantages, {counted(first['clusters'], 'prompt')}",
        [*columns, "N a prompt"] if unresolved else columns,
        rows,
        caption="Lower is less noise. Lengths random, as training sees them; these prompts, responses drawn "
        "again.\nRatios are paired; intervals allow for shorter and longer responses than the sample holds."
        + (open_ended if unresolved else ""),
    )


def _reasons(table: pd.DataFrame) -> str:
    """Return why prompts have no estimate, each reason once."""
    return "; ".join(dict.fromkeys(table[table["rule"].isna()]["verdict"].dropna().astype(str)))


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
        cells[name] = number(row["value"]) if pd.notna(row["value"]) else f">{number(row['low'])}"
    if len(table) < 2 or not columns:
        return
    shown = [[prompt, *(cells.get(name, "") for name in columns)] for prompt, cells in table.items() if "" not in cells]
    first = rows.iloc[0]
    title = (
        f"CV prompt by prompt: {target_label(last)}, group of {first['group_size']}, {first['advantage']} advantages "
        "(>: unresolved, lower bound)"
    )
    # A reason among the numbers would take the width of their headings.
    left_out: dict[str, list[str]] = {}
    for prompt, cells in table.items():
        if "" in cells:
            left_out.setdefault(cells[""], []).append(prompt)
    caption = "\n".join(f"{why}: {counted(len(names), 'prompt')} ({_first(names)})" for why, names in left_out.items())
    console.wide_table(title, ["prompt", *columns], shown, caption=caption)


def _first(names: Sequence[str], most: int = 8) -> str:
    """Return some names, and that there are more."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
