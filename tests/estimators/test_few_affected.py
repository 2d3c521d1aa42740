"""What an extra does, where a sample holds few of the responses that it changes."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from gradvar.estimators import cv_table, extras_table
from gradvar.estimators.extras import FILTERING, NONE, PUNISHMENT, SAMPLING
from gradvar.estimators.few_affected import FewAffected
from gradvar.estimators.silent_shares import silent_estimate
from tests.estimators import simulator
from tests.estimators.test_tables import only, pick

LAW = {"beta": 1.0, "dimensions": 20, "decay": 0.7, "signal": 2.0}
LONGEST, BUFFER = 600.0, 200.0


def cut(n, seed, longest=LONGEST):
    """One prompt whose responses end at `longest` tokens: 1% do at 600."""
    one = simulator.prompt("p", n, rng=np.random.default_rng(seed), max_length=int(longest), **LAW)
    return replace(one, lengths=np.minimum(one.lengths, longest), truncated=one.lengths >= longest)


def exact_cvs(groups=60_000, n=8):
    """CV of dapo under each extra: noise given lengths and rewards is known, so only those are drawn."""
    lengths, rewards, _, chance = simulator.draw_lengths_and_rewards(groups * n, rng=np.random.default_rng(1))
    noise, along = (lengths / 150.0).reshape(groups, n), (LAW["signal"] * (rewards - chance)).reshape(groups, n)
    held, r = np.minimum(lengths, LONGEST).reshape(groups, n), rewards.reshape(groups, n)
    kept = (lengths < LONGEST).reshape(groups, n)
    penalty = np.clip((held - (LONGEST - BUFFER)) / BUFFER, 0.0, 1.0)

    def cv(rewards, keep, chosen=slice(None)):
        std = rewards.std(axis=1, ddof=1, keepdims=True)
        c = (rewards - rewards.mean(axis=1, keepdims=True)) / (std + 1e-6) * keep
        c = (c / np.maximum((held * keep).sum(axis=1, keepdims=True), 1.0))[chosen]
        update = (c * along[chosen]).sum(axis=1)
        return math.sqrt(((c**2 * noise[chosen]).sum(axis=1) + update**2).mean() / update.mean() ** 2 - 1.0)

    loud = np.ptp(r, axis=1) > 0
    return {NONE: cv(r, 1), FILTERING: cv(r, kept), PUNISHMENT: cv(r - penalty, 1), SAMPLING: cv(r, 1, loud)}


def test_ratios_to_the_plain_cv_are_covered():
    """Before: 50% where 1% are truncated, 83% where 5% are punished, 80% under dynamic sampling."""
    truth, draws = exact_cvs(), 80
    hits, bounded = dict.fromkeys(truth, 0), dict.fromkeys(truth, 0)
    for t in range(draws):
        one = extras_table([cut(64, [4, t])], rules=("dapo",), buffer=BUFFER, seed=t, permutations=64)
        for row in pick(one, quantity="cv_ratio").to_dict("records"):
            ratio = truth[row["extra"]] / truth[NONE]
            hits[row["extra"]] += not (row["low"] > ratio or row["high"] < ratio)
            bounded[row["extra"]] += math.isfinite(row["high"])
            assert not row["low"] > row["value"]
            assert not row["high"] < row["value"]
    least = stats.binom.ppf(1e-3, draws, 0.93)
    assert min(hits[extra] for extra in (FILTERING, PUNISHMENT, SAMPLING)) >= least, hits
    assert bounded[SAMPLING] == draws
    assert bounded[PUNISHMENT] > draws / 2


def test_an_extra_that_changes_two_responses_has_no_interval_and_three_have_one():
    one = cut(64, 3, longest=5000.0)
    order = np.argsort(-one.lengths)
    for count in (0, 2, 3):
        truncated = np.isin(np.arange(64), order[:count])
        table = extras_table([replace(one, truncated=truncated)], rules=("grpo",), seed=0, permutations=64)
        for quantity in ("cv_ratio", "cosine_difference"):
            row = only(table, quantity=quantity, extra=FILTERING)
            assert math.isfinite(row["value"])
            assert math.isfinite(row["low"]) == math.isfinite(row["high"]) == (count == 3)
            assert row["verdict"] == "undetermined" or count == 3
            assert (f"changes {count} of 64" in row["method"]) == (count < 3)


def test_filtering_that_leaves_out_none_of_few_right_ones_has_no_interval():
    one = cut(128, 3, longest=5000.0)
    order = np.argsort(-one.lengths)
    truncated = np.isin(np.arange(128), order[:4])
    for right, told in ((order[[1, *range(5, 128, 8)]], True), (order[5:128:7], False), (order[5:128:2], True)):
        rewards = np.isin(np.arange(128), right).astype(float)
        along = one.gram + np.trace(one.gram) / 32 * np.outer(rewards, rewards)  # a signal that is resolved
        scores = replace(one, truncated=truncated, rewards=rewards, gram=along)
        table = extras_table([scores], rules=("grpo",), seed=0, permutations=64)
        row = only(table, quantity="cv_ratio", extra=FILTERING)
        assert math.isnan(row["low"]) == math.isnan(row["high"]) == (not told)
        assert ("none of which is one of the few" in row["method"]) == (not told)
        # Beside a silent prompt, and one with nothing truncated, it is as mute.
        silent = replace(scores, prompt_id="silent", rewards=np.ones(128))
        half = replace(scores, prompt_id="half", rewards=np.arange(128) % 2.0, truncated=np.zeros(128, dtype=bool))
        both = extras_table([scores, silent, half], rules=("grpo",), seed=0, permutations=64)
        row = only(both, quantity="cv_ratio", extra=FILTERING, prompt_id=None)
        assert math.isnan(row["low"]) == (not told)
        # A prompt that tells what filtering does speaks for the pool, beside hard ones whose truncated are all wrong.
        telling = replace(half, truncated=truncated, gram=scores.gram)
        both = extras_table([scores, telling], rules=("grpo",), seed=0, permutations=64)
        row = only(both, quantity="cv_ratio", extra=FILTERING, prompt_id=None)
        assert "none of which is one of the few" not in row["method"]
        assert not math.isnan(row["low"])


def test_further_responses_lie_where_those_seen_do():
    few = FewAffected(rows=np.array([True, False, True, False]))
    assert few.unseen(np.array([1.0, 9.0, -3.0, 9.0])) == (pytest.approx(3.0 * math.sqrt(2.0)), 0.0)
    assert few.unseen(np.array([3.0, 9.0, -1.0, -9.0])) == (0.0, pytest.approx(3.0 * math.sqrt(2.0)))
    assert FewAffected(rows=np.zeros(4, dtype=bool)).unseen(np.ones(4)) == (0.0, 0.0)
    either = replace(few, either_way=True)
    assert either.unseen(np.array([1.0, 9.0, -3.0, 9.0])) == (pytest.approx(3.0 * math.sqrt(3.0)),) * 2


def test_fewer_and_more_loud_groups_by_hand():
    """One prompt: CV^2 under dynamic sampling is P (1 + CV^2) - 1, at either end of P and no narrower."""
    one = cut(64, 6)
    options = {"seed": 2, "permutations": 512}
    row = only(extras_table([one], rules=("grpo",), buffer=BUFFER, **options), quantity="cv_ratio", extra=SAMPLING)
    plain = only(cv_table([one], rules=("grpo",), **options), quantity="cv")["value"]
    silent = silent_estimate(one.rewards, 8, level=0.95, seed=None)
    middle, fewest, most = (
        math.sqrt((1.0 - share) * (1.0 + plain**2) - 1.0) / plain for share in (silent.value, silent.high, silent.low)
    )
    assert row["value"] == pytest.approx(middle, rel=0.01)
    assert middle * 0.7 * fewest / middle < row["low"] <= fewest
    assert most <= row["high"] < 1.05 * most


@pytest.mark.parametrize("advantage", ["mean", "raw"])
def test_dynamic_sampling_without_a_silent_prompts_zero(advantage):
    """Raw rewards leave a silent group its update: then the jackknife is the ratio's own."""
    one = cut(64, 6)
    table = extras_table([one], rules=("grpo",), buffer=BUFFER, advantage=advantage, seed=2, permutations=64)
    row = only(table, quantity="cv_ratio", extra=SAMPLING)
    assert row["low"] < row["value"] < row["high"]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_dynamic_sampling_makes_no_prompt_noisier_than_it_is(seed):
    """1 - ratio^2 = S / (1 - rho) where a silent group's update is 0, whatever S."""
    one = simulator.prompt("p", 128, rng=np.random.default_rng(seed), p=0.15, **LAW)
    made = extras_table([one], rules=("dr_grpo",), alphas=(), permutations=64, seed=0)
    row = only(made, quantity="cv_ratio", extra=SAMPLING)
    assert row["low"] < row["value"] < row["high"] <= 1.0
