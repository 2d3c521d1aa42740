"""What is drawn is what was given: every point, the band, the open ends; and the look is put back."""

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest

from gradvar.figures import panels, plot_aggregator_cv, plot_alpha_curve, plot_length_law, save, style


@pytest.fixture
def axes():
    return panels(1).axes[0]


def points(axes):
    return np.vstack(
        [c.get_offsets() for c in axes.collections if len(c.get_offsets()) and c.get_offsets().shape[1] == 2]
    )


def test_every_response_is_a_point_and_those_at_zero_are_counted(axes):
    lengths = np.array([10.0, 20.0, 40.0, 80.0, 160.0])
    squares = np.array([1.0, 2.0, 0.0, 8.0, 16.0])
    rewards = np.array([1.0, 0.0, 0.0, np.nan, 1.0])
    curve = pd.DataFrame({"length": lengths, "value": lengths, "low": lengths / 2, "high": lengths * 2})
    truncated = np.array([False, False, False, False, True])
    plot_length_law(axes, lengths, squares, curve=curve, rewards=rewards, truncated=truncated, note="exponent 1")
    drawn = {tuple(p) for p in points(axes)}
    assert {(10.0, 1.0), (20.0, 2.0), (80.0, 8.0), (160.0, 16.0)} <= drawn
    assert "1 responses at 0 not drawn" in axes.texts[0].get_text()
    labels = axes.get_legend_handles_labels()[1]
    assert labels == ["rewarded", "rewarded, truncated", "not rewarded", "unverified", "fitted mean and band"]
    assert axes.get_xscale() == axes.get_yscale() == "log"
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), lengths)


def test_cv_bars_stand_where_the_table_says_and_unresolved_ones_are_open(axes):
    rows = pd.DataFrame(
        {
            "rule": ["grpo", "dapo", "vl_norm"],
            "alpha": [np.nan, np.nan, 1.0],
            "value": [2.0, np.nan, 3.0],
            "low": [1.5, 4.0, 2.5],
            "high": [2.5, np.inf, np.inf],
        }
    )
    plot_aggregator_cv(axes, rows, title="t")
    assert [label.get_text() for label in axes.get_yticklabels()] == ["grpo", "dapo", "vl_norm α=1"]
    np.testing.assert_array_equal(axes.lines[0].get_xdata(), [1.5, 2.5])
    dotted = [line for line in axes.lines if line.get_linestyle() == ":"]
    assert len(dotted) == 1
    assert dotted[0].get_xdata()[0] == 4.0
    assert any("unresolved" in text.get_text() for text in axes.texts)


def test_style_is_put_back_and_files_are_written(tmp_path):
    before = mpl.rcParams["font.size"], mpl.rcParams["axes.grid"]
    with style():
        figure = panels(3)
        assert mpl.rcParams["axes.grid"]
    assert (mpl.rcParams["font.size"], mpl.rcParams["axes.grid"]) == before
    paths = save(figure, tmp_path, "f")
    assert [path.name for path in paths] == ["f.png", "f.pdf"]
    first = paths[1].read_bytes()
    save(figure, tmp_path, "f")
    assert paths[1].read_bytes() == first  # the same figure gives the same file


@pytest.mark.parametrize(("count", "rows", "columns"), [(1, 1, 1), (4, 1, 4), (5, 2, 4), (64, 16, 4)])
def test_panels_for_one_prompt_or_many(count, rows, columns):
    figure = panels(count)
    shown = [axes for axes in figure.axes if axes.axison]
    assert len(shown) == count
    assert figure.axes[0].get_gridspec().get_geometry() == (rows, columns)


def test_the_alpha_curve_its_band_and_the_other_rules(axes):
    eta = {"quantity": "eta", "rule": "vl_norm", "low": 0.1, "high": 0.3}
    rows = pd.DataFrame(
        [
            {**eta, "alpha": 1.0, "value": 0.2},
            {**eta, "alpha": 0.0, "value": 0.15},
            {**eta, "rule": "grpo", "alpha": np.nan, "value": 0.18},
            {"quantity": "alpha_star_eta", "rule": "vl_norm", "alpha": np.nan, "value": 1.0, "low": 0.5, "high": 1.5},
        ]
    )
    plot_alpha_curve(axes, rows)
    curve = next(line for line in axes.lines if line.get_label() == "vl_norm")
    np.testing.assert_array_equal(curve.get_xdata(), [0, 1])
    np.testing.assert_array_equal(curve.get_ydata(), [0.15, 0.2])
    assert next(line for line in axes.lines if line.get_label() == "grpo").get_ydata()[0] == 0.18


def test_an_unresolved_alpha_curve_says_so(axes):
    rows = pd.DataFrame([{"quantity": "eta", "rule": "vl_norm", "alpha": 1.0, "value": np.nan, "low": 0, "high": 1}])
    plot_alpha_curve(axes, rows)
    assert "unresolved" in axes.texts[0].get_text()
    assert not axes.lines
