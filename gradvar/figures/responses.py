"""The responses themselves: lengths, rewards, prompts, and log-probabilities under sampler and policy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from gradvar.figures.length_law import reward_classes
from gradvar.figures.style import COLOURS, INK, MUTED, plain_log_ticks

MOST_BARS = 8
"""With more different rewards than this, a histogram."""
NAMED = 10
"""Up to this many prompts carry their names."""


def plot_lengths(
    axes: Axes,
    lengths: NDArray[np.float64],
    rewards: NDArray[np.float64] | None = None,
    *,
    limit: float | None = None,
    title: str = "",
) -> None:
    """Plot how long responses are, by reward class, on a logarithmic axis.

    Args:
        axes: Where to draw.
        lengths: (N,) tokens.
        rewards: (N,) above 0 is rewarded, NaN unverified.
        limit: The longest response allowed, in tokens.
        title: Above the panel.
    """
    low, high = float(lengths.min()), float(lengths.max())
    edges = np.geomspace(low, high + 1, min(30, max(8, int(np.sqrt(len(lengths))))) + 1)
    bins = np.unique(edges.round()) - 0.5  # lengths are whole: a narrower bin would stand empty
    classes = {name: c for name, c in reward_classes(rewards, len(lengths)).items() if c[0].any()}
    axes.hist(
        [lengths[members] for members, _, _ in classes.values()],
        bins=list(bins),
        stacked=True,
        color=[colour for _, colour, _ in classes.values()],
        label=list(classes),
        alpha=0.85,
    )
    axes.set_xscale("log")
    if limit is not None and limit <= 3 * high:
        axes.axvline(limit, color=INK, linewidth=0.9, linestyle="--", label=f"limit of {limit:g} tokens")
    plain_log_ticks(axes, low, max(high, limit or 0.0) if limit is not None and limit <= 3 * high else high)
    axes.set_xlabel("response length (tokens)")
    axes.set_ylabel("responses")
    axes.set_title(title, parse_math=False)


def plot_rewards(axes: Axes, rewards: NDArray[np.float64], *, title: str = "") -> None:
    """Plot how often each reward came; unverified responses stand apart.

    Args:
        axes: Where to draw.
        rewards: (N,) NaN where unverified.
        title: Above the panel.
    """
    known = rewards[~np.isnan(rewards)]
    values, counts = np.unique(known, return_counts=True)
    if len(values) <= MOST_BARS:
        names = [f"{value:g}" for value in values]
        heights = [*counts]
        colours = [COLOURS[0] if value > 0 else COLOURS[1] for value in values]
        if len(known) < len(rewards):
            names, heights, colours = [*names, "unverified"], [*heights, len(rewards) - len(known)], [*colours, MUTED]
        bars = axes.bar(range(len(names)), heights, color=colours, width=0.6, alpha=0.85)
        axes.bar_label(bars, [f"{h / len(rewards):.0%}" for h in heights], fontsize=8)
        axes.set_xticks(range(len(names)), names)
        axes.set_xlim(-0.7, len(names) - 0.3)
        axes.grid(axis="x", visible=False)
        axes.margins(y=0.12)
    else:
        axes.hist(known, bins=20, color=COLOURS[0], alpha=0.85)
        if len(known) < len(rewards):
            axes.text(
                0.03, 0.97, f"{len(rewards) - len(known)} unverified", transform=axes.transAxes, va="top", fontsize=8
            )
    axes.set_xlabel("reward")
    axes.set_ylabel("responses")
    axes.set_title(title, parse_math=False)


def plot_prompts(
    axes: Axes,
    names: Sequence[str],
    lengths: Sequence[NDArray[np.float64]],
    rewards: Sequence[NDArray[np.float64]],
    *,
    title: str = "",
) -> None:
    """Plot each prompt's mean reward over its median length, with the middle half of its lengths.

    Args:
        axes: Where to draw.
        names: K prompts.
        lengths: K arrays (N,), tokens.
        rewards: K arrays (N,), NaN where unverified; a prompt without any verified response is left out.
        title: Above the panel.
    """
    ends: list[float] = []
    for name, long, reward in zip(names, lengths, rewards, strict=True):
        known = reward[~np.isnan(reward)]
        if not known.size:
            continue
        low, middle, high = np.quantile(long, (0.25, 0.5, 0.75))
        axes.plot([low, high], [known.mean()] * 2, color=COLOURS[5], linewidth=2)
        axes.plot([middle], [known.mean()], "o", color=COLOURS[0], markersize=5)
        ends += [float(low), float(high)]
        if len(names) <= NAMED:
            axes.annotate(
                name if len(name) <= 10 else name[:9] + "…",
                (middle, known.mean()),
                xytext=(0, 5),
                textcoords="offset points",
                fontsize=7,
                ha="center",
                parse_math=False,
            )
    if ends:
        axes.set_xscale("log")
        plain_log_ticks(axes, min(ends), max(ends))
    axes.margins(y=0.1)
    axes.set_xlabel("median length, middle half (tokens)")
    axes.set_ylabel("mean reward")
    axes.set_title(title, parse_math=False)


def plot_log_probs(
    axes: Axes, sampler: NDArray[np.float64], policy: NDArray[np.float64], *, title: str = "", note: str = ""
) -> None:
    """Plot the tokens' log-probabilities under the policy against those under the sampler; they belong on the diagonal.

    Args:
        axes: Where to draw.
        sampler: (T,) nats, all tokens compared.
        policy: (T,) nats.
        title: Above the panel.
        note: One line inside the panel.
    """
    held = np.isfinite(sampler) & np.isfinite(policy)
    low = float(min(sampler[held].min(), policy[held].min(), -1e-3))
    axes.plot([low, 0], [low, 0], color=INK, linewidth=0.8, linestyle="--", label="equal")
    axes.hexbin(
        sampler[held],
        policy[held],
        gridsize=45,
        bins="log",
        mincnt=1,
        cmap="viridis_r",
        extent=(low, 0, low, 0),
        linewidths=0.1,
        rasterized=True,
    )
    axes.set_xlabel("log-probability, sampler (nats)")
    axes.set_ylabel("log-probability, policy (nats)")
    axes.set_title(title, parse_math=False)
    if note:
        axes.text(0.03, 0.97, note, transform=axes.transAxes, va="top", fontsize=8)
