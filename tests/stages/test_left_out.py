"""Responses whose gradient is not finite: refused by name, or left out by the user's word, and told ever after.

The model of `small.py` is infinite on one token and overflows the last layer's down_proj, and only that, on another.
"""

import contextlib
import json

import numpy as np
import pytest

import gradvar
from gradvar.errors import GradvarError
from gradvar.gradients import measure_scores
from gradvar.models import find_model, load_model
from gradvar.stages import fit, measure, sampler_agreements
from tests.stages.small import HUGE, INFINITE, make_run, responses, write_responses

LENGTHS = (5, 9, 3, 7, 6, 8, 4, 5, 6, 7)
BAD = 3
WORSE = 5
OUT = {"leave_out_non_finite": True}


def spoiled(count=None):
    """Responses of which number 3 holds the infinite token and number 5 the one that overflows down_proj."""
    found = responses(LENGTHS[:count])
    found[BAD][1], found[WORSE][2] = INFINITE, HUGE
    return found


@pytest.fixture
def run(tmp_path):
    run = make_run(tmp_path, LENGTHS, spoil=True)
    write_responses(run, "0", spoiled())
    return run


class Heard:
    """A listener that remembers what it was told and how far the work came."""

    def __init__(self):
        self.lines = []

    def say(self, text):
        self.lines.append(text)

    warn = say

    @contextlib.contextmanager
    def task(self, description, total, done=0):
        self.total, self.done = total, done

        def advance(units):
            self.done += units

        yield advance


def test_without_the_users_word_the_response_is_named_and_nothing_is_written(run):
    with pytest.raises(GradvarError, match=r"prompt '0': .* not finite for response 3: .*--leave-out-non-finite"):
        measure(run, {"targets": ("last:qkv",)})
    assert not run.file("grams", "0").exists()
    assert not run.file("measures", "0").exists()


def test_with_it_the_others_are_measured_as_if_it_had_not_been_there(run):
    heard = Heard()
    measure(run, {"targets": ("last:qkv",), **OUT}, heard)
    kept = [i for i in range(len(LENGTHS)) if i != BAD]
    run = gradvar.open_run(run.path)
    rollouts = run.rollouts("0")
    masks = [[1] * r.length if r.loss_mask is None else list(r.loss_mask) for r in rollouts]
    expected = measure_scores(
        load_model(find_model(run.info["model"]["path"]), dtype="float32", device="cpu"),
        [2, 3],
        [list(rollouts[i].token_ids) for i in kept],
        "last:qkv",
        loss_masks=[masks[i] for i in kept],
    )
    for target in run.targets:
        scores = next(s for s in run.scores(target) if s.prompt_id == "0")
        np.testing.assert_allclose(scores.gram, expected.grams[target].matrix, rtol=1e-5)
        assert scores.rollout_ids == tuple(kept)
        np.testing.assert_array_equal(scores.lengths, [rollouts[i].length for i in kept])
        np.testing.assert_allclose(scores.rewards, [i % 2 + 0.1 * (i // 2) for i in kept])
        sums = [lp @ np.array(masks[i]) for i, lp in zip(kept, expected.logprobs, strict=True)]
        np.testing.assert_allclose(scores.log_probs, sums, rtol=1e-5)
    assert len(next(s for s in run.scores() if s.prompt_id == "1").lengths) == len(LENGTHS)
    assert list(run.left_out()) == ["0"]
    assert list(run.left_out()["0"]) == [BAD]
    assert "not finite" in run.left_out()["0"][BAD]
    assert np.isnan(run.measures("0").policy_logprobs[BAD]).all()
    events = [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]
    assert [(e["prompt_id"], e["rollout_id"]) for e in events if e["event"] == "response left out"] == [("0", BAD)]
    assert any("in no number: 1 response of 1 prompt (first" in line for line in heard.lines)
    assert heard.done == heard.total


def test_every_later_table_says_how_many(run):
    measure(run, {"targets": ("last:qkv",), **OUT})
    heard = Heard()
    tables = fit(run, {}, heard)
    assert any("in no number: 1 response of 1 prompt (first" in line for line in heard.lines)
    assert not any("not measured" in line for line in heard.lines)
    law = tables["law"]
    one = law[(law["prompt_id"] == "0") & (law["quantity"] == "deviation_exponent") & (law["advantage"] == "score")]
    assert set(one["n"]) == {len(LENGTHS) - 1}
    balance = tables["identity"].query("quantity == 'entropy_surplus' and prompt_id == '0'")
    assert np.isfinite(balance["value"]).all()
    assert all(np.isfinite(one.mean_abs) for one in sampler_agreements(run).values())


def test_nothing_missing_nothing_done(run):
    measure(run, {"targets": ("last:qkv",), **OUT})
    before = [run.file(kind, "0").read_bytes() for kind in ("grams", "measures")]
    measure(run, {})
    assert [run.file(kind, "0").read_bytes() for kind in ("grams", "measures")] == before


def test_targets_that_lose_others_are_compared_on_what_all_hold(run):
    measure(run, {"targets": ("last:v",), **OUT})
    v = run.targets[0]
    first = next(s for s in run.scores(v) if s.prompt_id == "0")
    measure(run, {"targets": ("last:down",)})  # the word was given for this run
    down = next(t for t in run.targets if t != v)
    assert run.grams("0")[v].rollout_ids == tuple(i for i in range(len(LENGTHS)) if i != BAD)
    assert run.grams("0")[down].rollout_ids == tuple(i for i in range(len(LENGTHS)) if i not in (BAD, WORSE))
    assert set(run.left_out()["0"]) == {BAD, WORSE}
    assert down in run.left_out()["0"][WORSE]
    keep = [row for row, i in enumerate(first.rollout_ids) if i != WORSE]
    again = next(s for s in run.scores(v) if s.prompt_id == "0")
    assert again.rollout_ids == run.grams("0")[down].rollout_ids
    np.testing.assert_array_equal(again.gram, first.gram[np.ix_(keep, keep)])
    np.testing.assert_array_equal(again.rewards, first.rewards[keep])
    both = next(s for s in run.scores() if s.prompt_id == "0")
    np.testing.assert_allclose(both.gram, again.gram + run.grams("0")[down].matrix)
    assert np.isfinite(run.measures("0").policy_logprobs[WORSE]).all()  # what is known of it stays


def test_probes_and_prefixes_go_with_those_that_are_kept(run):
    measure(run, {"targets": ("last:v",), "probes": 2, "prefixes": 2, **OUT})
    (target,) = run.targets
    tau, norms = run.taus()["0", target], run.prefixes()["0", target]
    assert len(tau.value) == len(norms.value) == len(LENGTHS) - 1
    assert np.isfinite(tau.value).all()
    assert (norms.lengths >= 1).all()
    assert np.isnan(run.measures("0").taus[target].value[BAD])
    gram = next(s for s in run.scores() if s.prompt_id == "0").gram
    np.testing.assert_allclose(norms.value[:, -1], np.diagonal(gram), rtol=1e-5)


def test_a_grown_prompt_loses_the_new_ones_too(run):
    few = 7
    write_responses(run, "0", spoiled(few))
    measure(run, {"targets": ("last:v",), **OUT})
    grown = spoiled()
    grown[8][0] = INFINITE
    write_responses(run, "0", grown)
    assert next(s for s in run.scores() if s.prompt_id == "0").rollout_ids == (0, 1, 2, 4, 5, 6)
    measure(run, {})
    assert next(s for s in run.scores() if s.prompt_id == "0").rollout_ids == (0, 1, 2, 4, 5, 6, 7, 9)
    assert set(run.left_out()["0"]) == {BAD, 8}


def test_at_least_two_must_remain(run):
    token_ids = responses((4, 4, 4))
    for ids in token_ids[1:]:
        ids[0] = INFINITE
    write_responses(run, "0", token_ids)
    with pytest.raises(GradvarError, match=r"2 of 3 responses are not finite .* at least 2 must remain"):
        measure(run, {"targets": ("last:v",), **OUT})
