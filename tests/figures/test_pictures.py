"""Histograms, curves and maps hold what was given."""

import numpy as np
import pandas as pd
import pytest

from gradvar.figures import (
    layer_and_projection,
    panels,
    plot_atlas,
    plot_lengths,
    plot_log_probs,
    plot_prefix_curves,
    plot_prompts,
    plot_rewards,
    plot_token_covariance,
)


@pytest.fixture
def axes():
    return panels(1).axes[0]


def test_every_response_is_in_the_histogram_of_its_class(axes):
    lengths = np.array([2.0, 3.0, 5.0, 40.0, 300.0, 900.0])
    rewards = np.array([1.0, 0.0, 0.0, np.nan, 1.0, 0.0])
    plot_lengths(axes, lengths, rewards, limit=1024)
    heights = [sum(bar.get_height() for bar in bars) for bars in axes.containers]
    assert heights == [2, 3, 1]
    handles = axes.get_legend_handles_labels()[1]
    assert set(handles) == {"rewarded", "not rewarded", "unverified", "limit of 1024 tokens"}


def test_equal_lengths_and_a_far_limit(axes):
    plot_lengths(axes, np.full(8, 7.0), None, limit=4096)
    assert sum(bar.get_height() for bar in axes.containers[0]) == 8
    assert axes.get_legend_handles_labels()[1] == ["responses"]


def test_rewards_as_bars_or_as_a_histogram(axes):
    plot_rewards(axes, np.array([0.0, 0.0, 1.0, np.nan]))
    assert [bar.get_height() for bar in axes.patches] == [2, 1, 1]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1", "unverified"]
    other = panels(1).axes[0]
    plot_rewards(other, np.append(np.linspace(0, 1, 50), np.nan))
    assert sum(bar.get_height() for bar in other.patches) == 50
    assert other.texts[0].get_text() == "1 unverified"


def test_prompts_by_median_length_and_mean_reward(axes):
    lengths, rewards = [np.array([10.0, 20.0, 30.0])] * 2, [np.array([0.0, 1.0, np.nan]), np.full(3, np.nan)]
    plot_prompts(axes, ["$a", "none verified"], lengths, rewards)
    points = [line for line in axes.lines if line.get_marker() == "o"]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in points] == [(20.0, 0.5)]
    axes.figure.draw_without_rendering()  # a name with a dollar is no formula


def test_log_probs_on_the_diagonal(axes):
    sampler = np.array([-1.0, -2.0, -np.inf])
    plot_log_probs(axes, sampler, np.array([-1.0, -2.5, -1.0]), note="n")
    counts = axes.collections[0].get_array()
    assert counts.sum() == 2
    assert list(axes.lines[0].get_xdata()) == list(axes.lines[0].get_ydata()) == [-2.5, 0]


def test_prefix_curves_end_at_the_whole_response(axes):
    lengths = np.array([[2.0, 4.0, 8.0], [10.0, 20.0, 40.0], [1.0, np.nan, 2.0]])
    squares = np.array([[1.0, 2.0, 4.0], [3.0, 9.0, 27.0], [0.0, np.nan, 5.0]])
    plot_prefix_curves(axes, lengths, squares, note="gamma 1")
    ends = next(line for line in axes.lines if line.get_label() == "whole responses")
    assert set(zip(ends.get_xdata(), ends.get_ydata(), strict=True)) == {(8.0, 4.0), (40.0, 27.0), (2.0, 5.0)}


def test_token_covariance_by_class(axes):
    rows = pd.DataFrame(
        [
            {"scope": s, "value": v, "low": v - 0.1, "high": v + 0.1, "length_low": 4, "length_high": 400}
            for s, v in (("all responses", 0.0), ("reward 0, length bin 1 of 2", 0.3))
        ]
    )
    plot_token_covariance(axes, rows, margin=0.2)
    assert axes.get_legend_handles_labels()[1] == ["all responses", "reward 0"]
    assert axes.patches[0].get_height() == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("target", "place"),
    [
        ("model.layers.3.self_attn.q_proj", (3, "q")),
        ("model.layers.12.mlp.down_proj", (12, "down")),
        ("model.layers.0.self_attn.qkv_proj:k", (0, "k")),
        ("lm_head", None),
        ("sum", None),
    ],
)
def test_where_a_target_stands_in_the_atlas(target, place):
    assert layer_and_projection(target) == place


def test_the_atlas_holds_every_target_and_hatches_the_open_ones(axes):
    rows = pd.DataFrame(
        [
            {"target": f"model.layers.{layer}.self_attn.{name}_proj", "value": value, "low": 0.5, "high": 1.5}
            | {"verdict": "undetermined" if value > 1 else "proportional to length"}
            for layer, name, value in ((0, "k", 0.9), (0, "q", 1.1), (2, "q", 1.4))
        ]
        + [{"target": "sum", "value": 5.0, "low": 4.0, "high": 6.0, "verdict": None}]
    )
    plot_atlas(axes, rows, centre=1.0, label="exponent")
    drawn = np.asarray(axes.images[0].get_array())
    assert drawn.shape == (2, 2)
    assert drawn[0, 0] == 1.1
    assert drawn[1, 0] == 1.4
    assert [label.get_text() for label in axes.get_xticklabels()] == ["q", "k"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "2"]
    assert sum(patch.get_hatch() == "///" for patch in axes.patches) == 2
    texts = {text.get_text() for text in axes.texts}
    assert "1.40\n0.50 – 1.50" in texts
    assert "–" in texts
