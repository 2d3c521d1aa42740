"""The calibration table for people: one line a quantity, the extremes over settings, and every row that falls short."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

LOW, HIGH = 0.93, 0.97
"""Claimed coverage, at N of 64 and more; below only LOW."""
WRONG = 0.05
"""Most wrong verdicts."""
CLAIMED = ("deviation exponent", "within exponent", "rho ", "cv ratio ", "cv form ", "eta ")
"""Beginnings of the quantities for which the claim is made; the others are tabled."""
BIASED = ("rho ", "cv ratio ", "eta ", "cosine ", "scale ", "alpha* ", "noise scale ")
"""Beginnings of the ratios and argmaxes whose bias is tabled."""
UNRESOLVED = 0.02
"""Beyond this share of draws without a bounded interval, all of which cover, a row cannot but lie above."""
ONE_SIDED = 0.5
"""Of the intervals end at the quantity's own edge from this share on: the row is one-sided."""
Row = dict[str, Any]


def summary(rows: Sequence[Row], minutes: float, workers: int) -> str:
    """Markdown made of the table's rows."""
    covered = [r for r in rows if not r["quantity"].endswith("p value")]
    short = [r for r in covered if r["coverage_high"] < LOW]
    high = [r for r in covered if r["n"] >= 64 and r["coverage_low"] > HIGH and r["no_interval"] < 0.05]
    one_sided = [r for r in high if r["at_edge"] > ONE_SIDED]
    wide = [r for r in high if r["at_edge"] <= ONE_SIDED]
    tried = [r for r in covered if r["quantity"].startswith(CLAIMED) and r["n"] >= 64 and r["prompts"] == 1]
    bounded = [r for r in tried if r["no_interval"] <= UNRESOLVED]
    within = [r for r in bounded if LOW <= r["coverage"] <= HIGH]
    possible = [r for r in bounded if r["coverage_high"] >= LOW and r["coverage_low"] <= HIGH]
    above = [r for r in bounded if r["coverage_low"] > HIGH]
    mean = 100 * sum(r["coverage"] for r in bounded) / max(len(bounded), 1)
    judged = [r for r in rows if r["wrong"] != ""]
    wrong = [r for r in judged if r["wrong"] > WRONG]
    least, most = min(r["draws"] for r in covered), max(r["draws"] for r in covered)
    took = ", in several runs of fewer draws" if math.isnan(minutes) else f" in {minutes:.0f} minutes"
    lines = [
        "# Calibration",
        "",
        f"Made by `OMP_NUM_THREADS=1 python -m benchmarks.calibration --workers {workers}`{took}; "
        "every row with its Monte Carlo interval is in `calibration.csv`, the settings in `calibration.py`.",
        "",
        f"{len(covered)} rows (setting, N, prompts, quantity), {least} to {most} draws each, "
        'every draw counted: an interval without an end, or none, excludes nothing and counts under "no interval". '
        f"Nominal coverage 95%; claimed {100 * LOW:.0f} to {100 * HIGH:.0f}% from 64 responses on, at least "
        f"{100 * LOW:.0f}% or no interval at 16.",
        "",
        f"- Below {100 * LOW:.0f}% beyond Monte Carlo error: {len(short)} rows" + (", listed below." if short else "."),
        f"- Above {100 * HIGH:.0f}% beyond Monte Carlo error, bounded and at N >= 64 (wider than it need be): "
        f"{len(wide)} rows ({_kinds(wide)}); and {len(one_sided)} ({_kinds(one_sided)}) where more than "
        f"{100 * ONE_SIDED:.0f}% of the intervals end where the quantity does (a cosine of 1, a share of 0), so that "
        "only the other end can fail: 97.5% there is 95% of both.",
        f"- Exponents, rho, CV ratios and eta of one prompt at N >= 64, where at most {100 * UNRESOLVED:.0f}% of the "
        f"draws are without a bounded interval: {len(bounded)} of {len(tried)} rows; mean coverage {mean:.1f}%; "
        f"{len(within)} lie within the claim, {len(possible)} do to within Monte Carlo error, {len(above)} lie above.",
        f"- Wrong verdicts: more than {100 * WRONG:.0f}% in {len(wrong)} of {len(judged)} rows with a verdict; "
        f"on average {100 * sum(r['wrong'] for r in judged) / max(len(judged), 1):.1f}%.",
        "",
        "## Coverage over settings: least / median / most",
        "",
    ]
    single = [r for r in covered if not r["setting"].startswith("batches")]
    sizes = sorted({r["n"] for r in single})
    lines += [
        "| quantity | " + " | ".join(f"N = {n}" for n in sizes) + " |",
        "|---|" + "---|" * len(sizes),
    ]
    names = dict.fromkeys(_family(r) for r in single)
    for name in names:
        cells = []
        for n in sizes:
            mine = [r for r in single if _family(r) == name and r["n"] == n]
            cells.append(_cell(mine))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "A cell without numbers: no bounded interval there. `[x%]`: median share without a bounded interval.",
        "",
    ]
    lines += _bias([r for r in single if r["prompts"] == 1], sizes)
    lines += _batches([r for r in covered if r["setting"].startswith("batches")])
    lines += ["## The test of assumption 0", "", "| setting | N | prompts | share of p < 0.05 | rejected by margin |"]
    lines += ["|---|---|---|---|---|"]
    for r in rows:
        if r["quantity"] == "assumption 0: p value":
            signal = next(
                x
                for x in rows
                if x["quantity"] == "assumption 0: identity"
                and (x["setting"], x["n"], x["prompts"]) == (r["setting"], r["n"], r["prompts"])
            )
            lines.append(
                f"| {r['setting']} | {r['n']} | {r['prompts']} | {1 - r['coverage']:.3f} | {signal['rejected']:.3f} |"
            )
    lines += _listing("Below the claim", short)
    lines += _listing("Exponents, rho, CV ratios and eta above the claim", above)
    lines += _listing("More wrong verdicts than claimed", wrong)
    return "\n".join(lines) + "\n"


def _bias(rows: list[Row], sizes: Sequence[int]) -> list[str]:
    """Median bias of what no estimator knows without bias: ratios and argmaxes."""
    lines = [
        "## Median bias of ratios",
        "",
        "Median over draws of estimate less truth, over the truth (alpha*: as it is): least / median / most over "
        "settings.",
        "",
        "| quantity | " + " | ".join(f"N = {n}" for n in sizes) + " |",
        "|---|" + "---|" * len(sizes),
    ]
    for name in dict.fromkeys(r["quantity"] for r in rows if r["quantity"].startswith(BIASED)):
        cells = []
        for n in sizes:
            found = sorted(
                r["median_bias"] / (1.0 if name.startswith("alpha*") else r["truth"])
                for r in rows
                if r["quantity"] == name and r["n"] == n and r["median_bias"] != "" and r["truth"] not in ("", 0.0)
            )
            cells.append(" / ".join(f"{found[k]:+.3f}" for k in (0, len(found) // 2, -1)) if found else "")
        if any(cells):
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _kinds(rows: Sequence[Row]) -> str:
    """Count rows by the first word of their quantity."""
    counts = Counter(r["quantity"].split()[0].rstrip(":") for r in rows)
    return ", ".join(f"{word} {count}" for word, count in counts.most_common())


def _family(row: Row) -> str:
    pooled = "" if row["prompts"] == 1 else f"; {row['prompts']} prompts, {row['estimand']}"
    return f"{row['quantity']}{pooled}"


def _batches(rows: list[Row]) -> list[str]:
    """Batches of several prompts: over rules, sizes of batches and populations."""
    if not rows:
        return []
    counts = sorted({r["prompts"] for r in rows})
    lines = [
        "## Batches of several prompts",
        "",
        "Least / median / most over rules, scopes, batches and populations.",
        "",
    ]
    lines += ["| quantity | " + " | ".join(f"{k} prompts" for k in counts) + " |", "|---|" + "---|" * len(counts)]

    def family(row: Row) -> str:
        kinds = ("cv ratio", "between-prompt share", "rho", "cv")
        kind = next(kind for kind in kinds if row["quantity"].startswith(kind))
        return f"{kind}{', extrapolated' if 'extrapolated' in row['quantity'] else ''}; {row['estimand']}"

    for name in dict.fromkeys(family(r) for r in rows):
        cells = [_cell([r for r in rows if family(r) == name and r["prompts"] == k]) for k in counts]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _cell(rows: list[Row]) -> str:
    if not rows or all(r["no_interval"] == 1.0 for r in rows):
        return ""
    shares = sorted(r["coverage"] for r in rows)
    without = sorted(r["no_interval"] for r in rows)[len(rows) // 2]
    parts = [shares[0], shares[len(shares) // 2], shares[-1]] if len(shares) > 1 else shares
    return " / ".join(f"{100 * s:.0f}" for s in parts) + (f" [{100 * without:.0f}%]" if without >= 0.005 else "")


def _listing(title: str, rows: list[Row]) -> list[str]:
    if not rows:
        return []
    lines = ["", f"## {title}", "", "| setting | N | prompts | quantity | truth | coverage | no interval | wrong |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for r in rows:
        wrong = "" if r["wrong"] == "" else f"{r['wrong']:.3f}"
        span = f"{r['coverage']:.3f} ({r['coverage_low']:.3f} to {r['coverage_high']:.3f})"
        where = r["quantity"] + (f"; {r['estimand']}" if r["prompts"] > 1 else "")
        lines.append(
            f"| {r['setting']} | {r['n']} | {r['prompts']} | {where} | {r['truth']} | {span} | "
            f"{r['no_interval']:.3f} | {wrong} |"
        )
    return lines
