import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from gradvar.estimators import advantages, find_rule
from gradvar.estimators.group_products import Layout
from gradvar.estimators.groups import draw_groups, group_coefficients, moments_of_kinds
from gradvar.estimators.ratios import cv_ratio, cv_ratio_across, pooled_cv_ratio
from gradvar.estimators.tails import PromptTails
from tests.estimators import simulator


def moments(n=64, seed=0, rules=("dapo", "grpo"), permutations=64, alpha=None, **law):
    rng = np.random.default_rng(seed)
    scores, rewards, lengths = simulator.draw(n, rng=rng, **{"signal": 1.0, **law})
    groups = draw_groups(n, 8, permutations, rng=rng)
    kinds = [
        group_coefficients(groups, rewards, lengths, find_rule(rule), advantage="grpo", alpha=alpha, max_length=3000.0)
        for rule in rules
    ]
    made = moments_of_kinds(scores @ scores.T, Layout(groups=groups, kinds=np.stack(kinds), n_responses=len(scores)))
    return made, scores, rewards, lengths


def test_ratio_matches_its_definition_and_is_one_for_itself():
    (a, b), *_ = moments()
    ratio = cv_ratio(a, b, group_size=8, level=0.95)
    expected = math.sqrt((a.same / a.cross - 1) / (b.same / b.cross - 1))
    assert ratio.value == pytest.approx(expected, rel=1e-12)
    assert ratio.low < ratio.value < ratio.high
    same = cv_ratio(b, b, group_size=8, level=0.95)
    assert (same.value, same.low, same.high) == (1.0, 1.0, 1.0)
    lost = cv_ratio(replace(a, cross=-0.1), b, group_size=8, level=0.95)
    assert math.isnan(lost.value)
    assert (lost.low, lost.high) == (0.0, math.inf)
    for nothing in (replace(a, cross=0.0), replace(a, cross=a.same)):
        lost = cv_ratio(nothing, b, group_size=8, level=0.95)
        assert (math.isnan(lost.value), lost.low, lost.high) == (True, 0.0, math.inf)
    pooled = pooled_cv_ratio([b, b], [b, b], group_size=8, level=0.95)
    assert (pooled.value, pooled.low, pooled.high) == (1.0, 1.0, 1.0)
    one = pooled_cv_ratio([a], [b], group_size=8, level=0.95)
    assert (one.value, one.low, one.high) == (ratio.value, ratio.low, ratio.high)


def test_ratio_for_prompts_like_these_by_leaving_out_prompts():
    pairs = [moments(seed=k)[0] for k in range(5)]
    ones, twos = [p[0] for p in pairs], [p[1] for p in pairs]
    here = pooled_cv_ratio(ones, twos, group_size=8, level=0.95)
    ratio = cv_ratio_across(ones, twos, replace(here, value=math.nan), level=0.95)

    def log_ratio(kept):
        cv = [math.sqrt(sum(m[k].same - m[k].cross for m in kept) / sum(m[k].cross for m in kept)) for k in (0, 1)]
        return math.log(cv[0] / cv[1])

    whole = log_ratio(pairs)
    left = [log_ratio(pairs[:k] + pairs[k + 1 :]) for k in range(5)]
    half = stats.t.ppf(0.975, 4) * math.sqrt(4 / 5 * sum((x - sum(left) / 5) ** 2 for x in left))
    assert ratio.value == pytest.approx(math.exp(whole))
    assert (ratio.low, ratio.high) == pytest.approx((math.exp(whole - half), math.exp(whole + half)))
    assert "prompts like these" in ratio.method
    wide = cv_ratio_across(ones, twos, here, level=0.95)
    assert (wide.low, wide.high) == (min(ratio.low, here.low), max(ratio.high, here.high))
    few = cv_ratio_across(ones[:3], twos[:3], here, level=0.95)
    assert math.isnan(few.value)
    assert math.isnan(few.low)
    assert "below 4 prompts" in few.method


@pytest.mark.slow
def test_ratio_is_covered_where_short_responses_count():
    """E[g | L] moves: without unseen responses 66% of the intervals covered, 300 draws."""
    law = {"beta": 1.0, "signal": 1.0, "decay": 0.9, "drift": 0.3, "reward_slope": -0.7}

    def coefficients(lengths, rewards):
        a = advantages(rewards, "grpo")
        inverse = 1.0 / lengths
        return [inverse / inverse.sum(axis=1, keepdims=True) * a, inverse * a]

    mean, same, _ = simulator.moments_by_kind(
        coefficients, groups=400_000, group_size=8, rng=np.random.default_rng(5), **law
    )
    cv = np.sqrt(same / (mean**2).sum(axis=1) - 1)
    covered, bare, draws = 0, 0, 200
    for t in range(draws):
        (a, b), scores, rewards, lengths = moments(
            n=128, seed=[4, t], rules=("vl_norm", "grpo"), permutations=128, alpha=1.0, **law
        )
        described = PromptTails.of(scores @ scores.T, rewards, lengths, advantage="grpo")
        tails = described.beside((find_rule("vl_norm"), 1.0), (find_rule("grpo"), None))
        ratio = cv_ratio(a, b, group_size=8, level=0.95, tails=tails)
        covered += ratio.low <= cv[0] / cv[1] <= ratio.high
        ratio = cv_ratio(a, b, group_size=8, level=0.95)
        bare += ratio.low <= cv[0] / cv[1] <= ratio.high
    # Three standard errors of 200 draws at 93% are 5.4%.
    assert covered / draws > 0.88, covered / draws
    assert bare < covered
