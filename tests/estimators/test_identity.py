import math

import numpy as np
import pytest
from scipy import stats

from gradvar.errors import GradvarError
from gradvar.estimators import score_identity


def check(scores, seed=0, **more):
    return score_identity(scores @ scores.T, rng=np.random.default_rng(seed), **more)


def test_value_and_replicates_by_definition():
    scores = np.random.default_rng(0).normal(size=(9, 4))
    got = check(scores, group_size=8)

    def kappa(s):
        n = len(s)
        pairs = [s[i] @ s[j] for i in range(n) for j in range(n) if i != j]
        return 8 * np.mean(pairs) / np.mean([x @ x for x in s])

    assert got.signal.value == pytest.approx(kappa(scores))
    without = np.array([kappa(np.delete(scores, i, axis=0)) for i in range(9)])
    error = math.sqrt(8 / 9 * ((without - without.mean()) ** 2).sum())
    assert got.signal.high - got.signal.value == pytest.approx(stats.t.ppf(0.975, 8) * error)


def test_supported_rejected_undetermined():
    rng = np.random.default_rng(1)
    noise = rng.normal(size=(256, 100)) / 10
    assert check(noise).verdict == "supported"
    shifted = noise.copy()
    shifted[:, 0] += 1.0
    rejected = check(shifted)
    assert rejected.verdict == "rejected"
    assert rejected.p_value.value == 1 / 1000
    few = check(noise[:24, :3] * 10)
    assert few.verdict == "undetermined"
    assert few.n_needed > 24
    assert check(noise[:3]).verdict == "undetermined"
    assert math.isnan(check(noise[:3]).signal.low)


def test_margin_and_group_size_scale_together():
    scores = np.random.default_rng(2).normal(size=(64, 30))
    assert check(scores, group_size=16).signal.value == pytest.approx(2 * check(scores, group_size=8).signal.value)


def test_size_of_the_p_value():
    """400 null draws of low rank: P(p <= 0.05) within 5 binomial standard errors of 0.05."""
    hits = 0
    for t in range(400):
        rng = np.random.default_rng([3, t])
        # Lengths differ, so the norms do; two directions carry almost everything.
        scores = rng.normal(size=(32, 4)) * [1.0, 0.7, 0.1, 0.1] * rng.lognormal(0, 0.5, size=(32, 1))
        hits += check(scores, seed=t, flips=199).p_value.value <= 0.05
    assert abs(hits / 400 - 0.05) < 5 * math.sqrt(0.05 * 0.95 / 400)


def test_sampler_at_the_wrong_temperature_is_found():
    """Softmax policy over 12 tokens, 20 tokens a response, scored at 1.0 but sampled at 0.7 or 1.0.

    Score of one token in logit space: one-hot minus probabilities.
    """
    rng = np.random.default_rng(4)
    logits = rng.normal(size=12) * 2

    def responses(temperature):
        p = np.exp(logits / temperature)
        p /= p.sum()
        counts = rng.multinomial(20, p, size=128)
        policy = np.exp(logits) / np.exp(logits).sum()
        return counts - 20 * policy

    assert check(responses(0.7)).verdict == "rejected"
    right = check(responses(1.0))
    assert right.verdict != "rejected"
    assert right.p_value.value > 0.001


def test_same_seed_same_p():
    scores = np.random.default_rng(5).normal(size=(20, 5))
    assert check(scores, seed=1).p_value.value == check(scores, seed=1).p_value.value
    ps = {check(scores, seed=s, flips=99).p_value.value for s in range(8)}
    assert len(ps) > 1


@pytest.mark.parametrize(
    ("gram", "more", "words"),
    [
        (np.eye(1), {}, "at least 2"),
        (np.zeros((4, 4)), {}, "all scores are 0"),
        (np.eye(4), {"margin": 0.0}, "margin"),
        (np.eye(4), {"group_size": 0}, "group_size"),
        (np.eye(4), {"level": 1.0}, "level"),
    ],
)
def test_refuses(gram, more, words):
    with pytest.raises(GradvarError, match=words):
        score_identity(gram, rng=np.random.default_rng(0), **more)
