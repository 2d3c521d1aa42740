import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from gradvar.estimators import find_rule
from gradvar.estimators.ratios import cv_ratio
from gradvar.estimators.tails import Beyond, LengthTails, PromptTails, Tail
from tests.estimators import references
from tests.estimators.test_ratios import moments

NEITHER = Tail(side=0, power=0.0)


def variant(name, alpha=None):
    return find_rule(name), alpha


def test_growth_and_sides():
    _, scores, rewards, lengths = moments(n=40)
    gram = references.gram_of(scores)
    norms = references.advantage(rewards, "grpo") ** 2 * np.array([s @ s for s in scores])
    growth = np.polyfit(np.log(lengths), np.log(norms), 1)[0]

    described = PromptTails.of(gram, rewards, lengths, advantage="grpo", max_length=3000)

    def tails(rule, reference=None):
        return described.alone(rule) if reference is None else described.beside(rule, reference)

    # Over grpo: a short response would lower the ratio, a long one raise it unless the weights fall as fast or faster.
    expected = {("dapo", None): (-1, 1, 0.0), ("vl_norm", 0.5): (-1, 1, 0.5), ("vl_norm", 2.0): (-1, -1, 1.0)}
    for (name, alpha), (short, long, falls) in expected.items():
        found = tails(variant(name, alpha), variant("grpo"))
        assert (found.short.side, found.long.side) == (short, long)
        assert found.short.power == pytest.approx(4 + falls / 2 - growth)
        assert found.long.power == pytest.approx(2 * growth - 2 * falls)
    assert tails(variant("grpo"), variant("dapo")).short.side == 1
    assert tails(variant("vl_norm", 1.0), variant("grpo")).long.side == 0
    # Of two whose sums are bounded a short response makes the one noisier whose weights fall more.
    steep, flat = tails(variant("vl_norm", 2.0), variant("dapo")), tails(variant("dapo"), variant("vl_norm", 2.0))
    assert (steep.short.side, flat.short.side) == (1, -1)
    assert steep.short.power == flat.short.power == pytest.approx(3 - growth)
    assert tails(variant("dapo"), variant("dr_grpo")).short.side == 0
    # Alone: a longer response can only make the noise larger, a shorter one grpo's.
    alone = tails(variant("dr_grpo"))
    assert (alone.short.side, alone.long.side) == (0, 1)
    assert alone.long.power == pytest.approx(growth)
    grpo = tails(variant("grpo"))
    assert (grpo.short.side, grpo.long.side) == (1, 1)
    assert (grpo.short.power, grpo.long.power) == pytest.approx((2.5 - growth, growth - 2))
    turned = described.angle(variant("vl_norm", 2.0))
    assert (turned.short.side, turned.long.side) == (-1, -1)
    assert turned.short.power == pytest.approx(3 - growth)  # at most
    silent = PromptTails.of(gram, np.ones(40), lengths, advantage="grpo").beside(variant("dapo"), variant("grpo"))
    assert silent.short.power == 4.0
    plain = PromptTails.of(gram, np.zeros(40), lengths, advantage="score").alone(variant("grpo"))
    slope = np.polyfit(np.log(lengths), np.log(np.diagonal(gram)), 1)[0]
    assert plain.short.power == pytest.approx(2.5 - slope)


def test_unseen_responses_by_their_definition():
    lengths = np.array([100.0, 110.0, 120.0, 130.0, 140.0, 150.0, 160.0, 170.0, 180.0, 190.0])
    influence = np.linspace(0.01, 0.1, 10)
    logs = [math.log(x) for x in lengths]
    mean = sum(logs) / 10
    reach = math.sqrt(sum((x - mean) ** 2 for x in logs) / 9) * stats.norm.ppf(1 - 1 / 40)

    def unseen(lengths=lengths, influence=influence, longest=math.inf, **ends):
        beyond = Beyond(lengths=lengths, longest=longest)
        return LengthTails(**{"beyond": beyond, "short": NEITHER, "long": NEITHER, **ends}).unseen(influence)

    size = math.sqrt(sum(u**2 for u in influence[:8]) / 8)
    step = sum(logs[:8]) / 8 - (mean - reach)
    assert unseen(short=Tail(side=-1, power=2.5)) == pytest.approx((size * math.exp(2.5 * step), 0.0))
    assert unseen(short=Tail(side=1, power=-3.0)) == pytest.approx((0.0, size))
    size = math.sqrt(sum(u**2 for u in influence[2:]) / 8)
    step = mean + reach - sum(logs[2:]) / 8
    long = Tail(side=1, power=1.5)
    assert unseen(long=long) == pytest.approx((0.0, size * math.exp(1.5 * step)))
    # No response is longer than the run allows.
    capped = math.log(195.0) - sum(logs[2:]) / 8
    assert unseen(long=long, longest=195.0) == pytest.approx((0.0, size * math.exp(1.5 * capped)))
    assert unseen(long=long, longest=190.0) == (0.0, 0.0)
    seen = np.concatenate([[5.0], lengths])
    assert unseen(seen, np.append(influence, 0.1), short=Tail(side=-1, power=2.5)) == (0.0, 0.0)
    assert unseen(np.full(10, 7.0), short=Tail(side=1, power=1.0), long=long) == (0.0, 0.0)
    both = unseen(short=Tail(side=1, power=0.0), long=Tail(side=1, power=0.0))
    one, two = unseen(short=Tail(side=1, power=0.0))[1], unseen(long=Tail(side=1, power=0.0))[1]
    assert both == pytest.approx((0.0, math.hypot(one, two)))


def test_ends_are_those_of_the_few_that_carry_the_noise():
    """The nearest are of large advantage, a third of these at most; as many as they are say how far out one may lie."""
    lengths = np.array([7.0 * 1.1**k for k in (3, 0, 1, 2, *range(4, 60))])
    order, logs = np.argsort(lengths), np.log(lengths)
    for right in ((10, 11, 12, 40), (8, 10, 12, 15, 40, 43), (30,)):
        rewards = np.zeros(60)
        rewards[order[list(right)]] = 1.0
        beyond = PromptTails.of(np.eye(60), rewards, lengths, advantage="grpo").beyond
        taken = max(len(right) // 3, 1)
        out = stats.norm.ppf(1.0 - 1.0 / (4.0 * len(right))) * logs.std(ddof=1)
        shortest, longest = [order[k] for k in right[:taken]], [order[k] for k in right[-taken:]]
        nearest, step = beyond.below
        assert sorted(nearest) == sorted(shortest)
        assert step == pytest.approx(np.mean([logs[i] for i in shortest]) - (logs.mean() - out))
        if max(logs[longest]) < logs.mean() + out:
            nearest, step = beyond.above
            assert sorted(nearest) == sorted(longest)
            assert step == pytest.approx(logs.mean() + out - np.mean([logs[i] for i in longest]))
        else:
            assert beyond.above is None
    half = PromptTails.of(np.eye(60), np.arange(60) % 2.0, lengths, advantage="grpo").beyond
    assert half.below is None or sorted(half.below[0]) == sorted(order[:8])


def test_only_the_side_that_an_unseen_response_would_take_is_widened():
    (a, b), _, _, lengths = moments(seed=3)
    assert lengths.min() > 20
    plain = cv_ratio(a, b, group_size=8, level=0.95)
    below, above = (
        cv_ratio(
            a,
            b,
            group_size=8,
            level=0.95,
            tails=LengthTails(beyond=Beyond(lengths=lengths), short=Tail(side=side, power=4.0), long=NEITHER),
        )
        for side in (-1, 1)
    )
    assert below.low < plain.low
    assert below.high == plain.high
    assert above.low == plain.low
    assert above.high > plain.high
    assert below.value == above.value == plain.value


def test_rounding_of_an_advantage_that_is_zero_is_no_slope():
    """A = r - mean leaves 1e-17 where a reward is the mean: the squares are 0, not 1e-34 of anything."""
    _, scores, _, lengths = moments(n=48)
    rewards = np.tile([0.1, 0.2, 0.3], 16)
    described = PromptTails.of(references.gram_of(scores), rewards, lengths, advantage="mean")
    found = described.alone(variant("grpo"))
    held = rewards != 0.2
    norms = (rewards[held] - 0.2) ** 2 * np.array([s @ s for s in scores])[held]
    assert found.short.power == pytest.approx(2.5 - np.polyfit(np.log(lengths[held]), np.log(norms), 1)[0])


def test_a_large_power_overflows_nothing():
    lengths = np.linspace(10.0, 400.0, 30)
    steep = LengthTails(beyond=Beyond(lengths=lengths), short=Tail(side=1, power=1e4), long=Tail(side=1, power=1e4))
    assert steep.unseen(np.ones(30))[1] > 1e100


def test_a_rule_is_unbounded_by_its_formula_not_its_name():
    _, scores, rewards, lengths = moments(n=40)
    gram = references.gram_of(scores)
    own = replace(find_rule("grpo"), name="mine", aliases=())
    described = PromptTails.of(gram, rewards, lengths, advantage="grpo")
    bounded = find_rule("vl_norm")
    for rule, alpha, side in ((own, None, 1), (bounded, 1.0, 1), (bounded, 0.5, 0), (find_rule("dapo"), None, 0)):
        assert described.alone((rule, alpha)).short.side == side
    # Of weights whose sum is kept the shortest takes the most, whatever alpha.
    assert described.alone((bounded, 2.0)).short.power == pytest.approx(2.0 - described.growth)
    # One that divides by the length twice, twice as fast.
    steep = replace(own, name="steep", formula=lambda lengths, n, total, m, alpha: lengths**-2.0 / n)
    assert described.alone((steep, None)).short.power == pytest.approx(4.5 - described.growth)


def test_slopes_over_alpha_are_lowered_by_the_shortest_responses_influence():
    _, scores, rewards, lengths = moments(n=40)
    lengths = np.maximum(lengths, 70.0)
    described = PromptTails.of(references.gram_of(scores), rewards, lengths, advantage="grpo")
    assert described.growth < 2.0
    influence = np.random.default_rng(1).normal(size=(40, 3))
    shortest = sorted(range(40), key=lambda i: lengths[i])[:8]
    logs = [math.log(x) for x in lengths]
    edge = sum(logs) / 40 - np.std(logs, ddof=1) * stats.norm.ppf(1 - 1 / 160)
    assert edge < min(logs)
    step = sum(logs[i] for i in shortest) / 8 - edge
    for k in range(3):
        size = math.sqrt(sum(influence[i, k] ** 2 for i in shortest) / 8)
        expected = size * math.exp((2.0 - described.growth) * step)
        assert described.lower_slopes(influence)[k] == pytest.approx(expected)
    alike = PromptTails.of(references.gram_of(scores), rewards, np.full(40, 90.0), advantage="grpo")
    assert alike.lower_slopes(influence).tolist() == [0.0, 0.0, 0.0]
