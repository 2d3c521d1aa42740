"""Batches of several prompts as people read them: the CV of the whole update, and where its variance comes from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from gradvar.report.numbers import interval, number
from gradvar.runs.records import counted
from gradvar.runs.rows import last_target, row_of

from . import console

if TYPE_CHECKING:
    from gradvar.runs import Run


def batch_records(run: Run) -> list[dict[str, Any]] | None:
    """Return the table `batches` for JSON, None where the run has none."""
    return console.records(run.table("batches")) if _exists(run) else None


def print_batches(run: Run) -> None:
    """Show batches of several prompts, or what would measure them."""
    from gradvar.runs import target_label

    if not _exists(run):
        if len(run.measured_prompt_ids()) > 1:
            console.result.print(
                f"batches of several prompts: `gradvar measure {run.path} --cross sketch` measures what they need",
                markup=False,
                soft_wrap=True,
            )
        return
    table = run.table("batches")
    last = last_target(table)
    rows = table[table["target"] == last]
    cv = rows[(rows["quantity"] == "cv") & rows["rule"].notna()]
    if cv["value"].isna().all() and cv["low"].isna().all() and cv["clusters"].max() >= 4:
        console.result.print("[yellow]Batches of several prompts: every update is zero.[/yellow]")
        return
    sizes = sorted(int(size) for size in cv["batch_prompts"].unique())
    shown = []
    for rule, alpha, scope in cv[["rule", "alpha", "scope"]].drop_duplicates().itertuples(index=False):
        labels = {"rule": rule, "alpha": alpha, "scope": scope}
        name = str(rule) + ("" if pd.isna(alpha) else f" α={alpha:g}")
        cells = [_cell(rows, size, labels) for size in sizes]
        share = row_of(rows, quantity="between_share", batch_prompts=sizes[0], **labels)
        shown.append(
            [
                name,
                str(scope).removeprefix("prompt "),
                *cells,
                _cell(rows, sizes[0], labels, "cv_given_prompts"),
                "–" if share is None else f"{number(share['value'])} {interval(share)}",
            ]
        )
    first = cv.iloc[0]
    extrapolated = "\n* linear in the weights' sums over the batch: more prompts than a third of those measured."
    console.table(
        f"Batches of several prompts: {target_label(last)}, {first['group_size']} responses a prompt, "
        f"{first['advantage']} advantages, {counted(first['clusters'], 'prompt')} measured",
        [
            "aggregator",
            "weights over",
            *[f"CV of {size} prompts" for size in sizes],
            f"CV given {sizes[0]} prompts",
            "between prompts",
        ],
        shown,
        caption="CV: prompts and responses drawn again; given the prompts: responses alone. Between prompts: share of "
        "the variance.\nIntervals: prompts like these, t over prompts"
        f"{_products(rows)}. > : unresolved, lower bound." + (extrapolated if bool(cv["extrapolated"].any()) else ""),
    )


def _exists(run: Run) -> bool:
    return (run.path / "tables" / "batches.parquet").exists()


def _cell(rows: pd.DataFrame, size: int, labels: dict[str, Any], quantity: str = "cv") -> str:
    row = row_of(rows, quantity=quantity, batch_prompts=size, **labels)
    if row is None:
        return "–"
    star = "*" if row["extrapolated"] else ""
    if pd.isna(row["value"]):
        bound = "unresolved" if pd.isna(row["low"]) else f"> {number(row['low'])}"
        return f"{bound}{star}"
    return f"{number(row['value'])}{star} {interval(row)}"


def _products(rows: pd.DataFrame) -> str:
    """Return what the products are, and how much of the error a sketch makes."""
    source = str(rows["products"].iloc[0])
    rho = rows[rows["quantity"] == "rho"].dropna(subset=["low", "high"])
    if source == "exact" or rho.empty:
        return f", {source} products"
    part = (2 * rho["sketch_error"] / (rho["high"] - rho["low"])).max()
    return f", products by {source}, whose own error (inside them) is at most {part:.0%} of a half-width"
