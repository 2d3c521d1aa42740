"""Numbers and labels as people write them."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

NONE = "–"


def number(value: Any, digits: int = 3) -> str:
    """Return a number as people write it; a dash where it is undefined."""
    if value is None or pd.isna(value):
        return NONE
    value = float(value)
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if value and (abs(value) >= 10**5 or abs(value) < 10**-3):
        return f"{value:.{digits - 1}e}"
    return f"{value:.{digits}g}" if abs(value) < 100 else f"{value:.0f}"


def interval(row: Any) -> str:
    """Return low and high of a table row as an interval; a ratio's end is not rounded onto 1, which it is judged by."""
    if pd.isna(row["low"]) and pd.isna(row["high"]):
        return "no interval"
    write = _beside_one if "ratio" in str(row.get("quantity")) else number
    return f"[{write(row['low'])}, {write(row['high'])}]"


def _beside_one(value: Any) -> str:
    shown = number(value)
    if shown == "1" and abs(float(value) - 1.0) > 1e-9:
        return next(text for digits in range(4, 17) if (text := number(value, digits)) != "1")
    return shown


def estimate(row: Any) -> str:
    """Return value and interval; the lower bound alone where the value is unresolved."""
    if pd.notna(row["value"]):
        return f"{number(row['value'])} {interval(row)}"
    return f"unresolved, above {number(row['low'])}" if pd.notna(row["low"]) else "unresolved"


def rule_name(row: Any) -> str:
    """Return an aggregator's name with its alpha."""
    alpha = row["alpha"]
    return str(row["rule"]) if pd.isna(alpha) else f"{row['rule']} α={alpha:g}"


def tone(verdict: Any) -> str:
    """Return what a verdict means for its colour: good, bad or open."""
    text = "" if verdict is None or pd.isna(verdict) else str(verdict)
    if text in (
        "proportional to length",
        "supported",
        "resolved",
        "holds",
        "not rejected",
        "precise",
        "agree",
        "well conditioned",
    ):
        return "good"
    if text in ("not proportional", "rejected", "violated", "imprecise", "disagree", "D loses digits"):
        return "bad"
    return "open" if text else ""
