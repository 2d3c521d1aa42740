"""A thin cut of benchmarks/calibration.py: the intervals and verdicts keep what the committed table claims."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks import calibration, calibration_report
from benchmarks.calibration_between import between_intervals, between_truths
from benchmarks.calibration_rows import Setting, row_of
from benchmarks.calibration_simulated import Found
from benchmarks.calibration_truths import (
    LAW,
    SCATTER,
    audit_truths,
    group_moments_of,
    group_truths,
    law_truths,
    proxy_truths,
)
from gradvar.estimators import advantages
from gradvar.estimators.law import fit_exponent
from tests.estimators import references, simulator

TABLE = Path(calibration.__file__).with_suffix(".csv")


def committed():
    with TABLE.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_table_holds_every_setting_and_its_summary():
    rows = committed()
    expected = {(s.name, str(s.n), str(s.prompts)) for s in calibration.settings(1.0)}
    assert {(r["setting"], r["n"], r["prompts"]) for r in rows} == expected
    text = TABLE.with_suffix(".md").read_text()
    for r in rows:
        if r["setting"].startswith("batches"):
            assert "## Batches of several prompts" in text
        elif not r["quantity"].endswith("p value"):
            assert r["quantity"] in text


def test_truths_of_proxies_by_drawing_vectors():
    """R^2 by sums over lengths and rewards, against a large sample of a law whose tails are light."""
    law = {"beta": 0.5, "signal": 1.0, "dimensions": 4, "decay": 0.7, "drift": 0.3, "reward_slope": -0.7}
    s, rewards, lengths = simulator.draw(200_000, rng=np.random.default_rng(2), **law)
    square = ((rewards - rewards.mean()) / rewards.std()) ** 2
    norm = square * (s**2).sum(axis=1)
    truth = proxy_truths(law, count=20_000)
    w = lengths * np.random.default_rng(3).gamma(1.0 / SCATTER, SCATTER, len(lengths))
    proxies = {"length": lengths, "advantage_square_length": square * lengths, "entropy": w}
    for name, proxy in {**proxies, "advantage_square_entropy": square * w}.items():
        assert truth[f"proxy {name}: R^2"] == pytest.approx(np.corrcoef(proxy, norm)[0, 1] ** 2, abs=0.01)


def test_truths_between_prompts_are_met_by_many_prompts():
    """400 prompts through `proxy_table` itself; R^2 of 0.15 to 0.5 errs by 0.04 then."""
    truths = between_truths(64)
    found = list(between_intervals(400, 64, [1]))
    assert {name for name, *_ in found} == set(truths)
    for name, _, truth, estimate in found:
        assert truth == truths[name]
        assert estimate.value == pytest.approx(truth, abs=0.16), name


def test_new_rows_take_the_place_of_old_ones(tmp_path):
    old = committed()
    one = calibration.parsed(next(r for r in old if r["quantity"] == "eta grpo"))
    new = [{**one, "draws": 7}]
    same = [r for r in old if all(r[k] == str(one[k]) for k in ("setting", "n", "prompts"))]
    # Some kinds of quantities: only these rows change.
    part = calibration.merged(new, TABLE, whole=False)
    assert len(part) == len(old)
    assert sum(r["draws"] == 7 for r in part) == 1
    # The whole setting: nothing old of it stays.
    assert len(calibration.merged(new, TABLE)) == len(old) - len(same) + 1
    assert calibration.merged(new, tmp_path / "none.csv") == new


def test_truths_by_drawing_vectors():
    """Group moments, law and audit truths against sample means of drawn scores."""
    law = {"beta": 1.6, "signal": 1.0, "dimensions": 4, "decay": 0.7, "drift": 0.3, "reward_slope": -0.7}
    assert set(law) <= LAW
    rng = np.random.default_rng(0)
    count = 40_000
    s, rewards, lengths = simulator.draw(count * 8, rng=rng, **law)
    x = 1.0 / lengths.reshape(count, 8) / 8
    c = x * advantages(rewards.reshape(count, 8), "grpo")
    updates = np.einsum("gn,gnd->gd", c, s.reshape(count, 8, -1))
    moments = group_moments_of(law, responses=800_000)
    norms = (updates**2).sum(axis=1)
    assert moments.same[0] == pytest.approx(norms.mean(), abs=5 * norms.std() / math.sqrt(count))
    error = updates.std(axis=0) / math.sqrt(count)
    assert moments.mean[0] == pytest.approx(updates.mean(axis=0)[[-1, -2]], abs=6 * error.max())
    truth = group_truths([moments])
    assert truth["eta grpo"] == pytest.approx(truth["cosine grpo"] ** 2 * truth["rho grpo"])
    a = (rewards - rewards.mean()) / rewards.std()
    g = a[:, None] * s
    fit = fit_exponent(lengths, ((g - g.mean(axis=0)) ** 2).sum(axis=1))
    assert law_truths([law])["deviation exponent, grpo"] == pytest.approx(fit.exponent.value, abs=0.03)
    bins = np.searchsorted(np.quantile(lengths, [0.25, 0.5, 0.75]), lengths)
    between = np.mean([((g[bins == b].mean(axis=0) - g.mean(axis=0)) ** 2).sum() for b in range(4)])
    expected = audit_truths([law], [0.0], 4, 0.0)["assumption 4: between lengths"]
    assert expected == pytest.approx(between / (g.mean(axis=0) ** 2).sum(), abs=0.02)


def test_taus_leave_the_share():
    rng = np.random.default_rng(1)
    scores, rewards, lengths = simulator.draw(50_000, rng=rng)
    taus = simulator.draw_taus(scores, rewards, lengths, share=0.3, rng=rng)
    assert 1 - taus.sum() / (scores**2).sum() == pytest.approx(0.3, abs=0.01)


def test_inner_products_are_unbiased():
    """Mean S_ij over i != j estimates ||E s||^2, here the square of the shift."""
    found = []
    for t in range(2000):
        scores, _, _ = simulator.draw(8, rng=np.random.default_rng([3, t]), shift=0.5, drift=0.4, signal=1.0)
        gram = references.gram_of(scores) if t < 3 else scores @ scores.T
        found.append((gram.sum() - np.trace(gram)) / 56)
    assert np.mean(found) == pytest.approx(0.25, abs=4 * np.std(found) / math.sqrt(len(found)))


def test_every_draw_counts():
    """An interval that says nothing excludes nothing and counts as none; a wrong verdict lies on the wrong side."""
    nan, inf = math.nan, math.inf
    setting = Setting(name="x", laws=("y",), n=64, prompts=1, draws=4)

    def found(value, low, high, truth=1.0, quantity="within exponent, score"):
        return Found(quantity=quantity, estimand="these prompts", truth=truth, value=value, low=low, high=high)

    row = row_of([found(1.0, 0.9, 1.1), found(nan, nan, nan), found(nan, 0.0, inf), found(2.0, 1.9, 2.1)], setting)
    assert (row["coverage"], row["no_interval"], row["wrong"], row["rejected"]) == (0.75, 0.5, 0.25, 0.25)
    assert row["coverage_low"] < 0.75 < row["coverage_high"]
    assert row["width"] == pytest.approx(0.2)
    assert (row["too_high"], row["too_low"], row["at_edge"]) == (0.25, 0.0, 0.0)
    right = row_of([found(2.0, 1.9, 2.1, truth=2.0)], setting)
    assert (right["wrong"], right["rejected"], right["median_bias"]) == (0.0, 1.0, 0.0)
    cosines = [found(0.9, low, high, truth=0.95, quantity="cosine grpo") for low, high in ((0.8, 1.0), (0.7, 0.9))]
    edge = row_of([*cosines, found(nan, -inf, inf, quantity="cosine grpo")], setting)
    assert (edge["too_high"], edge["too_low"], edge["at_edge"]) == (0.0, 0.333, 0.333)


def test_rows_of_other_settings_are_kept(tmp_path):
    path = tmp_path / "table.csv"
    names = [s for s in calibration.settings(1.0) if s.n == 64][:3]
    lines = [{"setting": s.name, "n": s.n, "prompts": s.prompts, "quantity": "rho", "draws": 1} for s in names]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines[1:])
    new = [lines[0] | {"draws": 2}, lines[2] | {"draws": 2}]
    assert calibration.merged(new, path) == [new[0], lines[1], new[1]]


def test_summary_lists_what_falls_short():
    row = {
        "setting": "s",
        "n": 64,
        "prompts": 1,
        "quantity": "rho grpo",
        "estimand": "these prompts",
        "draws": 200,
        "truth": 0.5,
        "coverage": 0.95,
        "coverage_low": 0.91,
        "coverage_high": 0.97,
        "at_edge": 0.0,
        "no_interval": 0.0,
        "median_bias": 0.0,
        "width": 0.1,
        "wrong": "",
        "rejected": "",
    }
    good = calibration_report.summary([row], 3.0, 2)
    assert "## Below the claim" not in good
    bad = calibration_report.summary([row | {"coverage": 0.8, "coverage_low": 0.74, "coverage_high": 0.85}], 3.0, 2)
    assert "| s | 64 | 1 | rho grpo | 0.5 | 0.800 (0.740 to 0.850) | 0.000 |" in bad
    wide = row | {"coverage": 1.0, "coverage_low": 0.98, "coverage_high": 1.0}
    both = calibration_report.summary([wide, wide | {"quantity": "cosine grpo", "at_edge": 0.6}], 3.0, 2)
    assert "1 rows (rho 1); and 1 (cosine 1)" in both


@pytest.mark.slow
@pytest.mark.parametrize("name", ["beta 1, mean moves with L", "beta 2, low rank, CV 0.6"])
def test_intervals_cover(name):
    """Within four Monte Carlo errors of the table, whose draws these are too; the p value has the size of 5%."""
    (rows,) = calibration.run([Setting(name=name, laws=(name,), n=64, prompts=1, draws=60)], workers=1)
    assert len(rows) > 60
    table = {(r["setting"], r["n"], r["quantity"]): float(r["coverage"]) for r in committed() if r["prompts"] == "1"}
    for r in rows:
        if r["quantity"].endswith("p value"):
            assert r["coverage"] > 0.8, r
            continue
        claimed = min(0.95, table[name, "64", r["quantity"]])
        spread = math.sqrt(claimed * (1 - claimed) * (1 / 60 + 1 / 200))
        assert r["coverage"] > claimed - 4 * spread, r
        assert r["wrong"] == "" or r["wrong"] <= 0.1, r
