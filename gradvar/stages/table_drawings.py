"""Figures of the estimate tables: aggregators, alpha, group size, assumptions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from gradvar.figures import (
    FORMS,
    Drawing,
    NotDrawn,
    Panel,
    plot_aggregator_cv,
    plot_alpha_curve,
    plot_audit,
    plot_bias_noise,
    plot_cv_forms,
    plot_efficiency,
    plot_group_size,
    plot_pressure,
    plot_token_covariance,
    tall,
)
from gradvar.report.numbers import rule_name
from gradvar.runs import target_label
from gradvar.runs.rows import ALL_RESPONSES, overall
from gradvar.stages.held import Held

Drawn = list[Drawing | NotDrawn]
JUDGED = (
    "identity_signal",
    "token_covariance_share",
    "deviation_exponent",
    "within_exponent",
    "baseline_ratio",
    "between_length_share",
)
"""Quantities of the audit that carry a verdict."""


def aggregators(held: Held) -> Drawn:
    """Total CV of every aggregator."""
    title = "Noise: the aggregators' total CV"
    if why := held.why_not("cv"):
        return [NotDrawn(stem="aggregator_cv", title=title, why=why)]
    rows = _rows(held, "cv", "cv")
    return _drawing(
        held, rows, "aggregator_cv", title, plot_aggregator_cv,
        "The coefficient of variation of each aggregator's update, with intervals; lower is less noise.",
        lines=rows[["rule", "alpha"]].drop_duplicates().shape[0],
    )  # fmt: skip


def cv_forms(held: Held) -> Drawn:
    """CV over grpo's, in the three forms."""
    title = "The CV in its three forms, over grpo's"
    if why := held.why_not("forms"):
        return [NotDrawn(stem="cv_forms", title=title, why=why)]
    rows = _rows(held, "forms", *FORMS)
    rows = rows[rows["against"] == "grpo"] if "against" in rows else rows
    return _drawing(
        held, rows, "cv_forms", title, plot_cv_forms,
        "Ratio of each aggregator's CV to grpo's: by the paper's formula, given the lengths with the measured "
        "variance, and in total.",
        lines=int(1.4 * rows[["rule", "alpha"]].drop_duplicates().shape[0]),
    )  # fmt: skip


def bias_noise(held: Held) -> Drawn:
    """Bias against noise."""
    title = "Bias against noise"
    if why := held.why_not("alpha", "cv"):
        return [NotDrawn(stem="bias_noise", title=title, why=why)]
    rows = pd.concat([_rows(held, "alpha", "cosine"), _rows(held, "cv", "cv")], ignore_index=True)

    def plot(axes: Axes, *, rows: pd.DataFrame, title: str) -> None:
        plot_bias_noise(axes, rows[rows["quantity"] == "cosine"], rows[rows["quantity"] == "cv"], title=title)

    return _drawing(
        held, rows, "bias_noise", title, plot,
        "Cosine of each aggregator's mean update with the gradient of the expected reward, over its total CV.",
    )  # fmt: skip


def efficiency(held: Held) -> Drawn:
    """Efficiency of every aggregator."""
    title = "Efficiency: bias and noise in one figure"
    if why := held.why_not("alpha"):
        return [NotDrawn(stem="efficiency", title=title, why=why)]
    rows = _compared_alphas(held, _rows(held, "alpha", "eta"))
    return _drawing(
        held, rows, "efficiency", title, plot_efficiency,
        "The efficiency of one update of each aggregator, with intervals; higher is better.",
        lines=rows[["rule", "alpha"]].drop_duplicates().shape[0],
    )  # fmt: skip


def alpha_curves(held: Held) -> Drawn:
    """Efficiency over alpha."""
    title = "Which alpha: efficiency of vl_norm over alpha"
    if why := held.why_not("alpha"):
        return [NotDrawn(stem="alpha_curve", title=title, why=why)]
    table = held.table("alpha")
    rows = _rows(held, "alpha", "eta", "alpha_star_eta") if table is not None else pd.DataFrame()
    return _drawing(
        held, rows, "alpha_curve", title, plot_alpha_curve,
        "Efficiency over alpha with its band, the other aggregators as level lines; the alphas not told apart from the "
        "best are shaded.",
    )  # fmt: skip


def pressure(held: Held) -> Drawn:
    """What each aggregator's update does to length and entropy."""
    title = "Pressure on length and entropy"
    if why := held.why_not("alpha"):
        return [NotDrawn(stem="pressure", title=title, why=why)]
    rows = _compared_alphas(held, _rows(held, "alpha", "length_pressure", "entropy_pressure"))
    rows = overall(rows)
    panels, lines = [], rows[["rule", "alpha"]].drop_duplicates().shape[0]
    for quantity, words in (("length_pressure", "length"), ("entropy_pressure", "entropy")):
        if (rows["quantity"] == quantity).any():
            draw = partial(plot_pressure, rows=rows, quantity=quantity, title=f"{words}: {target_label(held.last)}")
            panels.append(Panel(draw=draw, height=tall(lines)))
    if not panels:
        return [_silent("pressure", title)]
    alt = "Change of mean length (tokens) and of entropy (nats) for one unit of expected reward gained, by aggregator."
    return [Drawing(stem="pressure", title=title, alt=alt, panels=panels, numbers=rows)]


def group_sizes(held: Held) -> Drawn:
    """CV and efficiency against group size."""
    title = "Noise and efficiency against group size"
    if why := held.why_not("planning"):
        return [NotDrawn(stem="group_size", title=title, why=why)]
    rows = overall(_rows(held, "planning", "cv", "eta"))
    rows = rows[rows["group_size"].notna()]
    by_rule = {str(rule): own for rule, own in rows.groupby(rows.apply(rule_name, axis=1), sort=False)}
    panels = [
        Panel(
            draw=partial(
                plot_group_size, rows=own, quantity=quantity, title=f"{name} of {rule}: {target_label(held.last)}"
            )
        )
        for rule, own in by_rule.items()
        for quantity, name in (("cv", "noise"), ("eta", "efficiency"))
        if (own["quantity"] == quantity).any()
    ]
    if not panels:
        return [_silent("group_size", title)]
    alt = (
        f"CV and efficiency of {' and '.join(by_rule)} against the number of responses in a group; extrapolated sizes "
        "are hollow."
    )
    return [Drawing(stem="group_size", title=title, alt=alt, panels=panels, numbers=rows)]


def audit(held: Held) -> Drawn:
    """Every assumption in units of its margin."""
    title = "The assumptions at a glance"
    if why := held.why_not("audit"):
        return [NotDrawn(stem="audit", title=title, why=why)]
    rows = judged(held)
    words = {"deviation_exponent": "2 proportional: deviation", "within_exponent": "2 proportional: within-length"}
    short = {0: "0 from this policy", 1: "1 tokens uncorrelated", 3: "3 independent", 4: "4 mean free of length"}
    labels = [
        words.get(str(quantity), short.get(int(number), str(number)))
        for quantity, number in zip(rows["quantity"], rows["assumption"], strict=True)
    ]
    shown = rows.assign(label=labels)
    draw = partial(plot_audit, rows=shown, title=target_label(held.last))
    alt = "Each assumption's estimate and interval in units of its margin; inside the grey band it is supported."
    panel = Panel(draw=draw, width=4.6, height=tall(len(rows)))
    return [Drawing(stem="audit", title=title, alt=alt, panels=[panel], numbers=rows)]


def judged(held: Held) -> pd.DataFrame:
    """Return the audit's judged rows over all prompts for all targets together."""
    table = held.table("audit")
    if table is None:
        return pd.DataFrame()
    rows = table[table["quantity"].isin(JUDGED) & (table["target"] == held.last)]
    rows = rows[rows["scope"].isna() | (rows["scope"] == ALL_RESPONSES)]
    return pd.concat([overall(part) for _, part in rows.groupby("quantity", sort=False)]) if len(rows) else rows


def token_covariance(held: Held) -> Drawn:
    """Share of the squared score that comes from pairs of tokens."""
    title = "Covariance between tokens"
    table = held.table("audit")
    if not held.run.taus():
        run = held.run.path
        why = f"no tau in this run: `gradvar measure {run} --probes 4`, then `gradvar audit {run}` makes it"
        return [NotDrawn(stem="token_covariance", title=title, why=why)]
    if table is None:
        return [NotDrawn(stem="token_covariance", title=title, why=str(held.why_not("audit")))]
    rows = table[(table["quantity"] == "token_covariance_share") & (table["target"] == held.last)]
    rows = _with_lengths(rows[rows["value"].notna()])
    if rows.empty:
        why = f"tau was measured after the last audit: `gradvar audit {held.run.path}` takes it in"
        return [NotDrawn(stem="token_covariance", title=title, why=why)]
    margin = float(rows["margin_high"].iloc[0])
    draw = partial(plot_token_covariance, rows=rows, margin=margin, title=target_label(held.last))
    alt = "Share of the squared score norm from pairs of tokens, by length and reward; grey: within the margin."
    return [Drawing(stem="token_covariance", title=title, alt=alt, panels=[Panel(draw=draw)], numbers=rows)]


def _with_lengths(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows over all prompts with the lengths that the prompts' own bins span."""
    whole = overall(rows)
    ends = rows.groupby("scope").agg(length_low=("length_low", "min"), length_high=("length_high", "max"))
    return whole.assign(**{name: whole["scope"].map(ends[name]) for name in ends.columns})


def _rows(held: Held, table: str, *quantities: str) -> pd.DataFrame:
    found = held.table(table)
    if found is None:
        return pd.DataFrame()
    return found[found["quantity"].isin(quantities) & (found["target"] == held.last) & found["rule"].notna()]


def _compared_alphas(held: Held, rows: pd.DataFrame) -> pd.DataFrame:
    """Keep of the fine grid the alphas that the other tables compare."""
    return rows[rows["alpha"].isna() | np.isin(rows["alpha"].to_numpy(dtype=float), [0.0, *held.options("cv").alphas])]


def _drawing(
    held: Held,
    rows: pd.DataFrame,
    stem: str,
    title: str,
    plot: Callable[..., None],
    alt: str,
    *,
    lines: int = 0,
) -> Drawn:
    """One panel over all prompts, and one for each of the first."""
    parts: list[tuple[str, pd.DataFrame]] = []
    if rows["prompt_id"].isna().any():
        pooled: Sequence[Any] = [overall(part) for _, part in rows.groupby("quantity", sort=False)]
        parts.append(("all prompts", pd.concat(pooled)))
    parts += [(f"prompt {prompt}", rows[rows["prompt_id"] == prompt]) for prompt in held.shown]
    parts = [(name, part) for name, part in parts if len(part)]
    if not parts:
        return [_silent(stem, title)]
    sizes = rows["group_size"].dropna()
    of = f", n = {sizes.iloc[0]}" if len(sizes) else ""
    panels = [
        Panel(draw=partial(plot, rows=part, title=f"{name}: {target_label(held.last)}{of}"), height=tall(lines))
        for name, part in parts
    ]
    numbers = pd.concat([part for _, part in parts], ignore_index=True)
    return [Drawing(stem=stem, title=title, alt=alt, panels=panels, numbers=numbers)]


def _silent(stem: str, title: str) -> NotDrawn:
    why = "nothing to compare: every reward is equal within its prompt, or there are too few verified responses"
    return NotDrawn(stem=stem, title=title, why=f"{why}; more rollouts (`gradvar sample`) may help")
