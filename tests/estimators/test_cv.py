import math
from dataclasses import replace

import numpy as np
import pytest

from gradvar.errors import GradvarError
from gradvar.estimators import advantages, aggregator_cv, aggregator_rho, cv_from_rho, find_rule
from gradvar.estimators.aggregation import scope_weights
from gradvar.estimators.cv import SILENT, n_to_resolve, pooled_rho, resolution, rho_estimate
from gradvar.estimators.groups import draw_groups, group_coefficients, group_moments, silent_share
from gradvar.runs.records import Estimate
from tests.estimators import references, simulator


def case(n=13, seed=0, **law):
    rng = np.random.default_rng(seed)
    return (*simulator.draw(n, rng=rng, signal=1.0, **law), rng)


def moments_of(scores, rewards, lengths, groups, rule="grpo", kind="grpo", alpha=None):
    c = group_coefficients(groups, rewards, lengths, find_rule(rule), advantage=kind, alpha=alpha, max_length=3000.0)
    return group_moments(scores @ scores.T, groups, c)


@pytest.mark.parametrize(
    ("rule", "kind", "alpha"),
    [
        ("grpo", "grpo", None),
        ("dapo", "mean", None),
        ("vl_norm", "rloo", 0.75),
        ("dr_grpo", "opo", None),
        ("grpo", "score", None),
    ],
)
def test_moments_and_all_replicates_match_the_definition(rule, kind, alpha):
    """N = 13, n = 3: four groups a permutation, one response left over."""
    scores, rewards, lengths, rng = case()
    groups = draw_groups(13, 3, 6, rng=rng)
    got = moments_of(scores, rewards, lengths, groups, rule, kind, alpha)
    permutations = [[list(map(int, g)) for g in p] for p in groups]
    arguments = {"alpha": alpha, "max_length": 3000.0}
    same, cross = references.moments(scores, rewards, lengths, permutations, rule, kind, **arguments)
    assert got.same == pytest.approx(same, rel=1e-10)
    assert got.cross == pytest.approx(cross, rel=1e-9)
    for i in range(13):
        same, cross = references.moments(scores, rewards, lengths, permutations, rule, kind, **arguments, without=i)
        assert got.same_without[i] == pytest.approx(same, rel=1e-10)
        assert got.cross_without[i] == pytest.approx(cross, rel=1e-8, abs=1e-12 * got.same)


def test_groups_are_disjoint_and_every_response_takes_part():
    groups = draw_groups(20, 6, 200, rng=np.random.default_rng(0))
    assert groups.shape == (200, 3, 6)
    assert all(len(set(p.ravel())) == 18 for p in groups)
    counts = np.bincount(groups.ravel(), minlength=20)
    # Binomial(200, 0.9): sd 4.2.
    assert (abs(counts - 180) < 22).all()


def test_inner_products_are_unbiased_and_cv_is_the_brute_force_one():
    """Means over 150 prompts of N = 24 against simulated groups, within 5 standard errors."""
    law = {"signal": 1.2, "beta": 1.0}
    for rule, alpha in (("grpo", None), ("dapo", None), ("vl_norm", 1.0)):
        found = find_rule(rule)

        def weights(lengths, found=found, alpha=alpha):
            return scope_weights(found, lengths, lambda x: x.sum(-1, keepdims=True), alpha=alpha, max_length=3000.0)

        same, cross = simulator.true_moments(
            weights,
            lambda r: advantages(r, "grpo"),
            groups=30_000,
            group_size=8,
            rng=np.random.default_rng(1),
            **law,
        )
        got = []
        for t in range(150):
            rng = np.random.default_rng([7, t])
            scores, rewards, lengths = simulator.draw(24, rng=rng, **law)
            m = moments_of(scores, rewards, lengths, draw_groups(24, 8, 16, rng=rng), rule, "grpo", alpha)
            got.append((m.same, m.cross))
        got = np.array(got)
        error = got.std(axis=0, ddof=1) / math.sqrt(len(got))
        # The truth's own error is a twentieth of these.
        assert (abs(got.mean(axis=0) - (same, cross)) < 5.5 * error).all(), rule


def test_closed_form_one():
    """Paper, table 1: lengths all known, A = 1, Var = V L, E g = mu: CV^2 = V sum x^2 L / (sum x)^2 / ||mu||^2.

    With one length the groups' weights are fixed, so the total CV is form 1: V L / (n ||mu||^2).
    """
    rng = np.random.default_rng(2)
    n, length, mean = 320, 40.0, 2.0
    scores = rng.normal(size=(n, 5)) * math.sqrt(length / 5)
    scores[:, 0] += mean
    expected = math.sqrt(length / (8 * mean**2))
    for rule, alpha in (("grpo", None), ("dapo", None), ("dr_grpo", None), ("vl_norm", 1.3)):
        got = aggregator_cv(
            scores @ scores.T,
            np.full(n, np.nan),
            np.full(n, length),
            rule,
            advantage="score",
            alpha=alpha,
            max_length=100.0,
            permutations=64,
            rng=np.random.default_rng(0),
        )
        assert got.low < expected < got.high
        assert got.value == pytest.approx(expected, rel=0.2)


def test_constant_factor_changes_no_cv_and_alpha_zero_is_dr_grpo():
    scores, rewards, lengths, _ = case(n=48)
    gram = scores @ scores.T

    def cv(rule, scale=1.0, **more):
        return aggregator_cv(gram * scale, rewards, lengths, rule, group_size=8, rng=np.random.default_rng(1), **more)

    plain = cv("dr_grpo", max_length=3000)
    for other in (
        cv("dr_grpo", max_length=7),
        cv("dr_grpo"),
        cv("token_sum"),
        cv("seq_mean_token_sum"),
        cv("vl_norm", alpha=0.0, max_length=10),
        cv("dr_grpo", scale=1e-12),
    ):
        assert other.value == pytest.approx(plain.value, rel=1e-9)
        assert (other.low, other.high) == pytest.approx((plain.low, plain.high), rel=1e-6)
    assert cv("grpo").value != pytest.approx(plain.value, rel=1e-3)


def test_same_seed_same_numbers_and_another_seed_others():
    scores, rewards, lengths, _ = case(n=48)
    one, again, other = (
        aggregator_cv(scores @ scores.T, rewards, lengths, "grpo", rng=np.random.default_rng(s)) for s in (3, 3, 4)
    )
    assert one == again
    assert one.value != other.value


def test_unverified_responses_are_left_out():
    scores, rewards, lengths, _ = case(n=52)
    gram = scores @ scores.T
    holes = rewards.copy()
    holes[[1, 5, 6, 50]] = np.nan
    keep = ~np.isnan(holes)
    got = aggregator_cv(gram, holes, lengths, "grpo", rng=np.random.default_rng(0))
    expected = aggregator_cv(
        gram[np.ix_(keep, keep)], rewards[keep], lengths[keep], "grpo", rng=np.random.default_rng(0)
    )
    assert got == expected
    assert got.n == 48


@pytest.mark.slow
@pytest.mark.parametrize("signal", [1.2, 0.4])
def test_rho_is_covered(signal):
    """300 draws at N = 64 and 128, every draw counted: at least 93% less 4 binomial standard errors."""
    law = {"signal": signal, "beta": 1.0, "decay": 0.95}
    found = find_rule("grpo")
    same, cross = simulator.true_moments(
        lambda lengths: scope_weights(found, lengths, lambda x: x.sum(-1, keepdims=True), alpha=None, max_length=None),
        lambda r: advantages(r, "grpo"),
        groups=120_000,
        group_size=8,
        rng=np.random.default_rng(1),
        **law,
    )
    for n in (64, 128):
        hits = 0
        for t in range(300):
            rng = np.random.default_rng([9, n, t])
            scores, rewards, lengths = simulator.draw(n, rng=rng, **law)
            rho, _ = aggregator_rho(scores @ scores.T, rewards, lengths, "grpo", rng=rng, permutations=256)
            hits += rho.low <= cross / same <= rho.high
        assert hits / 300 > 0.93 - 4 * math.sqrt(0.93 * 0.07 / 300), (n, hits)


def estimate(value, low, high, n=64):
    return Estimate(value=value, low=low, high=high, level=0.95, method="m", n=n, clusters=1, seed=None)


def test_cv_is_the_image_of_rho():
    resolved = cv_from_rho(estimate(0.2, 0.1, 0.5))
    assert (resolved.value, resolved.low, resolved.high) == pytest.approx((2.0, 1.0, 3.0))
    unresolved = cv_from_rho(estimate(0.1, -0.1, 0.2))
    assert math.isnan(unresolved.value)
    assert (unresolved.low, unresolved.high) == (2.0, math.inf)
    hopeless = cv_from_rho(estimate(-0.3, -0.5, -0.1))
    assert (hopeless.low, hopeless.high) == (math.inf, math.inf)
    none = cv_from_rho(estimate(0.4, math.nan, math.nan))
    assert all(math.isnan(x) for x in (none.value, none.low, none.high))
    assert cv_from_rho(estimate(1.0, 0.5, 1.2)).low == 0.0


def test_resolution_and_the_n_needed():
    assert resolution(estimate(0.2, 0.1, 0.5)) == "resolved"
    assert resolution(estimate(0.2, -0.1, 0.5)) == "unresolved"
    missing = estimate(math.nan, math.nan, math.nan)
    assert resolution(replace(missing, method=f"m; {SILENT}")) == SILENT
    assert resolution(missing) == "unresolved"
    assert n_to_resolve(estimate(0.2, 0.1, 0.5), 8) == (64, False)
    # On the scale of log(1 - rho): the half-width against the distance from 0.
    rho = estimate(0.1, 1 - 0.9 * math.exp(0.3), 1 - 0.9 * math.exp(-0.3))
    assert n_to_resolve(rho, 8) == (math.ceil(64 * (0.3 / -math.log(0.9)) ** 2), False)
    assert n_to_resolve(estimate(-0.5, -0.7, -0.1), 8) == (math.inf, False)
    assert n_to_resolve(estimate(0.2, math.nan, math.nan), 8) == (65, True)
    assert n_to_resolve(replace(estimate(0.2, math.nan, math.nan), n=20), 8) == (24, True)


def test_what_is_unresolved_takes_more_than_was_used():
    """However wide the interval: the less there is to see, the more it takes, and without signal it is a bound."""
    for n, clusters in ((64, 1), (256, 4), (200, 3)):
        for value in (-0.4, -0.01, 0.0, 1e-4, 0.01, 0.3, 1.1):
            for high in (0.001, 0.05, 0.6, 0.99, 1.3):
                rho = replace(estimate(value, -0.3, max(high, value)), n=n, clusters=clusters)
                needed = n_to_resolve(rho, 8)
                assert needed.n >= n // clusters + 1, (value, high)
                assert needed.at_least == (value <= 0.0 or value >= 1.0)


def test_noise_alone_is_unresolved_and_keeps_its_negative_square():
    rng = np.random.default_rng(6)
    scores = rng.normal(size=(64, 200))
    rho, moments = aggregator_rho(
        scores @ scores.T, np.arange(64) % 2.0, np.full(64, 9.0), "grpo", rng=np.random.default_rng(0)
    )
    assert rho.low < 0 < rho.high
    assert rho.value == moments.cross / moments.same
    assert math.isnan(cv_from_rho(rho).value)
    negative = [
        aggregator_rho(
            (s := np.random.default_rng(t).normal(size=(32, 40))) @ s.T,
            np.arange(32) % 2.0,
            np.ones(32),
            "grpo",
            rng=np.random.default_rng(0),
            permutations=32,
        )[0].value
        for t in range(20)
    ]
    assert min(negative) < 0 < max(negative)


def test_fewer_than_three_groups_give_no_interval():
    scores, rewards, lengths, _ = case(n=23)
    rho, _ = aggregator_rho(scores @ scores.T, rewards, lengths, "grpo", rng=np.random.default_rng(0))
    assert math.isfinite(rho.value)
    assert math.isnan(rho.low)
    assert "no interval below 3 groups" in rho.method
    assert math.isnan(aggregator_cv(scores @ scores.T, rewards, lengths, "grpo", rng=np.random.default_rng(0)).value)


def test_equal_rewards_are_silent_not_a_crash():
    scores, _, lengths, _ = case(n=48)
    rho, moments = aggregator_rho(scores @ scores.T, np.full(48, 0.3), lengths, "dapo", rng=np.random.default_rng(0))
    assert moments.same == 0.0
    assert math.isnan(rho.value)
    assert "all rewards equal" in rho.method
    assert math.isnan(cv_from_rho(rho).low)
    nothing, _ = aggregator_rho(np.zeros((48, 48)), np.arange(48) % 2.0, lengths, "dapo", rng=np.random.default_rng(0))
    assert resolution(nothing) == "no gradient: all are 0"


def test_repeated_responses_have_a_defined_answer():
    """All tokens identical: s the same vector everywhere. E||ghat||^2 = 0 with a centred advantage and one length."""
    gram = np.full((32, 32), 2.0)
    rho, _ = aggregator_rho(gram, np.arange(32) % 2.0, np.full(32, 5.0), "grpo", rng=np.random.default_rng(0))
    assert math.isnan(rho.value) or abs(rho.value) < 1.1
    one, _ = aggregator_rho(
        gram, np.zeros(32), np.full(32, 5.0), "grpo", advantage="score", rng=np.random.default_rng(0)
    )
    assert one.value == pytest.approx(1.0)


def test_a_huge_outlier_widens():
    scores, rewards, lengths, _ = case(n=64)
    scores[5] *= 1e4
    rho, _ = aggregator_rho(scores @ scores.T, rewards, lengths, "grpo", rng=np.random.default_rng(0))
    assert math.isfinite(rho.value)
    assert not rho.low > 0


def test_pooled_is_the_ratio_of_sums_and_silent_prompts_count_with_zeros():
    ms = []
    for seed in range(5):
        scores, rewards, lengths, rng = case(n=40, seed=seed)
        ms.append(moments_of(scores, rewards, lengths, draw_groups(40, 8, 64, rng=rng)))
    here, there = pooled_rho(ms, group_size=8, level=0.95)
    assert here.value == pytest.approx(sum(m.cross for m in ms) / sum(m.same for m in ms))
    assert here.value == there.value
    assert here.clusters == 5
    assert here.low < here.value < here.high
    assert there.low < there.value < there.high
    few = pooled_rho(ms[:3], group_size=8, level=0.95)[1]
    assert math.isnan(few.low)
    assert "below 4 prompts" in few.method
    zero = np.zeros(40)
    silent = replace(
        ms[0], same=0.0, cross=0.0, same_without=zero, cross_without=zero, bend=np.zeros((2, 2)), pairs=np.zeros((1, 1))
    )
    assert pooled_rho([*ms, silent], group_size=8, level=0.95)[0].value == pytest.approx(here.value)
    single = pooled_rho(ms[:1], group_size=8, level=0.95)[0]
    alone = rho_estimate(ms[0], group_size=8, level=0.95)
    assert (single.value, single.low, single.high) == pytest.approx((alone.value, alone.low, alone.high))
    assert math.isnan(pooled_rho([silent], group_size=8, level=0.95)[0].value)


def test_silent_share_by_listing():
    rewards = np.array([0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.5])
    for n in (1, 2, 3, 4, 8):
        assert silent_share(rewards, n) == pytest.approx(references.silent_share(list(rewards), n))
    with pytest.raises(GradvarError, match="group size 9"):
        silent_share(rewards, 9)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rule": "nope"}, "unknown rule"),
        ({"advantage": "nope"}, "unknown advantage"),
        ({"rule": "vl_norm"}, "needs alpha"),
        ({"group_size": 20}, "at least 40 responses"),
        ({"group_size": 0}, "at least 1"),
        ({"rewards": np.zeros(3)}, "rewards"),
        ({"rewards": np.full(32, np.nan)}, "no response has a reward"),
        ({"lengths": np.zeros(32)}, "lengths must be positive"),
        ({"level": 2.0}, "level"),
    ],
)
def test_refuses(change, words):
    scores, rewards, lengths, _ = case(n=32)
    arguments = {"gram": scores @ scores.T, "rewards": rewards, "lengths": lengths, "rule": "grpo"} | change
    with pytest.raises(GradvarError, match=words):
        aggregator_cv(**arguments, rng=np.random.default_rng(0))


def test_a_score_gram_is_taken_as_it_is():
    scores, rewards, lengths, _ = case(n=32)

    class Gram:
        def gram(self):
            return scores @ scores.T

    assert aggregator_cv(Gram(), rewards, lengths, "grpo", rng=np.random.default_rng(0)) == aggregator_cv(
        scores @ scores.T, rewards, lengths, "grpo", rng=np.random.default_rng(0)
    )
