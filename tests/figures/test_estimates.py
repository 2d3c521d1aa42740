"""Points stand where the rows say; open ends, open verdicts and missing numbers show as such."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgba

from gradvar.figures import (
    Panel,
    compose,
    panels,
    plot_audit,
    plot_bias_noise,
    plot_cv_forms,
    plot_efficiency,
    plot_estimates,
    plot_exponents,
    plot_group_size,
    plot_pressure,
)


@pytest.fixture
def axes():
    return panels(1).axes[0]


def dots(axes):
    """(x, y, hollow) of every drawn point."""
    return [
        (line.get_xdata()[0], line.get_ydata()[0], line.get_markerfacecolor() == "none")
        for line in axes.lines
        if line.get_marker() == "o" and len(line.get_xdata()) == 1
    ]


def arrows(axes, marker):
    return [line for line in axes.lines if line.get_marker() == marker]


def frame(*rows):
    return pd.DataFrame([{"rule": None, "alpha": np.nan, "verdict": None, **row} for row in rows])


def test_values_intervals_and_open_verdicts(axes):
    rows = frame(
        {"name": "a", "value": 1.0, "low": 0.5, "high": 1.5, "verdict": "supported"},
        {"name": "b", "value": 2.0, "low": 1.0, "high": 3.0, "verdict": "undetermined"},
    )
    plot_estimates(axes, rows, by="name", line=0.0, band=(-1, 1), label="x", title="t")
    assert dots(axes) == [(1.0, 0.0, False), (2.0, 1.0, True)]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
    bars = [list(line.get_xdata()) for line in axes.lines if line.get_linewidth() == 2.2]
    assert bars == [[0.5, 1.5], [1.0, 3.0]]
    assert not arrows(axes, ">")


def test_a_far_end_is_an_arrow_and_does_not_squeeze_the_rest(axes):
    rows = frame(
        {"name": "a", "value": 1.0, "low": 0.9, "high": 1.1},
        {"name": "b", "value": 2.0, "low": 1.0, "high": 500.0},
        {"name": "c", "value": 1.5, "low": -np.inf, "high": np.inf},
    )
    plot_estimates(axes, rows, by="name")
    assert axes.get_xlim()[1] < 10
    assert [line.get_ydata()[0] for line in arrows(axes, ">")] == [1.0, 2.0]
    assert [line.get_ydata()[0] for line in arrows(axes, "<")] == [2.0]


def test_unresolved_and_missing_numbers_are_said(axes):
    rows = frame(
        {"name": "a", "value": 1.0, "low": 0.9, "high": 1.1},
        {"name": "b", "value": np.nan, "low": 1.4, "high": np.inf, "verdict": "unresolved"},
        {"name": "c", "value": np.nan, "low": np.nan, "high": np.nan},
    )
    plot_estimates(axes, rows, by="name")
    assert [text.get_text().strip() for text in axes.texts] == ["unresolved", "not estimated"]
    dotted = [line for line in axes.lines if line.get_linestyle() == ":"]
    assert dotted[0].get_xdata()[0] == 1.4


def test_nothing_estimated_at_all_is_an_empty_panel_that_says_so(axes):
    rows = frame({"name": "a", "value": np.nan, "low": np.nan, "high": np.nan})
    plot_estimates(axes, rows, by="name", bottom=0.0)
    assert axes.texts[0].get_text() == "not estimated"


def test_exponents_of_both_kinds_stand_side_by_side(axes):
    rows = frame(
        {"quantity": "deviation_exponent", "scope": "reward 0", "value": 1.0, "low": 0.8, "high": 1.2},
        {"quantity": "within_exponent", "scope": "reward 0", "value": 2.0, "low": 1.8, "high": 2.2},
        {"quantity": "deviation_curvature", "scope": "reward 0", "value": 9.0, "low": 8.0, "high": 10.0},
    )
    plot_exponents(axes, rows, by="scope", margin=0.3)
    assert [x for x, _, _ in dots(axes)] == [1.0, 2.0]
    assert axes.get_legend_handles_labels()[1] == ["deviation from the mean", "within-length variance"]
    band = axes.patches[0]
    assert (band.get_x(), band.get_x() + band.get_width()) == pytest.approx((0.7, 1.3))


def test_forms_of_the_cv_and_their_ratio_to_grpo(axes):
    row = {"rule": "dapo", "low": np.nan, "high": np.nan}
    rows = frame(
        {**row, "quantity": "cv_ratio_form_3", "value": 1.4, "low": 1.1, "high": 1.8},
        {**row, "quantity": "cv_ratio_form_1", "value": 1.5},
        {**row, "quantity": "cv_ratio_form_2", "value": 1.45, "low": 1.3, "high": 1.6},
        {**row, "quantity": "rho", "value": 0.1},
    )
    plot_cv_forms(axes, rows)
    assert [x for x, _, _ in dots(axes)] == [1.5, 1.45, 1.4]
    assert axes.get_legend_handles_labels()[1][0].startswith("given the lengths, variance taken")


def test_bias_against_noise_leaves_out_what_is_unresolved_and_says_so(axes):
    labels = [("grpo", np.nan), ("vl_norm", 1.0), ("dapo", np.nan)]
    cosines = frame(*[{"rule": r, "alpha": a, "value": 0.95, "low": 0.9, "high": 1.0} for r, a in labels])
    cvs = frame(
        *[
            {"rule": r, "alpha": a, "value": v, "low": 1.5, "high": 2.5}
            for (r, a), v in zip(labels, (2.0, 1.8, np.nan), strict=True)
        ]
    )
    plot_bias_noise(axes, cosines, cvs)
    assert axes.get_legend_handles_labels()[1] == ["grpo", "vl_norm (number: α)"]
    assert axes.texts[-1].get_text() == "1 unresolved, not drawn"
    curve = next(line for line in axes.lines if line.get_linestyle() == ":")
    x, y = curve.get_xdata(), curve.get_ydata()
    eta = y**2 / (1 + x**2)
    np.testing.assert_allclose(eta, eta[0])  # a line of equal efficiency


def test_bias_against_noise_without_signal(axes):
    none = frame({"rule": "grpo", "value": np.nan, "low": np.nan, "high": np.nan})
    plot_bias_noise(axes, none, none)
    assert "unresolved" in axes.texts[0].get_text()


def test_efficiency_and_pressure_take_their_own_rows(axes):
    rows = frame(
        {"quantity": "eta", "rule": "grpo", "value": 0.2, "low": 0.1, "high": 0.3},
        {"quantity": "eta", "value": np.nan, "low": np.nan, "high": np.nan},
    )
    plot_efficiency(axes, rows)
    assert [x for x, _, _ in dots(axes)] == [0.2]
    other = panels(1).axes[0]
    more = frame(
        {"quantity": "entropy_pressure", "rule": "dapo", "value": -3.0, "low": -4.0, "high": -2.0},
        {"quantity": "length_pressure", "rule": "dapo", "value": 7.0, "low": 6.0, "high": 8.0},
    )
    plot_pressure(other, more, quantity="entropy_pressure")
    assert [x for x, _, _ in dots(other)] == [-3.0]
    assert "nats" in other.get_xlabel()


def test_extrapolated_sizes_are_hollow_and_unresolved_ones_open(axes):
    rows = frame(
        {"quantity": "cv", "group_size": 4, "value": 3.0, "low": 2.0, "high": 4.0, "verdict": "resolved"},
        {"quantity": "cv", "group_size": 8, "value": np.nan, "low": 1.5, "high": np.inf, "verdict": "unresolved"},
        {"quantity": "cv", "group_size": 64, "value": 0.5, "low": 0.3, "high": 0.9, "verdict": "extrapolated"},
        {"quantity": "responses_for_cv_1", "group_size": None, "value": 30.0, "low": 20.0, "high": 50.0},
    )
    plot_group_size(axes, rows.astype({"group_size": "Int64"}))
    labels = axes.get_legend_handles_labels()[1]
    assert {"estimated", "extrapolated"} <= set(labels)
    open_ended = [line for line in axes.lines if line.get_linestyle() == ":"]
    assert list(open_ended[0].get_xdata()) == [8.0, 8.0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["4", "8", "64"]


def test_the_audit_is_drawn_in_margins(axes):
    edges = {"margin_low": 0.75, "margin_high": 1.25}
    rows = frame(
        {"assumption": 2, "value": 1.5, "low": 1.25, "high": 2.0, **edges, "verdict": "rejected"},
        {"assumption": 0, "value": 0.05, "low": 0.0, "high": 0.1, "margin_low": -np.inf, "margin_high": 0.1}
        | {"verdict": "supported"},
    )
    plot_audit(axes, rows)
    assert [x for x, _, _ in dots(axes)] == pytest.approx([2.0, 0.5])
    colours = [to_rgba(line.get_color()) for line in axes.lines if line.get_marker() == "o"]
    assert colours == [to_rgba("#D55E00"), to_rgba("#009E73")]


def test_sheets_share_one_legend_and_the_tallest_panel_sets_the_row():
    def draw(axes):
        axes.plot([0, 1], [0, 1], label="line")

    figure = compose([Panel(draw=draw), Panel(draw=draw, height=5.0), Panel(draw=draw)], columns=2)
    assert len(figure.legends) == 1
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["line"]
    assert figure.get_size_inches()[1] == pytest.approx(5.0 + 2.9)
