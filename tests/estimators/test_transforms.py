import math
from dataclasses import replace

import numpy as np
import pytest

from gradvar.errors import GradvarError
from gradvar.estimators import aggregation_weights, find_rule
from gradvar.estimators.groups import draw_groups, group_coefficients, group_moments, loud_groups
from gradvar.estimators.transforms import authors_vl_norm, overlong_penalty, soft_overlong
from tests.estimators import references, simulator
from tests.estimators.test_tables import prompts


def test_soft_overlong_is_dapos_equation_13():
    lengths = [100.0, 800.0, 801.0, 900.0, 1000.0, 1001.0, 5000.0]
    np.testing.assert_allclose(
        overlong_penalty(lengths, max_length=1000, buffer=200), [0.0, 0.0, -0.005, -0.5, -1.0, -1.0, -1.0]
    )
    (g,) = prompts(1, targets=("a",))
    g = replace(g, rewards=np.where(np.arange(40) == 3, np.nan, g.rewards))
    got = soft_overlong(g, buffer=100, max_length=300)
    assert math.isnan(got.rewards[3])
    assert got.rewards[g.lengths > 300].max() <= 0.0
    assert (got.rewards[np.isfinite(g.rewards)] <= g.rewards[np.isfinite(g.rewards)]).all()
    with pytest.raises(GradvarError, match="buffer"):
        soft_overlong(g, buffer=0)
    with pytest.raises(GradvarError, match="max_length"):
        soft_overlong(replace(g, max_length=0), buffer=10)


def test_authors_vl_norm_is_the_papers_with_the_whole_batch_as_scope():
    """Folded advantage, then the loss averaged over all (N, M) entries of the padded matrix."""
    rng = np.random.default_rng(0)
    lengths, a, m = rng.integers(5, 100, 12).astype(float), rng.normal(size=12), 128
    labels = np.repeat([0, 1, 2], 4)
    ours = aggregation_weights("vl_norm", lengths, alpha=0.75, max_length=m) * a
    np.testing.assert_allclose(authors_vl_norm(a, lengths, 0.75) / (12 * m), ours, rtol=1e-12)
    inside = aggregation_weights("vl_norm", lengths, alpha=0.75, max_length=m, groups=labels) * a
    assert not np.allclose(authors_vl_norm(a, lengths, 0.75) / (12 * m), inside)
    # Where all groups hold the same lengths the two scopes agree.
    equal = np.tile([10.0, 20.0, 40.0, 80.0], 3)
    np.testing.assert_allclose(
        authors_vl_norm(a, equal, 0.75) / (12 * m),
        aggregation_weights("vl_norm", equal, alpha=0.75, max_length=m, groups=labels) * a,
        rtol=1e-12,
    )
    with pytest.raises(GradvarError, match="same responses"):
        authors_vl_norm(a, lengths[:3], 1.0)


@pytest.mark.parametrize(("rule", "alpha"), [("grpo", None), ("dapo", None), ("dr_grpo", None), ("vl_norm", 1.0)])
def test_overlong_filtering_by_definition(rule, alpha):
    rng = np.random.default_rng(1)
    _, rewards, lengths = simulator.draw(24, rng=rng)
    masked = lengths > np.median(lengths)
    groups = draw_groups(24, 4, 20, rng=rng)
    got = group_coefficients(
        groups, rewards, lengths, find_rule(rule), advantage="mean", alpha=alpha, max_length=99.0, masked=masked
    )
    empty = 0
    for p in range(20):
        for b in range(6):
            members = groups[p, b]
            a = references.advantage(list(rewards[members]), "mean")
            keep = [m for m in range(4) if not masked[members[m]]]
            expected = np.zeros(4)
            empty += not keep
            if keep:
                expected[keep] = references.weights(rule, list(lengths[members][keep]), alpha=alpha, max_length=99.0)
            np.testing.assert_allclose(got[p, b], expected * a, rtol=1e-12, atol=1e-15)
    assert empty > 0, "no group without a response left was tried"


def test_dynamic_sampling_by_definition():
    """Only groups with differing rewards count, in the means and in every replicate."""
    rng = np.random.default_rng(2)
    scores, rewards, lengths = simulator.draw(15, rng=rng, signal=1.0, p=0.3)
    groups = draw_groups(15, 3, 8, rng=rng)
    kept = loud_groups(groups, rewards)
    assert 0 < kept.sum() < kept.size
    c = group_coefficients(groups, rewards, lengths, find_rule("grpo"), advantage="grpo")
    got = group_moments(scores @ scores.T, groups, c, kept)
    loud = [
        [list(map(int, g)) for g, k in zip(p, held, strict=True) if k] for p, held in zip(groups, kept, strict=True)
    ]
    same, cross = references.moments(scores, rewards, lengths, loud, "grpo", "grpo")
    assert (got.same, got.cross) == pytest.approx((same, cross))
    for i in range(15):
        same, cross = references.moments(scores, rewards, lengths, loud, "grpo", "grpo", without=i)
        assert (got.same_without[i], got.cross_without[i]) == pytest.approx((same, cross), nan_ok=True)
    everything = group_moments(scores @ scores.T, groups, c)
    # Silent groups add zeros to E||ghat||^2: its mean over all groups is smaller by their share.
    assert everything.same == pytest.approx(got.same * kept.mean())
