import math

import numpy as np
import pytest
import statsmodels.api as sm
from scipy import optimize, stats
from statsmodels.tools.sm_exceptions import DomainWarning

from gradvar.errors import GradvarError
from gradvar.estimators import deviations, fit_variance_law, within_length_variance
from gradvar.estimators.law import fit_exponent, heterogeneity
from gradvar.estimators.law_data import checked_data, responses_behind
from gradvar.estimators.spread import deviation_dependence, within_dependence
from tests.estimators import references, simulator


def gamma_data(n=60, beta=1.3, scale=2.0, shape=1.5, seed=0):
    rng = np.random.default_rng(seed)
    lengths = np.round(np.exp(rng.normal(4, 0.7, n))) + 1
    return lengths, scale * lengths**beta * rng.gamma(shape, 1 / shape, n)


def test_power_law_is_statsmodels_gamma_glm_with_our_hc3():
    lengths, y = gamma_data()
    law = fit_variance_law(lengths, y)
    design = sm.add_constant(np.log(lengths))
    fit = sm.GLM(y, design, family=sm.families.Gamma(link=sm.families.links.Log())).fit(tol=1e-12)
    assert law.exponent.value == pytest.approx(fit.params[1], rel=1e-6)
    assert law.scale.value == pytest.approx(math.exp(fit.params[0]), rel=1e-6)
    assert law.families["power"].deviance == pytest.approx(fit.deviance, rel=1e-9)
    # HC3 by hand: bread X' diag(y/mu) X, the observed information, residuals over 1 - leverage.
    residual, weight = (y - fit.fittedvalues) / fit.fittedvalues, y / fit.fittedvalues
    bread = np.linalg.inv(design.T @ (np.maximum(weight, 0.05)[:, None] * design))
    leverage = np.maximum(weight, 0.05) * np.einsum("ij,jk,ik->i", design, bread, design)
    meat = (design * ((residual / (1 - leverage)) ** 2)[:, None]).T @ design
    error = math.sqrt((bread @ meat @ bread)[1, 1])
    u = (bread @ design.T)[1] * residual / (1 - leverage)
    degrees = 2 * (u**2).sum() ** 2 / ((u**4).sum() - (u**2).sum() ** 2 / len(u))
    half = stats.t.ppf(0.975, min(degrees, len(y) - 2)) * error
    assert law.exponent.high - law.exponent.value == pytest.approx(half, rel=1e-6)
    assert law.exponent.low == pytest.approx(law.exponent.value - half, rel=1e-6)


def test_correction_sits_in_the_mean():
    """The root of the quasi-score with mu = (1 - 2/N) c L^beta + vbar/N, found by another solver."""
    lengths, y = gamma_data(n=24, seed=3)
    n = 24
    vbar = y.mean() * n / (n - 1)
    root = optimize.root(references.gamma_quasi_score, [0.0, 1.0], args=(lengths, y, n, vbar), method="hybr", tol=1e-13)
    assert root.success
    law = fit_variance_law(lengths, y, n_centred=n)
    assert law.exponent.value == pytest.approx(root.x[1], rel=1e-6)
    assert law.scale.value == pytest.approx(math.exp(root.x[0]), rel=1e-6)
    # A subset keeps the N and the mean of the set its deviations were taken from.
    part = lengths > 40
    other = optimize.root(
        references.gamma_quasi_score, root.x, args=(lengths[part], y[part], n, vbar), method="hybr", tol=1e-13
    )
    subset = fit_variance_law(lengths[part], y[part], n_centred=n, mean_deviation=y.mean())
    assert subset.exponent.value == pytest.approx(other.x[1], rel=1e-6)


def test_noiseless_laws_are_recovered():
    lengths = np.array([5.0, 10.0, 17.0, 40.0, 77.0, 150.0, 300.0])
    for beta in (0.0, 1.0, 2.3):
        law = fit_variance_law(lengths, 3.0 * lengths**beta)
        assert law.exponent.value == pytest.approx(beta, abs=1e-8)
        assert law.scale.value == pytest.approx(3.0, rel=1e-6)
        assert law.loglog_slope.value == pytest.approx(beta, abs=1e-9)
    affine = fit_variance_law(lengths, 7.0 + 0.5 * lengths).families["affine"]
    assert affine.parameters == pytest.approx({"a": 7.0, "b": 0.5}, rel=1e-6)
    proportional = fit_variance_law(lengths, 4.0 * lengths).families
    assert proportional["proportional"].parameters["c"] == pytest.approx(4.0)
    assert proportional["proportional"].deviance == pytest.approx(0.0, abs=1e-12)
    assert proportional["constant"].explained == 0.0
    assert proportional["power"].explained == pytest.approx(1.0)


def test_exact_mean_with_correction_is_recovered():
    lengths = np.array([5.0, 10.0, 17.0, 40.0, 77.0, 150.0, 300.0, 301.0])
    v = 2.0 * lengths**1.6
    law = fit_variance_law(lengths, (1 - 2 / 8) * v + v.mean() / 8, n_centred=8)
    assert law.exponent.value == pytest.approx(1.6, abs=1e-7)


def law_spread(law, lengths, y):
    mean = law.mean(lengths)[0]
    return mean * math.sqrt(np.sum((y / mean - 1) ** 2) / (len(y) - 2))


def reach(x, ols, which, law=None, y=None):
    """How far below and above.

    HC3 errors of statsmodels with the degrees of freedom of a sum of squares, or the law's spread with those of all
    observations where that reaches farther. With a law both ends move by Hall's correction of a Gamma's skewness,
    2 sd/mean, the nearer one by what a studentised mean over pairs moves it.
    """
    design = sm.add_constant(x)
    gain = np.linalg.solve(design.T @ design, design.T)[which]
    influence = gain * ols.resid / (1 - ols.get_influence().hat_matrix_diag)
    assert np.linalg.norm(influence) == pytest.approx(ols.bse[which], rel=1e-9)

    def degrees(part):
        squares = part**2
        return min(len(x) - 2, 2 * squares.sum() ** 2 / ((squares**2).sum() - squares.sum() ** 2 / len(x)))

    if law is None:
        half = stats.t.ppf(0.975, degrees(influence)) * np.linalg.norm(influence)
        freed = ols.resid / (1 - ols.get_influence().hat_matrix_diag)
        half *= max(1, np.linalg.norm(gain) * np.sqrt((freed**2).mean()) / np.linalg.norm(influence))  # homoscedastic
        return [half * max(1, len(x) / (8 * degrees(influence))) ** (1 / 3)] * 2
    spread = law_spread(law, x, y)
    part, z = gain * spread, stats.norm.ppf(0.975)
    skewness = 2 * spread[0] / law.mean(x)[0][0] * np.sum(part**3) / np.linalg.norm(part) ** 3
    moved = abs(skewness) * (2 * z**2 + 1) / 6
    curve = (z**2 + 1) / 2
    half = stats.t.ppf(0.975, degrees(influence)) * np.linalg.norm(influence)
    half = max(half, stats.t.ppf(0.975, len(x) - 2) * np.linalg.norm(part))
    far = half + moved * np.linalg.norm(part)
    near = far - (moved + curve * min(max(moved / curve - 0.1, 0), 0.3)) * np.linalg.norm(part)
    return (near, far) if skewness > 0 else (far, near)


def test_affine_and_lines_are_statsmodels():
    lengths, y = gamma_data(n=200, beta=0.5, seed=4)
    law = fit_variance_law(lengths, y)
    with pytest.warns(DomainWarning):
        glm = sm.GLM(y, sm.add_constant(lengths), family=sm.families.Gamma(link=sm.families.links.Identity()))
    fit = glm.fit(start_params=[y.mean(), 0.01], tol=1e-12, maxiter=500)
    affine = law.families["affine"]
    assert affine.converged
    assert [affine.parameters["a"], affine.parameters["b"]] == pytest.approx(list(fit.params), rel=1e-5)
    for x, target, slope, r2 in (
        (np.log(lengths), np.log(y), law.loglog_slope, law.loglog_r2),
        (lengths, y, law.line_slope, law.line_r2),
    ):
        ols = sm.OLS(target, sm.add_constant(x)).fit(cov_type="HC3")
        assert slope.value == pytest.approx(ols.params[1], rel=1e-9)
        far = reach(x, ols, 1, law, y) if target is y else reach(x, ols, 1)
        assert (slope.value - slope.low, slope.high - slope.value) == pytest.approx(far, rel=1e-7)
        assert (far[1] > far[0]) == (target is y)
        assert r2.value == pytest.approx(ols.rsquared, rel=1e-9)
    assert law.line_intercept.value == pytest.approx(ols.params[0], rel=1e-9)
    ends = (law.line_intercept.value - law.line_intercept.low, law.line_intercept.high - law.line_intercept.value)
    assert ends == pytest.approx(reach(x, ols, 0, law, y), rel=1e-7)
    assert ends[0] > ends[1]
    assert law.rank_correlation.value == pytest.approx(stats.spearmanr(lengths, y).statistic, rel=1e-9)


def test_lines_are_covered_under_a_law_of_the_square():
    """300 prompts of 32: 89% were with the law's spread but the residuals' degrees of freedom and no skewness."""
    hits, draws = 0, 300
    for k in range(draws):
        one = simulator.prompt("p", 32, rng=np.random.default_rng([3, 32, k]), beta=2.0, decay=0.7, signal=1.0)
        y, shared = (
            made(one.gram, one.lengths, rng=np.random.default_rng(k))
            for made in (within_length_variance, within_dependence)
        )
        line = fit_variance_law(one.lengths, y, dependence=shared).line_slope
        hits += line.low <= np.polyfit(one.lengths, (one.lengths / 150) ** 2 + 0.24, 1)[0] <= line.high
    assert hits >= stats.binom.ppf(0.01, draws, 0.94), hits


def test_pooled_has_one_constant_a_prompt():
    """Against a GLM with dummies; the scale is the constants' geometric mean."""
    parts = [gamma_data(n=30, scale=10.0**k, seed=k) for k in range(4)]
    lengths, y = (np.concatenate([p[m] for p in parts]) for m in (0, 1))
    labels = np.repeat(["a", "b", "c", "d"], 30)
    law = fit_variance_law(lengths, y, clusters=labels)
    design = np.column_stack([np.log(lengths), *[(labels == k).astype(float) for k in "abcd"]])
    fit = sm.GLM(y, design, family=sm.families.Gamma(link=sm.families.links.Log())).fit(tol=1e-12)
    assert law.exponent.value == pytest.approx(fit.params[0], rel=1e-6)
    assert law.scale.value == pytest.approx(math.exp(fit.params[1:].mean()), rel=1e-5)
    assert law.exponent.clusters == 4
    ols = sm.OLS(np.log(y), design).fit(cov_type="HC3")
    assert law.loglog_slope.value == pytest.approx(ols.params[0], rel=1e-9)
    freed = ols.resid / (1 - ols.get_influence().hat_matrix_diag)
    even = np.linalg.norm(np.linalg.pinv(design)[0]) * np.linalg.norm(freed) / math.sqrt(120)  # homoscedastic
    quantiles = [stats.t.ppf(0.975, degrees) * max(even, ols.bse[0]) for degrees in (115, 20)]
    assert quantiles[0] <= law.loglog_slope.high - law.loglog_slope.value < quantiles[1]
    # Prompts like these: close to a delete-one-prompt jackknife done by refitting.
    refits = np.array(
        [
            fit_exponent(lengths[labels != k], y[labels != k], clusters=labels[labels != k]).exponent.value
            for k in "abcd"
        ]
    )
    half = stats.t.ppf(0.975, 3) * math.sqrt(3 / 4 * ((refits - refits.mean()) ** 2).sum())
    here = law.exponent.high - law.exponent.value  # never narrower than for these prompts
    assert law.exponent_across.high - law.exponent_across.value == pytest.approx(max(half, here), rel=0.25)
    assert law.exponent_across.value == law.exponent.value


def test_prompts_like_these_need_four():
    lengths, y = gamma_data()
    law = fit_variance_law(lengths, y, clusters=np.arange(60) % 3)
    assert math.isnan(law.exponent_across.value)
    assert "below 4 prompts" in law.exponent_across.method
    assert law.verdict_across()[0] == "undetermined"


def test_heterogeneity_by_definition():
    fits = [fit_exponent(*gamma_data(n=80, beta=b, seed=k)) for k, b in enumerate((0.5, 1.0, 1.2, 2.0))]
    tau, p = heterogeneity(fits, 0.95)
    beta = [f.exponent.value for f in fits]
    w = [1 / sum(u * u for u in f.influence) for f in fits]
    centre = sum(a * b for a, b in zip(w, beta, strict=True)) / sum(w)
    q = sum(a * (b - centre) ** 2 for a, b in zip(w, beta, strict=True))
    expected = (q - 3) / (sum(w) - sum(a * a for a in w) / sum(w))
    assert tau.value == pytest.approx(math.sqrt(expected))
    assert tau.value == pytest.approx(np.std([0.5, 1.0, 1.2, 2.0], ddof=1), rel=0.4)
    assert p == pytest.approx(stats.chi2.sf(q, 3))
    assert p < 1e-4
    alike = [fit_exponent(*gamma_data(n=80, beta=1.0, seed=k)) for k in range(6)]
    assert heterogeneity(alike, 0.95)[1] > 1e-3
    assert math.isnan(heterogeneity(alike[:1], 0.95)[0].value)


def test_verdicts_and_the_n_that_decides():
    lengths, y = gamma_data(n=400, beta=1.0, shape=20.0)
    law = fit_variance_law(lengths, y)
    assert law.verdict == "proportional to length"
    assert law.n_needed == 400
    assert fit_variance_law(lengths, y * lengths).verdict == "not proportional"
    unsure = fit_variance_law(*gamma_data(n=20, beta=1.0, shape=0.5, seed=1))
    assert unsure.verdict == "undetermined"
    e = unsure.exponent
    distance = min(abs(e.value - 0.75), abs(e.value - 1.25))
    assert unsure.n_needed == math.ceil(20 * ((e.high - e.value) / distance) ** 2)
    wide = fit_variance_law(*gamma_data(n=20, beta=1.0, shape=0.5, seed=1), margin=20.0)
    assert wide.verdict == "proportional to length"


def test_band_is_the_sandwich_of_the_fitted_mean():
    lengths, y = gamma_data()
    law = fit_variance_law(lengths, y)
    at = np.array([5.0, 50.0, 500.0])
    value, low, high = law.mean(at)
    np.testing.assert_allclose(value, law.scale.value * at**law.exponent.value, rtol=1e-9)
    # At one token the band is the scale's interval.
    one = law.mean([1.0])
    assert one[2][0] == pytest.approx(law.scale.high, rel=1e-9)
    assert ((low < value) & (value < high)).all()


def test_units_do_not_matter():
    lengths, y = gamma_data()
    law, other = fit_variance_law(lengths, y, n_centred=60), fit_variance_law(lengths, y * 1e-9, n_centred=60)
    assert other.exponent.value == pytest.approx(law.exponent.value, rel=1e-7)
    assert other.exponent.high == pytest.approx(law.exponent.high, rel=1e-6)
    assert other.scale.value == pytest.approx(law.scale.value * 1e-9, rel=1e-6)


def test_no_interval_below_sixteen():
    lengths, y = gamma_data(n=15)
    law = fit_variance_law(lengths, y)
    assert math.isfinite(law.exponent.value)
    assert math.isnan(law.exponent.low)
    assert "no interval below 16" in law.exponent.method
    assert law.verdict == "undetermined"
    assert (law.n_needed, law.n_needed_at_least) == (16.0, True)


def test_zeros_and_a_huge_outlier_are_survived():
    lengths, y = gamma_data()
    y[:3] = 0.0
    zeros = fit_variance_law(lengths, y)
    assert math.isfinite(zeros.exponent.value)
    assert zeros.loglog_slope.n == 57
    calm = fit_variance_law(*gamma_data())
    lengths, y = gamma_data()
    y[np.argmax(lengths)] *= 1e6
    wild = fit_variance_law(lengths, y)
    # The outlier moves the estimate, and no interval pretends to know by how much.
    assert abs(wild.exponent.value - calm.exponent.value) > 1
    assert math.isnan(wild.exponent.low)
    assert wild.verdict == "undetermined"


@pytest.mark.parametrize("rank", [0, 16, 30])
def test_one_response_that_carries_everything_leaves_no_interval(rank):
    """Scores with Var = V L, one of 32 a thousand times as large; the fit through it leaves no large residual."""
    scores, _, lengths = simulator.draw(32, rng=np.random.default_rng(5))
    scores[np.argsort(lengths)[rank]] *= 1e3
    gram = references.gram_of(scores)
    within = within_length_variance(gram, lengths, rng=np.random.default_rng(0))
    for values, n in ((deviations(gram), 32), (within, None)):
        law = fit_variance_law(lengths, values, n_centred=n)
        assert law.verdict == "undetermined"
        assert not math.isfinite(law.exponent.low)
        assert not math.isfinite(law.exponent.high)
        if math.isfinite(law.exponent.value):
            assert "rests on 1." in law.exponent.method


def test_responses_behind_by_their_definition():
    rng = np.random.default_rng(2)
    x, codes = rng.uniform(1, 3, 20), np.arange(20) % 2
    y = np.exp(1.5 * x + codes + rng.normal(size=20))
    data = checked_data(np.exp(x), y, codes, None, None, 0.25, 0.95)
    design = np.stack([x, codes == 0, codes == 1], axis=1).astype(float)
    fitted = design @ np.linalg.lstsq(design, np.log(y), rcond=None)[0]
    t = [math.exp(math.log(v) - f) for v, f in zip(y, fitted, strict=True)]
    assert responses_behind(data) == pytest.approx(sum(t) ** 2 / sum(v**2 for v in t))
    # Whatever the law and the scale, equal scatter is equal weight.
    exact = checked_data(np.exp(x), np.exp(3 * x), None, None, None, 0.25, 0.95)
    assert responses_behind(exact) == pytest.approx(20)


def test_ordinary_heavy_tails_keep_their_intervals():
    """Squares with lognormal scatter, one in a hundred 10 times the median, under a steep law."""
    for trial in range(50):
        rng = np.random.default_rng(trial)
        lengths = np.round(np.exp(rng.normal(5, 0.7, 32))) + 1
        y = lengths**3 * np.exp(rng.normal(size=32))
        assert math.isfinite(fit_exponent(lengths, y).exponent.low), trial


@pytest.mark.parametrize(
    ("lengths", "y", "arguments", "words"),
    [
        ([1.0, 2.0, 3.0], [1.0, 1.0, 1.0], {}, "at least 4 responses"),
        ([5.0] * 6, [1.0] * 6, {}, "one length"),
        ([1.0, 2.0, 3.0, 4.0], [0.0] * 4, {}, "all deviations are 0"),
        ([1.0, 2.0, 3.0, 4.0], [1.0, -1.0, 1.0, 1.0], {}, "not negative"),
        ([1.0, 2.0, 3.0, np.nan], [1.0] * 4, {}, "lengths must be positive"),
        ([1.0, 2.0, 3.0], [1.0] * 4, {}, "two rows"),
        ([1.0, 2.0, 3.0, 4.0], [1.0] * 4, {"n_centred": 2}, "n_centred must be at least 3"),
        ([1.0, 2.0, 3.0, 4.0], [1.0] * 4, {"margin": 0.0}, "margin"),
        ([1.0, 2.0, 3.0, 4.0], [1.0] * 4, {"level": 95}, "level"),
        ([1.0, 2.0, 3.0, 4.0], [1.0] * 4, {"clusters": [0]}, "clusters must label"),
        ([1.0, 2.0, 3.0, 4.0], [1.0] * 4, {"n_centred": 4, "mean_deviation": -1.0}, "mean_deviation"),
    ],
)
def test_refuses(lengths, y, arguments, words):
    with pytest.raises(GradvarError, match=words):
        fit_variance_law(lengths, y, **arguments)


def coverage(n, beta, draws, seed=0, **law):
    """Covered draws of D's and V's intervals, wrong verdicts, and the estimates."""
    hits, wrong, values = np.zeros(2), 0, []
    for t in range(draws):
        rng = np.random.default_rng([seed, n, round(10 * beta), t])
        scores, _, lengths = simulator.draw(n, rng=rng, beta=beta, shift=1.0, **law)
        gram = scores @ scores.T
        state = int(rng.integers(2**31))
        fits = [
            fit_exponent(lengths, deviations(gram), n_centred=n, dependence=deviation_dependence(gram)),
            fit_exponent(
                lengths,
                within_length_variance(gram, lengths, rng=np.random.default_rng(state)),
                dependence=within_dependence(gram, lengths, rng=np.random.default_rng(state)),
            ),
        ]
        hits += [f.exponent.low <= beta <= f.exponent.high for f in fits]
        truth = "proportional to length" if abs(beta - 1) < 0.25 else "not proportional"
        wrong += fits[0].verdict not in (truth, "undetermined")
        values.append([f.exponent.value for f in fits])
    return hits, wrong, np.array(values)


@pytest.mark.parametrize("beta", [0.0, 1.0, 1.6, 2.0])
def test_known_laws_are_covered(beta):
    """60 draws at N = 64: the bound is what 93% true coverage undercuts once in 100 000 (binomial)."""
    draws = 60
    hits, wrong, values = coverage(64, beta, draws)
    least = stats.binom.ppf(1e-5, draws, 0.93)
    assert (hits >= least).all(), f"covered {hits} of {draws}: the standard errors are too small"
    assert wrong <= stats.binom.ppf(1 - 1e-5, draws, 0.05)
    assert (abs(np.median(values, axis=0) - beta) < 0.05 + 5 * 1.25 * values.std(axis=0) / math.sqrt(draws)).all()


@pytest.mark.slow
@pytest.mark.parametrize("n", [64, 128])
@pytest.mark.parametrize("beta", [0.0, 1.0, 1.6, 2.0])
def test_known_laws_are_covered_long(n, beta):
    """1000 draws: 93 to 97%, give or take 4 standard errors (2.8 points)."""
    hits, wrong, _ = coverage(n, beta, 1000, seed=1)
    assert (abs(hits / 1000 - 0.95) < 0.02 + 0.028).all(), hits
    assert wrong <= 50 + 4 * math.sqrt(1000 * 0.05 * 0.95)


@pytest.mark.parametrize(
    ("n", "right", "bounded"), [(128, 19, False), (128, 20, True), (60, 15, True), (60, 14, False)]
)
def test_a_line_has_no_interval_where_few_of_many_carry_it(n, right, bounded):
    lengths = np.geomspace(50.0, 800.0, n)
    law = fit_variance_law(lengths, lengths * np.random.default_rng(5).gamma(1.0, size=n), carrying=right)
    assert math.isfinite(law.exponent.low)
    assert math.isfinite(law.loglog_slope.low)
    for estimate in (law.line_slope, law.line_intercept):
        assert math.isfinite(estimate.low) == math.isfinite(estimate.high) == bounded
        assert (f"{right}.0 responses carry the noise" in estimate.method) != bounded
