"""The scripts of analyses/: their numbers against literal definitions, and what is missing is named."""

import math
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from analyses import claims, figure_01, figure_04, figure_05, figure_11, table_01
from analyses.__main__ import SCRIPTS
from analyses.script import mixed_prompts, one_prompt
from gradvar import GradvarError, open_run
from gradvar.estimators.groups import draw_groups
from gradvar.runs import EstimateConfig
from tests.conftest import ROOT, gradvar

COMMITTED = ROOT / "analyses" / "run"
OUTPUT = ROOT / "analyses" / "output"


@pytest.fixture(scope="module")
def run():
    """The committed run: the bundled policy, 8 prompts of 128 responses."""
    return open_run(COMMITTED)


def script(*arguments):
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_one_command_makes_the_committed_tables_again(run, tmp_path):
    """From the run's Grams: its estimates are made anew first."""
    path = tmp_path / "run"
    shutil.copytree(COMMITTED, path)
    shutil.rmtree(path / "tables")
    for command in ("fit", "cv", "alpha", "audit"):
        done = gradvar(command, path)
        assert done.returncode == 0, done.stderr
    done = script("analyses", path, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    for stem in SCRIPTS:
        made, committed = (pd.read_csv(folder / f"{stem}.csv") for folder in (tmp_path, OUTPUT))
        # Six digits are written; another number of threads may change the last bits.
        pd.testing.assert_frame_equal(made, committed, rtol=2e-5, atol=1e-9, obj=stem)
    drawn = {path.stem for path in tmp_path.glob("*.png")}
    assert drawn == set(SCRIPTS) - {"table_01", "claims"}
    assert {path.stem for path in tmp_path.glob("*.pdf")} == drawn


def test_a_missing_table_is_named_with_its_command(run, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(run.path, path)
    (path / "tables" / "alpha.parquet").unlink()
    done = script("analyses.table_01", path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert f"gradvar alpha {path}" in done.stderr


def test_a_layer_that_was_not_measured_is_named_with_its_command(finished_run):
    with pytest.raises(GradvarError, match=r"gradvar measure .* --targets middle:qkv,mlp"):
        figure_11.compute(open_run(finished_run))


def test_figure_04_holds_each_response_s_squared_distance_from_the_mean(run):
    data = figure_04.compute(run)
    (prompt_id,) = mixed_prompts(run, 1)
    target = data["target"].iloc[0]
    scores = one_prompt(run, target, prompt_id)
    gram, n = scores.gram, len(scores.lengths)
    mean, spread = scores.rewards.mean(), scores.rewards.std(ddof=1)
    for kind in data["gradient"].unique():
        a = [1.0] * n if kind == "score" else [(r - mean) / (spread + 1e-6) for r in scores.rewards]
        rows = data[(data["target"] == target) & (data["gradient"] == kind) & (data["series"] == "response")]
        for i, value in zip(rows["rollout_id"].astype(int), rows["value"], strict=True):
            to_mean = sum(a[i] * a[j] * gram[i, j] for j in range(n)) / n
            square = sum(a[k] * a[j] * gram[k, j] for k in range(n) for j in range(n)) / n**2
            assert value == pytest.approx(a[i] ** 2 * gram[i, i] - 2 * to_mean + square, rel=1e-8, abs=1e-10)


def test_figure_01_weighs_every_prompt_by_its_own_mean(run):
    data = figure_01.compute(run)
    classes = data[data["series"] == "length class"]
    groups = run.scores()
    assert classes["responses"].sum() == sum(len(g.lengths) for g in groups)
    overall = (classes["value"] * classes["responses"]).sum() / classes["responses"].sum()
    assert overall == pytest.approx(1.0)  # a deviation over its prompt's mean is 1 on average
    bars = data[data["series"] == "histogram"]
    assert bars["responses"].sum() == classes["responses"].sum()


def test_figure_05_places_updates_as_a_singular_value_decomposition_of_the_vectors_does():
    """Explicit vectors, whose inner products are the Gram, projected on their two main directions."""
    rng = np.random.default_rng(0)
    n, size = 24, 4
    vectors = rng.normal(size=(n, 9)) + rng.normal(size=9)
    rewards = np.arange(n) % 2.0
    scores = figure_05.PromptScores(
        prompt_id="p",
        target="t",
        gram=vectors @ vectors.T,
        rewards=rewards,
        lengths=np.full(n, 5.0),
        truncated=np.zeros(n, dtype=bool),
        max_length=9,
    )
    shown = figure_05.SHOWN * (n // size)
    made = [rng.normal(size=(shown + 30, n)) / n for _ in figure_05.RULES]
    data = figure_05._placed(scores, [2.0, 3.0], made, [1.0, 1.0], size)
    updates = [rows @ vectors / scale for rows, scale in zip(made, (2.0, 3.0), strict=True)]
    centred = np.concatenate([part[:shown] - part.mean(axis=0) for part in updates])
    directions = np.linalg.svd(centred, full_matrices=False)[2][:2]
    for (rule, _), part in zip(figure_05.RULES, updates, strict=True):
        mine = data[data["rule"] == rule]
        for series, expected in (("update", part[:shown]), ("mean update", part.mean(axis=0)[None])):
            found = mine.loc[mine["series"] == series, ["x", "y"]].to_numpy()
            np.testing.assert_allclose(np.abs(found), np.abs(expected @ directions.T), rtol=1e-6, atol=1e-9)
        own = part[:shown] - part.mean(axis=0)
        share = np.square(own @ directions.T).sum() / np.square(own).sum()
        assert mine["shown"].iloc[0] == pytest.approx(share)


def test_table_01_gives_the_paper_s_formulas_on_the_lengths():
    limit, n, alpha = 50.0, 4, 0.75
    prompts = [np.array([3.0, 10.0, 40.0, 7.0, 21.0, 2.0, 33.0, 12.0]), np.arange(1.0, 14.0)]
    config = EstimateConfig(group_size=n, seed=3)

    def formulas(rule, chosen):
        total, inverse = sum(chosen), sum(1 / length for length in chosen)
        powers = sum(length**-alpha for length in chosen)
        less = sum(length ** (1 - 2 * alpha) for length in chosen)
        return {  # sum x_i and sum x_i^2 L_i in units of 1/M and 1/M^2, CV in units of sqrt(V) / ||grad J||
            "grpo": (limit / n * inverse, limit**2 / n**2 * inverse, 1 / math.sqrt(inverse)),
            "dapo": (limit * n / total, limit**2 / total, math.sqrt(total) / n),
            "dr_grpo": (1.0, total / n**2, math.sqrt(total) / n),
            "vl_norm": (1.0, less / powers**2, math.sqrt(less) / powers),
        }[rule]

    for rule in ("grpo", "dapo", "dr_grpo", "vl_norm"):
        found = table_01._on_lengths(rule, alpha if rule == "vl_norm" else None, prompts, limit, config)
        rng = np.random.default_rng([config.seed, 1])
        drawn = [
            lengths[group]
            for lengths in prompts
            for group in draw_groups(len(lengths), n, table_01.DRAWS, rng=rng).reshape(-1, n)
        ]
        weights, variances, cvs = zip(*(formulas(rule, chosen) for chosen in drawn), strict=True)
        ratios = [cv / formulas("grpo", chosen)[2] for cv, chosen in zip(cvs, drawn, strict=True)]
        expected = {
            "total_weight": np.mean(weights),
            "total_weight_cv": np.std(weights) / np.mean(weights),
            "variance": np.mean(variances),
            "cv_form_1": np.mean(ratios),
        }
        assert found == pytest.approx(expected, abs=1e-12)


def test_claims_cover_the_paper_and_judge_by_the_interval(run):
    data = claims.compute(run)
    assert set(data["claim"]) == {1, 2, 3, 4, 5, 6}
    assert set(data["verdict"]) <= {"supported", "rejected", "undetermined", "not claimed"}
    linear = data[(data["claim"] == 1) & data["low"].notna()]
    for _, row in linear.iterrows():
        inside = row["low"] >= 0.75 and row["high"] <= 1.25
        outside = row["high"] < 0.75 or row["low"] > 1.25
        assert row["verdict"] == ("supported" if inside else "rejected" if outside else "undetermined")
    fixed = data[data["tested_by"].str.contains("total weight")].set_index("where")["value"]
    assert fixed["dr_grpo"] == 0
    assert fixed["vl_norm alpha 1"] == 0
    assert fixed["grpo"] > fixed["dapo"] > 0


def test_share_of_long_responses_against_its_definition(run):
    groups = [g.verified() for g in run.scores()]
    groups = [g for g in groups if np.ptp(g.rewards) > 0]
    share, replicates = claims._long_share(groups, "mean", 0.75)

    def literal(left_out=None):
        long = total = 0.0
        for place, g in enumerate(groups):
            kept = [i for i in range(len(g.lengths)) if (place, i) != left_out]
            norm = sum(g.lengths[i] ** -0.75 for i in kept)
            for i in kept:
                x = g.lengths[i] ** -0.75 / norm
                part = x**2 * (g.rewards[i] - g.rewards.mean()) ** 2 * g.gram[i, i]
                total += part
                long += part * (g.lengths[i] > np.median(g.lengths))
        return long / total

    assert share == pytest.approx(literal())
    assert replicates[0][3] == pytest.approx(literal((0, 3)))


def test_data_are_written_with_six_digits_and_read_back(run, tmp_path):
    assert script("analyses.length_law", run.path, "--out", tmp_path).returncode == 0
    table = pd.read_csv(tmp_path / "length_law.csv")
    assert {"target", "quantity", "value", "low", "high", "verdict", "n", "clusters"} <= set(table.columns)
