"""Figure 5: low against high variance, measured: updates of two rules around their mean, two dimensions of the Gram.

The updates of disjoint groups of one prompt, each rule scaled so that its mean update has length 1, are placed by
classical scaling of their inner products: the two directions in which the updates of both rules together vary most.
What share of the variance is shown stands in each panel.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray

from analyses.script import advantage_of, main, whole_target
from gradvar import GradvarError, Run
from gradvar.estimators import find_rule
from gradvar.estimators.groups import draw_groups, group_coefficients, group_moments
from gradvar.figures import panels, rule_label
from gradvar.figures.aggregators import RULE_COLOURS
from gradvar.figures.style import MUTED
from gradvar.runs import PromptScores

RULES: tuple[tuple[str, float | None], ...] = (("vl_norm", 1.0), ("dapo", None))
PERMUTATIONS = 512
SHOWN = 24
"""Permutations whose groups are drawn."""

Array = NDArray[np.float64]


def compute(run: Run) -> pd.DataFrame:
    """Return the updates of both rules on the prompt whose signal is best resolved.

    Columns: rule, alpha, series ("update", "mean update", "no update"), x, y (in lengths of the mean update), and for
    each rule group_size, cv (of all directions), shown (share of the updates' variance in this plane), prompt_id.
    """
    config = run.options("cv")
    best: tuple[float, PromptScores, list[float], list[Array], list[float]] | None = None
    for whole in run.scores(whole_target(run)):
        scores = whole.verified()
        if len(scores.lengths) < 3 * config.group_size or np.ptp(scores.rewards) == 0:
            continue
        rng = np.random.default_rng([config.seed, 5])
        groups = draw_groups(len(scores.lengths), config.group_size, PERMUTATIONS, rng=rng)
        limit = float(scores.max_length)
        made, cvs, scales = [], [], []
        for rule, alpha in RULES:
            found = find_rule(rule)
            weights = group_coefficients(
                groups,
                scores.rewards,
                scores.lengths,
                found,
                advantage=advantage_of(run),
                alpha=alpha,
                max_length=limit if found.takes_max_length else None,
            )
            moments = group_moments(scores.gram, groups, weights)
            cvs.append(math.sqrt(moments.same / moments.cross - 1) if moments.cross > 0 else math.nan)
            scales.append(math.sqrt(max(moments.cross, 0.0)))
            made.append(_spread(groups, weights, len(scores.lengths)))
        if any(map(math.isnan, cvs)):
            continue
        if best is None or max(cvs) < best[0]:
            best = (max(cvs), scores, scales, made, cvs)
    if best is None:
        raise GradvarError(
            f"no prompt of {run.path} has a signal above the noise: sample more "
            f"(`gradvar sample {run.path} --rollouts N`)"
        )
    _, scores, scales, made, cvs = best
    return _placed(scores, scales, made, cvs, config.group_size)


def _spread(groups: NDArray[np.intp], weights: Array, n: int) -> Array:
    """Return (P B, N): each group's coefficients over all responses."""
    flat = groups.reshape(-1, groups.shape[-1])
    out = np.zeros((len(flat), n))
    np.put_along_axis(out, flat, weights.reshape(flat.shape), axis=1)
    return out


def _placed(scores: PromptScores, scales: list[float], made: list[Array], cvs: list[float], size: int) -> pd.DataFrame:
    shown = SHOWN * (len(scores.lengths) // size)
    updates = [rows / scale for rows, scale in zip(made, scales, strict=True)]
    means = [rows.mean(axis=0) for rows in updates]
    drawn = np.concatenate([rows[:shown] for rows in updates])
    centred = np.concatenate([rows[:shown] - mean for rows, mean in zip(updates, means, strict=True)])
    products = centred @ scores.gram @ centred.T
    values, vectors = np.linalg.eigh(products)
    axes = vectors[:, -2:][:, ::-1] / np.sqrt(values[-2:][::-1])  # coefficients of two orthonormal directions
    directions = axes.T @ centred @ scores.gram  # (2, N): what a response adds to each coordinate
    rows = []
    for index, (rule, alpha) in enumerate(RULES):
        part = slice(index * shown, (index + 1) * shown)
        seen = float(np.square(centred[part] @ directions.T).sum() / np.trace(products[part, part]))
        labels = {
            "prompt_id": scores.prompt_id,
            "rule": rule,
            "alpha": math.nan if alpha is None else alpha,
            "group_size": size,
            "cv": cvs[index],
            "shown": seen,
        }
        placed = {
            "update": drawn[part] @ directions.T,
            "mean update": (means[index] @ directions.T)[None],
            "no update": np.zeros((1, 2)),
        }
        rows += [{**labels, "series": series, "x": x, "y": y} for series, points in placed.items() for x, y in points]
    return pd.DataFrame(rows)


def draw(data: pd.DataFrame) -> Figure:
    """Draw one panel a rule on common axes."""
    figure = panels(len(RULES), columns=2)
    figure.set_size_inches(8, 3.6)
    spans = [(data[name].min() - 0.2, data[name].max() + 0.2) for name in ("x", "y")]
    for axes, (rule, alpha) in zip(figure.axes, RULES, strict=True):
        rows = data[(data["rule"] == rule) & (data["alpha"].isna() if alpha is None else data["alpha"] == alpha)]
        colour = RULE_COLOURS.get(rule, MUTED)
        points, mean = rows[rows["series"] == "update"], rows[rows["series"] == "mean update"].iloc[0]
        axes.scatter(points["x"], points["y"], s=9, color=colour, alpha=0.35, linewidths=0, label="one update")
        axes.plot([0, mean["x"]], [0, mean["y"]], color="#222222", linewidth=1.6)
        axes.plot(mean["x"], mean["y"], "o", color="#222222", markersize=5, label="mean update")
        axes.plot(0, 0, "+", color="#222222", markersize=9, label="no update")
        axes.set_xlim(spans[0])
        axes.set_ylim(spans[1])
        axes.set_aspect("equal")
        axes.set_xlabel("first direction (1: the mean update)")
        axes.set_ylabel("second direction")
        axes.set_title(
            f"{rule_label(rule, alpha)}: CV {mean['cv']:.2f}\n{100 * mean['shown']:.0f}% of the variance in this plane"
        )
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(handles))
    figure.suptitle(
        f"prompt {data['prompt_id'].iloc[0]}, groups of {data['group_size'].iloc[0]}, mean updates of length 1",
        fontsize=9.5,
    )
    return figure


if __name__ == "__main__":
    main(__file__, __doc__, compute, draw)
