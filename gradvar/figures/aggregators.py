"""Aggregators: noise in its three forms, bias, efficiency, what they push."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from gradvar.figures.estimates import plot_estimates
from gradvar.figures.style import BAND, COLOURS, MUTED

RULE_COLOURS = {"grpo": COLOURS[0], "dapo": COLOURS[1], "dr_grpo": COLOURS[3], "vl_norm": COLOURS[2]}
RULE_MARKERS = {"grpo": "o", "dapo": "^", "dr_grpo": "s", "vl_norm": "D"}
FORMS = {
    "cv_ratio_form_1": "given the lengths, variance taken as V L",
    "cv_ratio_form_2": "given the lengths, measured variance",
    "cv_ratio_form_3": "total, lengths random",
    "cv_ratio": "total, lengths random",
}
"""Quantity of a table to the form of the CV behind it; the tables `forms` and `cv` name the total differently."""


def rule_label(rule: str, alpha: float | None) -> str:
    """Return an aggregator's name for people, with alpha where it has one."""
    return rule if alpha is None or np.isnan(alpha) else f"{rule} α={alpha:g}"


def plot_aggregator_cv(axes: Axes, rows: pd.DataFrame, *, title: str = "") -> None:
    """Plot the CV of each aggregator of one target with its interval.

    Args:
        axes: Where to draw.
        rows: Rows of the table `cv` with one quantity, prompt and target: rule, alpha, value, low, high. A NaN value is
            unresolved: a dotted line from its lower bound says that the CV lies above it.
        title: Above the panel.
    """
    _by_rule(axes, rows, bottom=0.0, label="total CV of the aggregated update", title=title)


def plot_efficiency(axes: Axes, rows: pd.DataFrame, *, title: str = "") -> None:
    """Plot the efficiency eta of each aggregator of one target with its interval.

    Args:
        axes: Where to draw.
        rows: Rows of the table `alpha` of one prompt (or pooled) and target, quantity "eta".
        title: Above the panel.
    """
    _by_rule(axes, rows[rows["rule"].notna()], bottom=0.0, label="efficiency η of one update", title=title)


def plot_pressure(axes: Axes, rows: pd.DataFrame, *, quantity: str = "length_pressure", title: str = "") -> None:
    """Plot what each aggregator's update does to mean length or entropy, for one unit of expected reward gained.

    Args:
        axes: Where to draw.
        rows: Rows of the table `alpha` of one prompt (or pooled) and target.
        quantity: "length_pressure" (tokens) or "entropy_pressure" (nats).
        title: Above the panel.
    """
    unit = {"length_pressure": "tokens of mean length", "entropy_pressure": "nats of entropy"}[quantity]
    chosen = rows[(rows["quantity"] == quantity) & rows["rule"].notna()]
    _by_rule(axes, chosen, line=0.0, label=f"{unit} per unit of reward", title=title)


def plot_cv_forms(axes: Axes, rows: pd.DataFrame, *, title: str = "") -> None:
    """Plot each aggregator's CV over grpo's in the three forms of the CV.

    Args:
        axes: Where to draw.
        rows: Rows of the tables `forms` and `cv` of one prompt (or pooled) and target; the quantities of `FORMS`.
        title: Above the panel.
    """
    chosen = rows[rows["quantity"].isin(FORMS) & rows["rule"].notna()]
    chosen = chosen.assign(form=chosen["quantity"].map(FORMS))
    order = [name for name in dict.fromkeys(FORMS.values()) if name in set(chosen["form"])]
    chosen = chosen.sort_values("form", key=lambda names: names.map(order.index), kind="stable")
    _by_rule(axes, chosen, series="form", line=1.0, label="CV over grpo's CV", title=title)


def plot_bias_noise(axes: Axes, cosines: pd.DataFrame, cvs: pd.DataFrame, *, title: str = "") -> None:
    """Plot bias against noise: cosine of the mean update with grad J over the total CV; grey lines of equal efficiency.

    Args:
        axes: Where to draw.
        cosines: Rows of the table `alpha` of one prompt (or pooled) and target, quantity "cosine".
        cvs: Rows of the table `cv` of the same, quantity "cv". Rules whose CV or cosine is unresolved are counted.
        title: Above the panel.
    """
    both = cvs.merge(cosines, on=["rule", "alpha"], suffixes=("_cv", "_cos"))
    shown = both[both["value_cv"].notna() & both["value_cos"].notna()]
    axes.set_xlabel("total CV (noise)")
    axes.set_ylabel("cosine with grad J (1: unbiased)")
    axes.set_title(title, parse_math=False)
    if shown.empty:
        axes.text(0.5, 0.5, "unresolved:\nno signal above the noise", ha="center", transform=axes.transAxes, fontsize=8)
        return
    right = 1.15 * float(shown["value_cv"].max())
    low = max(-1.0, min(0.8, float(shown["value_cos"].min()) - 0.1))
    _equal_efficiency(axes, right, low)
    for rule, part in shown.sort_values("alpha", na_position="first").groupby("rule", sort=False):
        colour, name = RULE_COLOURS.get(str(rule), MUTED), str(rule)
        for _, row in part.iterrows():
            x, y = float(row["value_cv"]), float(row["value_cos"])
            noise = [min(max(float(row[end]), 0.0), right) for end in ("low_cv", "high_cv")]
            bias = [max(float(row[end]), low) for end in ("low_cos", "high_cos")]
            axes.plot(noise, [y, y], color=colour, linewidth=0.8, alpha=0.55)
            axes.plot([x, x], bias, color=colour, linewidth=0.8, alpha=0.55)
            if pd.notna(row["alpha"]):
                text = f"{row['alpha']:g}"
                axes.annotate(text, (x, y), xytext=(-5, 3), textcoords="offset points", fontsize=7, ha="right")
        name = f"{name} (number: α)" if part["alpha"].notna().any() else name
        marker = RULE_MARKERS.get(str(rule), "o")
        axes.plot(part["value_cv"], part["value_cos"], marker, color=colour, markersize=6, label=name, linestyle="none")
    axes.set_xlim(0, right)
    axes.set_ylim(low, max(1.03, float(shown["value_cos"].max()) + 0.03))
    if len(both) > len(shown):
        axes.text(0.03, 0.96, f"{len(both) - len(shown)} unresolved, not drawn", transform=axes.transAxes, fontsize=7.5)


def _equal_efficiency(axes: Axes, right: float, low: float) -> None:
    grid = np.linspace(0, right, 200)
    for eta in (0.05, 0.1, 0.2, 0.3, 0.5, 0.8):
        curve = np.sqrt(eta * (1 + grid**2))
        inside = (curve <= 1.0) & (curve >= low)
        if inside.sum() < 10:
            continue
        axes.plot(grid[inside], curve[inside], color=MUTED, linewidth=0.7, linestyle=":")
        start = int(np.flatnonzero(inside)[0])
        place = (grid[start], curve[start])
        axes.annotate(f"η={eta:g}", place, xytext=(2, 1), textcoords="offset points", fontsize=6.5, color=MUTED)


def plot_alpha_curve(axes: Axes, rows: pd.DataFrame, *, title: str = "") -> None:
    """Plot the efficiency of vl_norm over alpha with its band, the other rules as level lines.

    Args:
        axes: Where to draw.
        rows: Rows of the table `alpha` of one target and prompt (or pooled): quantity, rule, alpha, value, low, high.
            The alphas not told apart from the best are shaded.
        title: Above the panel.
    """
    eta = rows[(rows["quantity"] == "eta") & rows["rule"].notna()]
    curve = eta[eta["alpha"].notna()].sort_values("alpha")
    axes.set_title(title, parse_math=False)
    axes.set_xlabel("alpha")
    axes.set_ylabel("efficiency of one update")
    if curve["value"].isna().all():
        axes.text(0.5, 0.5, "unresolved:\nno signal above the noise", ha="center", transform=axes.transAxes, fontsize=8)
        return
    best = rows[(rows["quantity"] == "alpha_star_eta") & rows["value"].notna()]
    if len(best):
        low, high = float(best["low"].iloc[0]), float(best["high"].iloc[0])
        axes.axvspan(low, high, color=BAND, alpha=0.6, linewidth=0, label="not told apart from the best")
    axes.plot(curve["alpha"], curve["value"], color=RULE_COLOURS["vl_norm"], linewidth=1.6, label="vl_norm")
    axes.fill_between(
        curve["alpha"], curve["low"], curve["high"], color=RULE_COLOURS["vl_norm"], alpha=0.18, linewidth=0
    )
    for _, row in eta[eta["alpha"].isna()].iterrows():
        colour = RULE_COLOURS.get(str(row["rule"]), MUTED)
        axes.axhline(row["value"], color=colour, linewidth=1.2, linestyle="--", label=str(row["rule"]))
    axes.set_ylim(bottom=min(0.0, *curve["low"].dropna()))


def _by_rule(axes: Axes, rows: pd.DataFrame, *, series: str | None = None, **options: object) -> None:
    labels = [rule_label(str(rule), alpha) for rule, alpha in zip(rows["rule"], rows["alpha"], strict=True)]
    colours = {name: RULE_COLOURS.get(str(rule), MUTED) for name, rule in zip(labels, rows["rule"], strict=True)}
    plot_estimates(
        axes,
        rows.assign(label=labels),
        by="label",
        series=series,
        colours=None if series else colours,
        **options,  # type: ignore[arg-type]
    )
