"""Figures of the variance law: deviation against length, exponents side by side, the atlas of layers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from numpy.typing import NDArray
from scipy.optimize import brentq

from gradvar.estimators import advantages, deviations, variance_share_table
from gradvar.figures import (
    Drawing,
    NotDrawn,
    Panel,
    layer_and_projection,
    plot_atlas,
    plot_exponents,
    plot_length_law,
    tall,
)
from gradvar.runs import SUM, PromptScores, target_label
from gradvar.runs.rows import ALL_RESPONSES, THESE_PROMPTS, overall
from gradvar.stages.held import Held

_WHERE = "where the score's variance lies"
MOST_TARGETS = 12
"""Panels of one figure: the targets first asked for, and their sum; the title says where some are left out."""
EXPONENTS = ("deviation_exponent", "within_exponent")


def length_laws(held: Held) -> list[Drawing | NotDrawn]:
    """Deviation against length: one panel a target, all prompts aligned by their mean deviations."""
    found: list[Drawing | NotDrawn] = []
    for kind in kinds(held):
        drawing = _length_law(held, f"length_law_{kind}", kind, None)
        found += [drawing] if drawing else []
    return found


def length_laws_by_prompt(held: Held) -> list[Drawing | NotDrawn]:
    """Deviation against length of the first prompts alone."""
    if len(held.prompt_ids) < 2:
        return []
    drawings = [
        _length_law(held, f"length_law_{kind}_prompt_{prompt}", kind, prompt)
        for prompt in held.shown
        for kind in kinds(held)
    ]
    return [drawing for drawing in drawings if drawing]


def kinds(held: Held) -> list[str]:
    """Return the advantages the law was fitted for: the score alone, and the run's own."""
    return list(dict.fromkeys(["score", held.options("law").advantage]))


def exponents(held: Held) -> list[Drawing | NotDrawn]:
    """Exponents by target, by reward class and by prompt."""
    title = "Exponents side by side"
    law = held.table("law")
    if law is None:
        return [NotDrawn(stem="exponents", title=title, why=str(held.why_not("law")))]
    law = law[law["quantity"].isin(EXPONENTS)]
    found: list[Drawing | NotDrawn] = []
    for by, words in (("target", "by weight matrix"), ("scope", "by reward class"), ("prompt_id", "prompt by prompt")):
        panels, drawn = [], []
        for kind in kinds(held):
            rows = law[law["advantage"] == kind]
            if by != "target":
                rows = rows[rows["target"] == held.last]
            if by != "scope":
                rows = rows[rows["scope"] == ALL_RESPONSES]
            rows = rows[rows["prompt_id"].notna()] if by == "prompt_id" else overall_of(rows)
            rows = rows[rows["value"].notna()]
            if rows[by].nunique() < 2:
                continue
            draw = partial(
                plot_exponents, rows=rows, by=by, margin=held.options("law").margin, title=gradient_words(kind)
            )
            panels.append(Panel(draw=draw, height=tall(int(1.4 * rows[by].nunique()))))
            drawn.append(rows)
        if panels:
            drawing = Drawing(
                stem=f"exponents_by_{by.removesuffix('_id')}",
                title=f"Exponents {words}",
                alt=f"Fitted exponents with intervals, {words}; the grey band is 1 ± {held.options('law').margin:g}.",
                panels=panels,
                numbers=pd.concat(drawn, ignore_index=True),
            )
            found.append(drawing)
    return found


def overall_of(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows over all prompts, target by target."""
    return pd.concat([overall(part) for _, part in rows.groupby("target", sort=False)]) if len(rows) else rows


def atlas(held: Held) -> list[Drawing | NotDrawn]:
    """Exponent and share of the variance of every layer and projection, as heat maps."""
    title = "Layer by layer"
    law = held.table("law")
    if law is None:
        return [NotDrawn(stem="atlas", title=title, why=str(held.why_not("law")))]
    places = [place for target in held.run.targets if (place := layer_and_projection(target))]
    if len({layer for layer, _ in places}) < 2:
        why = (
            "the run was measured on fewer than two layers: "
            f"`gradvar measure {held.run.path} --targets all:attn --targets all:mlp` and `gradvar fit {held.run.path}` "
            "make it"
        )
        return [NotDrawn(stem="atlas", title=title, why=why)]
    rows = law[(law["scope"] == ALL_RESPONSES) & (law["target"] != SUM) & law["quantity"].isin(EXPONENTS)]
    unfitted = [target for target in held.run.targets if target not in set(rows["target"])]
    if unfitted:
        why = f"{len(unfitted)} targets were measured after the last fit: `gradvar fit {held.run.path}` takes them in"
        return [NotDrawn(stem="atlas", title=title, why=why)]
    layers, across = len({layer for layer, _ in places}), len({name for _, name in places})
    size = {"width": 1.4 + 0.95 * across, "height": max(2.9, 0.9 + (0.5 if layers <= 12 else 0.26) * layers)}
    panels, drawn = [], []
    for kind in kinds(held):
        chosen = overall_of(rows[(rows["advantage"] == kind) & (rows["quantity"] == "within_exponent")])
        if chosen["value"].isna().all():
            continue
        draw = partial(plot_atlas, rows=chosen, centre=1.0, label="exponent, within length", title=gradient_words(kind))
        panels.append(Panel(draw=draw, **size))
        drawn.append(chosen)
    shares = variance_share_table(
        [group for target in held.run.targets for group in held.scores(target)], level=held.options("law").level
    )
    whole = overall(shares)
    draw = partial(plot_atlas, rows=whole, percent=True, label="share of the variance", title=_WHERE)
    panels.append(Panel(draw=draw, **size))
    return [
        Drawing(
            stem="atlas",
            title=title,
            alt="Heat maps by layer and projection: the exponent of variance against length, hatched where it is "
            "undetermined, and the share of the variance of the score.",
            panels=panels,
            numbers=pd.concat([*drawn, whole], ignore_index=True),
        )
    ]


def gradient_words(kind: str) -> str:
    """Return what is weighted, for people."""
    return "score (A = 1)" if kind == "score" else f"gradient, {kind} advantages"


def _length_law(held: Held, stem: str, kind: str, prompt_id: str | None) -> Drawing | NotDrawn | None:
    what = gradient_words(kind)
    title = f"Deviation against length: {what}" + (f", prompt {prompt_id}" if prompt_id else "")
    law = held.table("law")
    if law is None:
        return NotDrawn(stem=stem, title=title, why=str(held.why_not("law")))
    panels, drawn = [], []
    shown = [*held.targets[:-1][: MOST_TARGETS - 1], held.targets[-1]]
    if len(shown) < len(held.targets):
        title += f" ({len(shown) - 1} of {len(held.targets) - 1} targets and their sum)"
    for target in shown:
        groups = [group for group in held.scores(target) if prompt_id in (None, group.prompt_id)]
        rows = law[(law["target"] == target) & (law["advantage"] == kind) & (law["scope"] == ALL_RESPONSES)]
        if len(groups) > 1:
            rows = rows[rows["prompt_id"].isna() & (rows["estimand"] == THESE_PROMPTS)]
        else:
            rows = rows[rows["prompt_id"] == groups[0].prompt_id]
        draw, points = length_panel(target, groups, kind, rows.set_index("quantity"))
        panels.append(Panel(draw=draw))
        drawn.append(points)
    numbers = pd.concat(drawn, ignore_index=True)
    if numbers.empty:
        return None  # every advantage is zero: there is nothing to draw
    alt = (
        "Each response's squared distance from the mean gradient over its length, on logarithmic axes, with the fitted "
        "law and its band, one panel a weight matrix."
    )
    return Drawing(stem=stem, title=title, alt=alt, panels=panels, numbers=numbers)


def length_panel(target: str, groups: Sequence[PromptScores], kind: str, law: pd.DataFrame) -> tuple[Any, pd.DataFrame]:
    """Return what draws one target's deviations against length, and the points.

    Args:
        target: Weight matrix.
        groups: Its prompts.
        kind: "score" or the advantage.
        law: The law's rows by quantity, over all these prompts.
    """
    kept = [group if kind == "score" else group.verified() for group in groups]
    rows = [(group, _deviations(group, kind)) for group in kept if len(group.lengths) >= 3]
    rows = [(group, squares) for group, squares in rows if squares.sum() > 0]
    if not rows:
        return partial(_nothing, title=target_label(target)), pd.DataFrame()
    lengths = np.concatenate([group.lengths for group, _ in rows])
    curve, note = None, ""
    scales = [1.0] * len(rows)
    fitted = law[law["value"].notna()]
    if {"deviation_exponent", "deviation_level"} <= set(fitted.index):
        exponent, level = (fitted.loc[[name]].iloc[0] for name in ("deviation_exponent", "deviation_level"))
        # Prompts differ by a constant each: they are brought together where the law has the pooled level.
        constants = [_constant(group.lengths, squares, exponent, level) for group, squares in rows]
        scales = [float(level["value"]) / constant for constant in constants]
        floor = float(
            np.exp(np.mean([np.log(_floor(squares) * s) for (_, squares), s in zip(rows, scales, strict=True)]))
        )
        grid = np.geomspace(lengths.min(), lengths.max(), 60)
        curve = _curve(exponent, level, grid, shrink=1 - 2 * len(rows) / len(lengths), floor=floor)
        note = (
            f"exponent {exponent['value']:.2f} [{exponent['low']:.2f}, {exponent['high']:.2f}]\n{exponent['verdict']}"
        )
    symbol = "s" if kind == "score" else "g"
    squares = np.concatenate([squares * scale for (_, squares), scale in zip(rows, scales, strict=True)])
    rewards = np.concatenate([group.rewards for group, _ in rows])
    truncated = np.concatenate([group.truncated for group, _ in rows])
    draw = partial(
        plot_length_law,
        lengths=lengths,
        squares=squares,
        curve=curve,
        rewards=rewards,
        truncated=truncated,
        label=rf"$\|{symbol}_i - \bar {symbol}\|^2$"
        + ("" if kind == "score" else f", {kind}")
        + ("\nprompts aligned" if len(groups) > 1 else ""),
        title=target_label(target),
        note=note,
    )
    points = pd.DataFrame(
        {
            "target": target,
            "prompt_id": np.repeat([group.prompt_id for group, _ in rows], [len(group.lengths) for group, _ in rows]),
            "length": lengths.astype(int),
            "reward": rewards,
            "truncated": truncated,
            "deviation": squares,
        }
    )
    return draw, points


def _nothing(axes: Axes, *, title: str) -> None:
    axes.set_title(title, parse_math=False)
    axes.text(0.5, 0.5, "every advantage is zero", ha="center", transform=axes.transAxes)


def _floor(squares: NDArray[np.float64]) -> float:
    """Return vbar/N: what the noise of the mean gradient adds to every deviation; sum D = (N - 1) vbar."""
    return float(squares.sum() / (len(squares) - 1) / len(squares))


def _constant(lengths: NDArray[np.float64], squares: NDArray[np.float64], exponent: Any, level: Any) -> float:
    """Return one prompt's v at the reference length under the pooled exponent: mean of D / fitted D is 1."""
    shape = (1 - 2 / len(lengths)) * (lengths / float(level["reference_length"])) ** float(exponent["value"])
    floor = _floor(squares)
    ratio = squares / shape
    if np.mean(squares / floor) <= 1:
        return float(ratio.mean())
    top = 2 * float(ratio.max())
    return float(brentq(lambda c: float(np.mean(squares / (c * shape + floor))) - 1, 0.0, top))


def _curve(exponent: Any, level: Any, grid: NDArray[np.float64], *, shrink: float, floor: float) -> pd.DataFrame:
    """Return the fitted mean of D, (1 - 2/N) v(L) + vbar/N, and its pointwise band.

    Level and exponent have uncorrelated errors, so those of log v(L) add in squares.
    """
    steps = np.log(grid / float(level["reference_length"]))
    middle = np.log(float(level["value"])) + float(exponent["value"]) * steps
    half = np.hypot(
        np.log(float(level["high"]) / float(level["value"])),
        (float(exponent["high"]) - float(exponent["value"])) * steps,
    )
    columns = {"value": middle, "low": middle - half, "high": middle + half}
    return pd.DataFrame({"length": grid, **{name: shrink * np.exp(v) + floor for name, v in columns.items()}})


def _deviations(group: PromptScores, kind: str) -> NDArray[np.float64]:
    if kind == "score":
        return deviations(group.gram)
    return deviations(group.gram, advantages(group.rewards, kind, lengths=group.lengths))
