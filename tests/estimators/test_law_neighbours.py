"""Within-length variances carry their neighbours' noise, and the law's mean says so."""

import numpy as np
import pytest
from scipy import optimize

from gradvar.errors import GradvarError
from gradvar.estimators import fit_variance_law, law_table, within_length_variance
from gradvar.estimators.law import fit_exponent
from gradvar.estimators.law_data import affine_shape, beside_neighbours, checked_data, curved_shape, without_response
from gradvar.estimators.law_samples import neighbours_of, sample_of
from gradvar.estimators.spread import nearest_in_length
from tests.estimators import simulator


def neighbours(lengths, k, state=0):
    return nearest_in_length(lengths, k, rng=np.random.default_rng(state))


@pytest.mark.parametrize("k", [1, 3, 5])
def test_means_of_a_known_law_are_met_exactly(k):
    """V_i = k/(k + 1) (v_i + (1/k^2) sum_j v_j), written out, of v = 3 L^1.6: the fit finds 3 and 1.6."""
    rng = np.random.default_rng(k)
    lengths = np.exp(rng.normal(5.0, 0.6, 40))
    near = neighbours(lengths, k)
    v = 3.0 * lengths**1.6
    means = np.array([k / (k + 1) * (v[i] + sum(v[j] for j in near[i]) / k**2) for i in range(40)])
    law = fit_variance_law(lengths, means, near=near)
    assert law.exponent.value == pytest.approx(1.6, abs=1e-6)
    assert law.scale.value == pytest.approx(3.0, rel=1e-5)
    assert abs(law.exponent.value - fit_exponent(lengths, means).exponent.value) > 1e-3


def test_quasi_score_by_its_definition():
    """Root of sum (y - mu)/mu^2 dmu in (log c, beta), mu from the definition, its derivatives numerical."""
    rng = np.random.default_rng(3)
    scores, _, lengths = simulator.draw(48, rng=rng, beta=1.6)
    y = within_length_variance(scores @ scores.T, lengths, rng=np.random.default_rng(0))
    near = neighbours(lengths, 5)

    def mu(theta):
        v = np.exp(theta[0]) * lengths ** theta[1]
        return 5 / 6 * (v + v[near].sum(axis=1) / 25)

    def score(theta):
        steps = np.eye(2) * 1e-6
        slopes = [(mu(theta + h) - mu(theta - h)) / 2e-6 for h in steps]
        return [float(((y - mu(theta)) / mu(theta) ** 2) @ slope) for slope in slopes]

    root = optimize.root(score, [-5.0, 1.0]).x
    assert fit_exponent(lengths, y, near=near).exponent.value == pytest.approx(root[1], abs=1e-5)


def test_exponents_of_within_length_variances_are_unbiased():
    """Law L^1.6: taken for variances at their own length alone they give 0.04 less."""
    with_them, without = [], []
    for t in range(150):
        scores, _, lengths = simulator.draw(64, rng=np.random.default_rng([4, t]), beta=1.6)
        y = within_length_variance(scores @ scores.T, lengths, rng=np.random.default_rng(t))
        with_them.append(fit_exponent(lengths, y, near=neighbours(lengths, 5, t)).exponent.value)
        without.append(fit_exponent(lengths, y).exponent.value)
    error = np.std(with_them) / np.sqrt(150)
    assert abs(np.mean(with_them) - 1.6) < 4 * error
    assert np.mean(np.subtract(with_them, without)) > 0.02


def test_derivatives_of_every_shape():
    rng = np.random.default_rng(5)
    x = rng.normal(size=12)
    near = np.array([[(i + 1) % 12, (i + 2) % 12, -1] for i in range(12)])
    near[0] = -1
    for shape, at in ((curved_shape(x), np.array([1.2, 0.3])), (affine_shape(x / 5), np.array([0.4]))):
        seen = beside_neighbours(shape, near)
        value, slope = seen(at)
        assert value[0] == pytest.approx(shape(at)[0][0])  # without neighbours it stands alone
        for m in range(len(at)):
            step = np.eye(len(at))[m] * 1e-6
            numeric = (seen(at + step)[0] - seen(at - step)[0]) / 2e-6
            assert slope[:, m] == pytest.approx(numeric, abs=1e-7)


def test_prompts_of_few_responses_have_fewer_neighbours():
    """4 and 20 responses: the smaller prompt's 3 are filled up with -1, and rows stay in their own prompt."""
    prompts = [simulator.prompt(f"p{n}", n, rng=np.random.default_rng(n)) for n in (4, 20)]
    samples = [sample_of(s, np.ones(len(s.lengths), bool), "score", seed=0, neighbours=5, left_out=0) for s in prompts]
    near = neighbours_of(samples)
    assert near.shape == (24, 5)
    assert (near[:4, 3:] == -1).all()
    assert set(near[:4, :3].ravel()) == {0, 1, 2, 3}
    assert near[4:].min() == 4
    assert near.max() == 23


def test_a_response_left_out_is_nobodys_neighbour():
    lengths = np.exp(np.random.default_rng(6).normal(5.0, 0.6, 12))
    near = neighbours(lengths, 3)
    data = checked_data(lengths, lengths, None, None, None, 0.25, 0.95, near)
    less = without_response(data, 4, None)
    names = np.delete(np.arange(12), 4)
    for row, i in zip(less.near, names, strict=True):
        assert {int(names[j]) for j in row if j >= 0} == set(near[i].tolist()) - {4}


@pytest.mark.parametrize(
    ("near", "words"),
    [
        (np.zeros(8, dtype=int), "whole numbers"),
        (np.zeros((7, 2), dtype=int), "whole numbers"),
        (np.zeros((8, 2)), "whole numbers"),
        (np.full((8, 2), 8), "or -1 for none"),
        (np.full((8, 2), -2), "or -1 for none"),
        ((np.arange(8)[:, None] + [4, 5]) % 8, "the same prompt"),
        (np.arange(8)[:, None] + [0], "its own neighbour"),
    ],
)
def test_refuses_neighbours_that_are_none(near, words):
    lengths = np.arange(1.0, 9.0)
    with pytest.raises(GradvarError, match=words):
        fit_exponent(lengths, lengths, clusters=np.arange(8) // 4, near=near)


def test_neighbours_and_a_mean_are_not_given_together():
    lengths = np.arange(1.0, 9.0)
    with pytest.raises(GradvarError, match="give one of them"):
        fit_exponent(lengths, lengths, n_centred=8, near=(np.arange(8)[:, None] + [1, 2]) % 8)


def test_one_neighbour_is_refused_where_it_would_have_an_interval():
    prompt = simulator.prompt("p", 20, rng=np.random.default_rng(0))
    with pytest.raises(GradvarError, match="at least 2, received 1"):
        law_table([prompt], neighbours=1, seed=0)
