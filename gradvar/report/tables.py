"""Rows of estimates as tables to read and to copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from gradvar.report.numbers import NONE, estimate, interval, number, rule_name, tone
from gradvar.report.records import Cell, Table, cell
from gradvar.runs import target_label

MOST_ROWS = 60
"""Longer tables of numbers are given as comma-separated text."""
_LABELS = ("prompt_id", "target", "advantage", "scope", "quantity", "rule", "alpha", "group_size")
_NUMBERS = ("value", "low", "high", "verdict", "n", "n_needed")


def numbers_table(frame: pd.DataFrame, caption: str) -> Table | str:
    """Return what a figure draws: a table, or comma-separated text where it is long.

    Args:
        frame: Rows of an estimate table, or any tidy rows.
        caption: Above the table.
    """
    known = [name for name in (*_LABELS, *_NUMBERS) if name in frame]
    extra = [name for name in frame.columns if name not in known]
    kept = [*known, *extra] if "value" not in frame else [name for name in known if frame[name].notna().any()]
    chosen = frame[kept]
    if len(chosen) > MOST_ROWS:
        if "target" in chosen:
            chosen = chosen.assign(target=chosen["target"].map(target_label))
        return str(chosen.to_csv(index=False, float_format="%.6g"))
    words = sum(1 for name in kept if name in _LABELS)
    rows = [
        [_cell(name, value) for name, value in zip(kept, row, strict=True)] for row in chosen.itertuples(index=False)
    ]
    return Table(caption=caption, columns=[name.replace("_", " ") for name in kept], rows=rows, words=max(words, 1))


def _cell(name: str, value: Any) -> Cell:
    if name == "target":
        return cell(target_label(str(value)))
    if name == "verdict":
        return cell("" if pd.isna(value) else value, tone(value))
    if name == "prompt_id" and pd.isna(value):
        return cell("all prompts")
    if isinstance(value, bool | np.bool_):
        return cell("yes" if value else "no")
    if isinstance(value, float | np.floating):
        return cell(number(value, 4))
    return cell(NONE if value is None or value is pd.NA else value)


def estimates_table(
    rows: pd.DataFrame,
    caption: str,
    labels: Sequence[tuple[str, str]],
    *,
    what: str = "value",
    more: Sequence[str] = (),
) -> Table:
    """Return a table of estimates: labels, value with interval, verdict where there is one, responses.

    Args:
        rows: Rows of an estimate table.
        caption: Above the table.
        labels: Column and its heading; "rule" joins alpha.
        what: Heading of the values.
        more: Further columns of words, for example "paper".
    """
    judged = "verdict" in rows and rows["verdict"].notna().any()
    columns = [heading for _, heading in labels] + [what, "interval", *more] + (["verdict"] if judged else []) + ["n"]
    made = []
    for row in rows.to_dict("records"):
        cells = [_label(name, row) for name, _ in labels]
        cells += [cell(number(row["value"]) if pd.notna(row["value"]) else "unresolved"), cell(interval(row))]
        cells += [cell("" if row.get(name) is None or pd.isna(row.get(name)) else row[name]) for name in more]
        if judged:
            cells.append(verdict_cell(row))
        made.append([*cells, cell(number(row["n"]))])
    return Table(caption=caption, columns=columns, rows=made, words=len(labels))


def _label(name: str, row: Any) -> Cell:
    if name == "rule":
        return cell(rule_name(row))
    if name == "target":
        return cell(target_label(str(row["target"])))
    if name == "prompt_id":
        return cell("all prompts" if pd.isna(row["prompt_id"]) else row["prompt_id"])
    if name == "quantity":
        return cell(QUANTITIES.get(str(row["quantity"]), row["quantity"]))
    return cell(row[name])


def verdict_cell(row: Any) -> Cell:
    """Return a verdict in its tone, with the responses that would tell where it is open."""
    verdict = row["verdict"]
    if verdict is None or pd.isna(verdict):
        return cell("")
    needed = row.get("n_needed")
    open_ = tone(verdict) == "open" and needed is not None and pd.notna(needed)
    only = row.get("n_needed_at_least")
    least = "at least " if only is not None and bool(only) and needed <= _MOST else ""
    return cell(f"{verdict} ({least}N {_count(needed)} would tell)" if open_ else verdict, tone(verdict))


_MOST = 100_000


def _count(needed: Any) -> str:
    return f"> {_MOST}" if needed > _MOST else f"{needed:.0f}"


QUANTITIES = {
    "deviation_exponent": "deviation from the mean",
    "within_exponent": "within-length variance",
    "exponent_difference": "deviation's minus within's",
    "cv_form_1": "1: given the lengths, variance V L",
    "cv_form_2": "2: given the lengths, measured variance",
    "cv_form_3": "3: total, lengths random",
    "cv_ratio_form_1": "1: given the lengths, variance V L",
    "cv_ratio_form_2": "2: given the lengths, measured variance",
    "cv_ratio_form_3": "3: total, lengths random",
    "cv_ratio": "CV over the reference's",
    "cv_given_prompts": "CV given the prompts",
    "scope_ratio": "CV weighted over the batch over weighted in groups",
    "rank_correlation": "rank correlation",
    "explained_variance": "explained variance",
    "explained_variance_log": "explained variance of the logs",
    "identity_signal": "||E s||² over a group's noise",
    "entropy_surplus": "E(log p + entropy), nats",
    "responses_for_cv_1": "responses for CV 1 (noise scale)",
    "silent_share": "share of silent groups",
    "largest_gradient_error": "largest error of g, relative",
    "largest_deviation_error": "largest error of D, relative",
    "largest_logprob_error": "largest error of log p, nats a token",
    "mean_share": "||mean s||² over E||s||²",
    "condition": "times that rounding counts in D",
    "sampler_mean_abs": "sampler against policy, mean, nats a token",
    "sampler_max_abs": "sampler against policy, largest, nats a token",
}
"""Quantity of a table to words."""


def aggregator_table(cv: pd.DataFrame, alpha: pd.DataFrame | None, caption: str) -> Table:
    """Return one row an aggregator: CV, paired ratio to grpo's, cosine (bias), efficiency.

    Args:
        cv: Rows of the table `cv` over all prompts of one target.
        alpha: Those of the table `alpha`, where it was made.
        caption: Above the table.
    """
    rows = []
    for row in cv[cv["quantity"] == "cv"].to_dict("records"):
        same = {"rule": row["rule"], "alpha": row["alpha"]}
        cells = [cell(rule_name(row)), cell(estimate(row)), _joined(cv, "cv_ratio", same)]
        cells += [_joined(alpha, "cosine", same), _joined(alpha, "eta", same)]
        rows.append(cells)
    columns = ["aggregator", "total CV", "CV over grpo's", "cosine with grad J (1: unbiased)", "efficiency η"]
    return Table(caption=caption, columns=columns, rows=rows)


def _joined(table: pd.DataFrame | None, quantity: str, same: dict[str, Any]) -> Cell:
    if table is None:
        return cell(NONE)
    found = table[(table["quantity"] == quantity) & (table["rule"] == same["rule"])]
    alpha = same["alpha"]
    found = found[found["alpha"].isna()] if pd.isna(alpha) else found[np.isclose(found["alpha"].astype(float), alpha)]
    return cell(estimate(found.iloc[0])) if len(found) else cell(NONE)
