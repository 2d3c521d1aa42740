"""What `gradvar check` prints: rounding, score identity, sampler against policy, conditioning."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from gradvar.report.numbers import interval, number
from gradvar.runs.rows import last_target, overall, row_of

from . import console
from .console import verdict
from .plans import print_line
from .views import measured_how

if TYPE_CHECKING:
    from gradvar.runs import Run

_SHOWN_TARGETS = 24


def show_check(run: Run, *, as_json: bool) -> None:
    """Show the table `check` by its parts."""
    table = run.table("check")
    if as_json:
        console.print_json({"run": str(run.path), "measured": measured_how(run), "check": console.records(table)})
        return
    _print_precision(table, f"the run: {measured_how(run)}")
    _print_identity(table)
    _print_condition(table)
    _print_sampler(table)
    print_line(f"every number: {run.path / 'tables' / 'check.parquet'}")


def _print_precision(table: pd.DataFrame, how: str) -> None:
    from gradvar.runs import target_label

    largest = table[table["quantity"] == "largest_gradient_error"]
    rows = []
    for _, row in largest.iterrows():
        where = {"target": row["target"], "scope": row["scope"]}
        deviation = row_of(table, quantity="largest_deviation_error", **where)
        cosines = table[(table["quantity"] == "gradient_cosine") & (table["target"] == row["target"])]
        cosine = cosines[cosines["scope"] == row["scope"]]["value"].min()
        words = {str(row["verdict"]), str(deviation["verdict"])}
        rows.append(
            [
                target_label(str(row["target"])),
                str(row["scope"]),
                number(row["value"]),
                f"{1 - cosine:.1e}",
                number(deviation["value"]),
                verdict("imprecise" if "imprecise" in words else "precise"),
            ]
        )
    console.table(
        f"Rounding: {largest['n'].max()} responses against float32 with eager attention",
        ["target", "scope", "error of g", "1 - cosine", "error of D", "verdict"],
        rows[:_SHOWN_TARGETS],
        caption=f"Largest relative errors; {how}. D: squared distance from the mean of the responses checked."
        + (f"\n{len(rows) - _SHOWN_TARGETS} more rows in the table." if len(rows) > _SHOWN_TARGETS else ""),
    )
    for _, row in table[table["quantity"] == "largest_logprob_error"].iterrows():
        print_line(
            f"log-probabilities {row['scope']}: {row['verdict']}, at most {number(row['value'])} nats per token on "
            "average over a response"
        )


def _print_identity(table: pd.DataFrame) -> None:
    rows = overall(table[table["quantity"].isin(["identity_signal", "entropy_surplus"])])
    targets = rows[rows["target"] != "any"]
    row = row_of(rows, quantity="identity_signal", target=last_target(targets))
    if row is not None:
        print_line(
            f"score identity (E s = 0): {row['verdict']}, {number(row['group_size'])} ||E s||² / E||s||² is "
            f"{number(row['value'])} {interval(row)}"
        )
    balance = row_of(rows, quantity="entropy_surplus")
    if balance is not None:
        print_line(
            f"entropy balance (E(log p + entropy) = 0): {balance['verdict']}, {number(balance['value'])} "
            f"{interval(balance)} nats a response"
        )


def _print_condition(table: pd.DataFrame) -> None:
    shares, factors = table[table["quantity"] == "mean_share"], table[table["quantity"] == "condition"]
    worst, factor = shares.sort_values("value").iloc[-1], factors["value"].max()
    print_line(
        f"conditioning: {worst['verdict']}, ||mean s||² is at most {number(worst['value'])} of E||s||² (prompt "
        f"{worst['prompt_id']}, {worst['target']}), so rounding counts {number(factor)} times in D"
    )


def _print_sampler(table: pd.DataFrame) -> None:
    means = table[table["quantity"] == "sampler_mean_abs"]
    if means.empty:
        print_line("sampler against policy: the rollouts came without the sampler's log-probabilities")
        return
    worst = means.sort_values("value").iloc[-1]
    sums = table[table["quantity"] == "sampler_response_max"]
    response = sums.sort_values("value", key=abs).iloc[-1]
    print_line(
        f"sampler against policy: {worst['verdict']}, {number(worst['value'])} nats per token on average at worst "
        f"(prompt {worst['prompt_id']}); a whole response by at most {number(abs(response['value']))} nats (prompt "
        f"{response['prompt_id']}, response {response['rollout_id']})"
    )
    tokens = table[table["quantity"] == "sampler_worst_token"]
    shown = [
        [
            str(row["prompt_id"]),
            str(row["rollout_id"]),
            str(row["token"]),
            repr(row["text"]) if isinstance(row["text"], str) else f"id {row['token_id']}",
            number(row["sampler_logprob"]),
            number(row["policy_logprob"]),
            number(row["value"]),
        ]
        for _, row in tokens.iterrows()
    ]
    names = ["prompt", "response", "position", "text", "sampler", "policy", "difference"]
    console.table("Tokens on which they differ most, log-probabilities in nats", names, shown)
