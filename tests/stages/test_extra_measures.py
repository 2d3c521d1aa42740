"""Probes and prefixes are additions to a run: measured where missing, by target, beside Grams that stay."""

import numpy as np
import pytest

import gradvar
from gradvar.errors import GradvarError
from gradvar.estimators import audit_table, prefix_growth, token_covariance
from gradvar.gradients import measure_scores
from gradvar.models import find_model, load_model
from gradvar.runs import MeasureConfig, SampleConfig
from gradvar.stages import measure
from tests.stages.small import make_run, responses, write_responses


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path)


def files(run, kind):
    return {path.name: path.read_bytes() for path in (run.path / kind).iterdir()}


def engine(run, prompt_id, targets, **options):
    """The engine by hand: what the run should hold of a prompt."""
    made = run.config(SampleConfig)
    model = load_model(find_model(made.model), dtype="float32", device="cpu")
    prompt = next(p for p in run.prompts() if p.prompt_id == prompt_id)
    rollouts = run.rollouts(prompt_id)
    masks = [[1] * r.length if r.loss_mask is None else list(r.loss_mask) for r in rollouts]
    return measure_scores(
        model, list(prompt.token_ids), [list(r.token_ids) for r in rollouts], targets, loss_masks=masks, **options
    )


def test_probes_and_prefixes_of_a_first_measurement(run):
    measure(run, {"targets": ("last:qkv",), "probes": 3, "prefixes": 4, "seed": 7})
    run = gradvar.open_run(run.path)
    assert run.taus().keys() == run.prefixes().keys() == {(p, t) for p in run.prompt_ids for t in run.targets}
    expected = engine(run, "1", "last:qkv", probes=3, prefixes=4, seed=7)
    for key in run.targets:
        tau, norms = run.taus()["1", key], run.prefixes()["1", key]
        np.testing.assert_allclose(tau.value, expected.taus[key].value, rtol=1e-5)
        np.testing.assert_allclose(tau.error, expected.taus[key].error, rtol=1e-4)
        assert (tau.probes, tau.seed) == (3, 7)
        np.testing.assert_array_equal(norms.lengths, expected.prefixes[key].lengths)
        np.testing.assert_allclose(norms.value, expected.prefixes[key].value, rtol=1e-5)
    assert run.config(MeasureConfig).probes == 3


def test_what_is_asked_for_later_is_added_and_the_rest_stays(run):
    measure(run, {"targets": ("last:v",)})
    grams, measures = files(run, "grams"), run.measures("0")
    assert run.taus() == run.prefixes() == {}

    measure(run, {"probes": 2})
    assert files(run, "grams") == grams
    once = run.taus()
    assert {tau.probes for tau in once.values()} == {2}
    for old, new in zip(measures.policy_logprobs, run.measures("0").policy_logprobs, strict=True):
        np.testing.assert_array_equal(new, old)

    measure(run, {"prefixes": 3})
    assert files(run, "grams") == grams
    for key, tau in run.taus().items():
        np.testing.assert_array_equal(tau.value, once[key].value)
    assert {norms.count for norms in run.prefixes().values()} == {3}

    before = files(run, "measures")
    measure(run, {})
    measure(run, {"probes": 0, "prefixes": 0})  # asking for none takes none away
    assert files(run, "measures") == before

    measure(run, {"probes": 4})
    assert {tau.probes for tau in run.taus().values()} == {4}
    assert {norms.count for norms in run.prefixes().values()} == {3}
    measure(run, {"probes": 4, "seed": 1})
    assert {tau.seed for tau in run.taus().values()} == {1}
    assert files(run, "grams") == grams


def test_a_new_target_gets_what_the_others_have(run):
    measure(run, {"targets": ("last:v",), "probes": 2, "prefixes": 2})
    once = run.taus()
    measure(run, {"targets": ("last:down",)})
    assert len(run.targets) == 2
    assert run.taus().keys() == run.prefixes().keys() == {(p, t) for p in run.prompt_ids for t in run.targets}
    for key, tau in once.items():
        np.testing.assert_array_equal(run.taus()[key].value, tau.value)


def test_a_grown_prompt_is_measured_whole_again(run):
    measure(run, {"targets": ("last:v",), "probes": 2})
    old = run.taus()["0", run.targets[0]].value
    write_responses(run, "0", responses((5, 9, 3, 7, 6, 8, 4, 4), seed=0)[:6] + responses((4, 4), seed=9))
    assert len(run.taus()["0", run.targets[0]].value) == 6  # still those that were measured
    measure(run, {})
    new = run.taus()["0", run.targets[0]].value
    assert len(new) == 8
    np.testing.assert_allclose(new[:6], old, rtol=1e-5)
    assert len(run.taus()["1", run.targets[0]].value) == 6


def test_the_estimators_take_what_the_run_returns(tmp_path):
    run = make_run(tmp_path, lengths=tuple(range(3, 15)))
    measure(run, {"targets": ("last:qkv",), "probes": 2, "prefixes": 3})
    taus = {key: tau.value for key, tau in run.taus().items()}
    groups = [group for target in run.targets for group in run.scores(target)]
    table = audit_table(groups, group_size=2, permutations=8, taus=taus, seed=0)
    rows = table[table["assumption"] == 1]
    assert rows["value"].notna().any()
    assert not (rows["verdict"] == "not measured").any()
    first = groups[0]
    tau = run.taus()[first.prompt_id, first.target]
    shares = token_covariance(first.gram, tau.value, tau.error, first.lengths, first.rewards)
    assert np.isfinite(shares[0].share.value)
    norms = run.prefixes()[first.prompt_id, first.target]
    assert np.isfinite(prefix_growth(norms.value, norms.lengths).within.value)
    np.testing.assert_allclose(norms.value[:, -1], np.diagonal(first.gram), rtol=1e-5)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"probes": -1}, "--probes: expected 0 or more, received -1"),
        ({"prefixes": 1}, "--prefixes: expected at least 2 lengths"),
        ({"checkpointing": "on"}, "--checkpointing: expected one of off, reentrant, non_reentrant, received 'on'"),
    ],
)
def test_counts_that_mean_nothing(run, given, words):
    with pytest.raises(GradvarError) as caught:
        measure(run, given)
    assert words in str(caught.value)


def test_checkpointing_changes_no_number(run):
    measure(run, {"targets": ("0:v",), "checkpointing": "reentrant"})
    expected = engine(run, "0", "0:v")
    for key, gram in expected.grams.items():
        np.testing.assert_allclose(run.grams("0")[key].matrix, gram.matrix, rtol=1e-5)
