import math

import numpy as np
import pytest
from scipy import stats

from gradvar.estimators import find_rule
from gradvar.estimators.best_alpha import best_of_curve, fine_alphas, spline
from gradvar.estimators.bias import Jackknifed, jackknifed, log_efficiency
from gradvar.estimators.group_products import Layout
from gradvar.estimators.groups import draw_groups, group_coefficients
from gradvar.estimators.intervals import effective_degrees
from gradvar.estimators.pairs import mean_coefficients, pair_covariance
from gradvar.estimators.surplus import of_log_efficiency
from gradvar.estimators.tails import PromptTails
from gradvar.estimators.update_products import products, reward_direction
from tests.estimators import simulator

GRID = tuple(np.arange(13) * 0.25)


def curve(of, tops):
    """One curve a response with its own top; the estimate is that of their mean top."""
    others = (tops.sum() - tops) / (len(tops) - 1)
    return Jackknifed(value=of(tops.mean()), replicates=[np.stack([of(x) for x in others])], n=len(tops), clusters=1)


def parabola(top):
    return -((np.array(GRID) - top) ** 2)


def test_spline_is_exact_for_a_cubic():
    values, slopes = spline(GRID)
    x, grid = fine_alphas(GRID), np.array(GRID)
    assert (grid**3 - 2 * grid) @ values == pytest.approx(x**3 - 2 * x, abs=1e-9)
    assert (grid**3 - 2 * grid) @ slopes == pytest.approx(3 * x**2 - 2, abs=1e-9)
    assert x[0] == 0.0
    assert x[-1] == 3.0


def test_top_of_a_parabola_has_the_interval_of_a_mean():
    tops = np.random.default_rng(0).normal(1.37, 1.0, 50)
    star = best_of_curve(curve(parabola, tops), GRID, level=0.95, method="m")
    half = stats.t.ppf(0.975, effective_degrees(tops - tops.mean(), 49)) * tops.std(ddof=1) / math.sqrt(50)
    assert star.value == pytest.approx(tops.mean(), abs=0.006)
    assert star.low == pytest.approx(tops.mean() - half, abs=0.011)
    assert star.high == pytest.approx(tops.mean() + half, abs=0.011)
    assert star.method == "m"


def test_ends_of_the_range_are_open():
    rng = np.random.default_rng(1)
    below = best_of_curve(curve(parabola, rng.normal(-2.0, 1.0, 50)), GRID, level=0.95, method="m")
    assert (below.value, below.low, below.high) == (0.0, 0.0, 0.0)
    assert below.method == "m; open at 0"
    above = best_of_curve(curve(parabola, rng.normal(2.9, 1.0, 50)), GRID, level=0.95, method="m")
    assert above.low < 2.9 < above.high == 3.0
    assert above.method.endswith("open at 3")
    lost = best_of_curve(curve(lambda x: np.full(13, math.nan), rng.normal(size=9)), GRID, level=0.95, method="m")
    assert math.isnan(lost.value)
    assert lost.method == "m; unresolved"


def test_far_alphas_that_fit_by_chance_are_not_joined():
    """A second top, lower than the first: flat there too, but not the best."""

    def two(top):
        x = np.array(GRID)
        return np.exp(-(((x - top) / 0.4) ** 2)) + 0.3 * np.exp(-(((x - top - 1.8) / 0.4) ** 2))

    star = best_of_curve(curve(two, np.random.default_rng(2).normal(0.7, 0.3, 60)), GRID, level=0.95, method="m")
    assert 0.5 < star.low < star.high < 0.9


def test_pairs_are_taken_out_once():
    tops = np.random.default_rng(3).normal(1.5, 1.0, 40)
    made = curve(parabola, tops)
    plain = best_of_curve(made, GRID, level=0.95, method="m")
    # A quarter of the slope's variance: covariance v (2 alpha) (2 alpha)' of curves 2 alpha t has slopes 4 v.
    quarter = 0.25 * tops.var(ddof=1) / 40
    line = 2.0 * np.array(GRID)
    less = best_of_curve(made, GRID, level=0.95, method="m", pairs=quarter * np.outer(line, line))
    assert (less.high - less.low) / (plain.high - plain.low) == pytest.approx(math.sqrt(0.75), abs=0.02)


def test_unseen_short_responses_lower_the_lower_end_alone():
    tops = np.random.default_rng(5).normal(1.5, 1.0, 40)
    lengths = np.random.default_rng(6).permutation(np.linspace(100.0, 200.0, 40))
    made = curve(parabola, tops)
    plain = best_of_curve(made, GRID, level=0.95, method="m")
    tails = PromptTails.of(np.eye(40), np.arange(40.0), lengths, advantage="raw")
    wider = best_of_curve(made, GRID, level=0.95, method="m", tails=[tails])
    assert (wider.value, wider.high) == (plain.value, plain.high)
    # The slope at alpha is 2 (top - alpha): what lowers it by u lowers the end by u / 2 where it is added alone.
    (lowered,) = set(np.round(tails.lower_slopes(2.0 * (tops - tops.mean())[:, None] / 39), 12))
    error = (plain.value - plain.low) * 2.0
    quantile = stats.t.ppf(0.975, effective_degrees(tops - tops.mean(), 39))
    assert plain.value - wider.low == pytest.approx(math.hypot(error, quantile * lowered) / 2.0, abs=0.011)
    assert wider.low < plain.low - 0.01


def test_true_alpha_is_covered():
    """Var = (L/150)^beta C and E[g | L, r] without L: eta is greatest near alpha = beta. 60 draws, N = 96."""
    grid = np.arange(9) * 0.375
    hits, values, widths = 0, [], []
    for t in range(60):
        rng = np.random.default_rng([4, t])
        scores, rewards, lengths = simulator.draw(96, rng=rng, signal=1.2, beta=1.5, decay=0.95)
        groups, gram = draw_groups(96, 8, 64, rng=rng), scores @ scores.T
        c = [
            group_coefficients(
                groups, rewards, lengths, find_rule("vl_norm"), advantage="grpo", alpha=float(a), max_length=3000.0
            )
            for a in grid
        ]
        updates, aim = np.stack(c), reward_direction(rewards, groups)
        got = products(gram, Layout(groups=groups, kinds=np.stack([*c, aim]), n_responses=96), 1)
        means = mean_coefficients(groups, np.concatenate([updates, aim[None]]), 96)
        pairs = of_log_efficiency([got], pair_covariance(gram, means[:-1], means[-1]), 8)
        star = best_of_curve(jackknifed([got], log_efficiency), grid, level=0.95, method="m", pairs=pairs)
        hits += star.low <= 1.5 <= star.high
        values.append(star.value)
        widths.append(star.high - star.low)
    # Binomial(60, 0.93) falls below 48 once in 100 000.
    assert hits >= 48
    assert 1.2 <= np.median(values) <= 1.8
    assert np.median(widths) < 1.5
