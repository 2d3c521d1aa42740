"""What a law's table says beside its exponents: by reward class and truncation, which family fits, what contradicts.

Plain cells, for the command line and the report alike.
"""

from __future__ import annotations

from typing import Any

import pandas as pd

from gradvar.report.numbers import estimate, interval, number
from gradvar.runs.rows import ALL_RESPONSES, overall, row_of

WHAT = {"deviation": "deviation", "within": "within"}
"""The two quantities fitted."""
FAMILIES = ("constant", "proportional", "affine", "power")
MEASURES = {
    **{f"explained_{family}": family for family in FAMILIES},
    "line_r2": "line's R²",
    "loglog_slope": "log-log slope",
    "loglog_r2": "its R²",
    "rank_correlation": "rank corr.",
    "curvature": "curvature",
}
"""Rows of the table of families."""
CLASS_COLUMNS = ("responses", "A", "quantity", "exponent", "interval", "verdict", "tau", "p")


def class_table(law: pd.DataFrame, target: str) -> list[list[str]]:
    """Return the exponent of all responses, of each reward class and without truncated ones, `CLASS_COLUMNS` a row.

    tau is the standard deviation of the exponent between prompts, p Cochran's test that it is 0.
    """
    mine = law[law["target"] == target]
    rows = []
    for (kind, what), scopes in _fits(mine).items():
        for scope in scopes:
            row = _exponent(mine, kind, what, scope)
            if row is None:
                continue
            tau, p = (_pooled(mine, kind, f"{what}_{name}", scope) for name in ("exponent_tau", "heterogeneity_p"))
            rows.append(
                [
                    scope,
                    _factor(kind),
                    WHAT[what],
                    number(row["value"]),
                    interval(row),
                    str(row["verdict"]).removesuffix(" to length"),
                    "" if tau is None else number(tau["value"]),
                    "" if p is None else number(p["value"], 2),
                ]
            )
    return rows


def family_table(law: pd.DataFrame, target: str) -> tuple[list[str], list[list[str]]]:
    """Return (columns, rows) of what each family explains and how straight the law is, one column a fit."""
    mine = law[(law["target"] == target) & (law["scope"] == ALL_RESPONSES)]
    fits = [fit for fit in _fits(mine) if _exponent(mine, *fit, ALL_RESPONSES) is not None]
    rows = []
    for name, words in MEASURES.items():
        found = [_one(mine, kind, f"{what}_{name}") for kind, what in fits]
        if any(row is not None for row in found):
            rows.append([words, *["" if row is None else number(row["value"]) for row in found]])
        if any(row is not None and pd.notna(row["low"]) for row in found):  # below, or the table would be too wide
            ends = ["" if row is None else f"[{number(row['low'], 2)}, {number(row['high'], 2)}]" for row in found]
            rows.append(["  interval", *ends])
    return ["measure", *[f"{_factor(kind)} {WHAT[what]}" for kind, what in fits]], rows


def contradictions(law: pd.DataFrame, target: str) -> list[str]:
    """Return what the pooled exponents hide, a sentence each.

    A reward class (or the untruncated responses) whose exponent's interval lies apart from that of all responses or
    whose verdict is the opposite; prompts whose exponents differ (Cochran's Q); a power law that does not fit (the
    curvature's interval without 0).
    """
    mine = law[law["target"] == target]
    said = []
    for (kind, what), scopes in _fits(mine).items():
        name = f"{'score' if kind == 'score' else f'{kind} gradient'}, {what}"
        whole = _exponent(mine, kind, what, ALL_RESPONSES)
        for scope in scopes:
            row = _exponent(mine, kind, what, scope)
            if whole is not None and row is not None and scope != ALL_RESPONSES and _apart(row, whole):
                said.append(
                    f"{name}: {scope} contradicts all responses, exponent {estimate(row)} ({row['verdict']}) against "
                    f"{estimate(whole)} ({whole['verdict']})"
                )
            p = _pooled(mine, kind, f"{what}_heterogeneity_p", scope)
            if p is not None and pd.notna(p["value"]) and p["value"] < 1.0 - p["level"]:
                tau = _pooled(mine, kind, f"{what}_exponent_tau", scope)
                spread = "" if tau is None else f", standard deviation {number(tau['value'])}"
                said.append(f"{name}, {scope}: prompts have different exponents (p {number(p['value'], 2)}{spread})")
        bend = _one(mine[mine["scope"] == ALL_RESPONSES], kind, f"{what}_curvature")
        if bend is not None and (bend["low"] > 0 or bend["high"] < 0):
            said.append(f"{name}: no power law, curvature {estimate(bend)}; its exponent is that of a typical length")
    return said


def _fits(law: pd.DataFrame) -> dict[tuple[str, str], list[str]]:
    """Return (advantage, quantity) to the scopes fitted, all responses first."""
    scopes = list(dict.fromkeys(law["scope"].dropna()))
    ordered = sorted(scopes, key=lambda scope: scope != ALL_RESPONSES)
    return {(kind, what): ordered for kind in dict.fromkeys(law["advantage"].dropna()) for what in WHAT}


def _exponent(law: pd.DataFrame, kind: str, what: str, scope: str) -> Any:
    return _one(law[law["scope"] == scope], kind, f"{what}_exponent")


def _one(law: pd.DataFrame, kind: str, quantity: str) -> Any:
    rows = law[(law["advantage"] == kind) & (law["quantity"] == quantity)]
    return row_of(overall(rows)) if len(rows) else None


def _pooled(law: pd.DataFrame, kind: str, quantity: str, scope: str) -> Any:
    return _one(law[law["scope"] == scope], kind, quantity)


def _apart(row: Any, whole: Any) -> bool:
    decided = {"proportional to length", "not proportional"}
    if {row["verdict"], whole["verdict"]} == decided:
        return True
    return bool(row["low"] > whole["high"] or row["high"] < whole["low"])


def _factor(kind: str) -> str:
    return "1" if kind == "score" else kind
