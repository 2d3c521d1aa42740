"""What `check` finds: rounding where there is some, the tokens on which the sampler errs, crowded scores."""

import math
from dataclasses import replace

import numpy as np
import pytest

import gradvar
from gradvar.errors import GradvarError
from gradvar.gradients import check_precision
from gradvar.models import find_model, load_model
from gradvar.runs import TABLE_COLUMNS, SampleConfig
from gradvar.stages import check, measure
from tests.stages.small import make_run, responses, write_responses

LENGTHS = (5, 9, 3, 7, 6, 8, 4, 5, 6, 7)


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("checked"), LENGTHS)
    measure(run, {"targets": ("last:v", "last:down")})
    return run, check(run, {}, responses=3)


def pick(table, quantity, **labels):
    rows = table[table["quantity"] == quantity]
    for name, value in labels.items():
        rows = rows[rows[name] == value]
    return rows


def test_the_table_is_that_of_the_engine_for_the_chosen_responses(checked):
    run, table = checked
    assert list(table.columns[: len(TABLE_COLUMNS)]) == list(TABLE_COLUMNS)
    made = run.config(SampleConfig)
    rollouts = {r.rollout_id: r for r in run.rollouts("0")}
    chosen = sorted(set(pick(table, "gradient_error")["rollout_id"]))
    assert {len(rollouts[i].token_ids) for i in chosen} == {3, 6, 9}  # shortest, middle, longest
    order = sorted(chosen, key=lambda i: len(rollouts[i].token_ids))
    expected = check_precision(
        load_model(find_model(made.model), dtype="float32", device="cpu"),
        [2, 3],
        [list(rollouts[i].token_ids) for i in order],
        run.targets,
        loss_masks=[rollouts[i].loss_mask for i in order],
        rollout_ids=order,
    )
    for row in expected.rows:
        found = pick(table, "gradient_error", target=row.target, rollout_id=row.rollout_id, scope="in a batch")
        assert list(found["value"]) == pytest.approx([row.gradient_error], rel=0.5, abs=1e-6)
    assert set(pick(table, "largest_gradient_error")["verdict"]) == {"precise"}
    assert set(pick(table, "largest_gradient_error")["scope"]) == {"alone", "in a batch"}
    assert (pick(table, "gradient_error")["value"] < 1e-4).all()
    assert gradvar.open_run(run.path).table("check").shape == table.shape


def test_bfloat16_shows_its_rounding(tmp_path):
    run = make_run(tmp_path, LENGTHS, dtype="bfloat16")
    measure(run, {"targets": ("last:v",)})
    assert run.info["stages"]["measure"]["dtype"] == "bfloat16"
    table = check(run, {}, responses=2)
    assert (pick(table, "gradient_error")["value"] > 1e-4).all()
    assert (pick(table, "logprob_error")["value"] > 1e-5).all()


def test_what_it_says_of_the_policy(checked):
    run, table = checked
    assert set(pick(table, "identity_signal")["target"]) == {*run.targets, "sum"}
    assert len(pick(table, "entropy_surplus", prompt_id="0")) == 1
    for group in run.scores(run.targets[0]):
        share = group.gram.mean() / np.diagonal(group.gram).mean()
        labels = {"target": run.targets[0], "prompt_id": group.prompt_id}
        assert list(pick(table, "mean_share", **labels)["value"]) == pytest.approx([share])
        assert list(pick(table, "condition", **labels)["value"]) == pytest.approx([1 / (1 - share)])


def test_the_worst_token_is_found_and_masked_ones_are_not_looked_at(tmp_path):
    run = make_run(tmp_path, LENGTHS)
    measure(run, {"targets": ("last:v",)})
    measured, rollouts = run.measures("0"), run.rollouts("0")
    sampler = [tuple(float(x) for x in values) for values in measured.policy_logprobs]
    sampler[4] = (*sampler[4][:2], sampler[4][2] + 0.75, *sampler[4][3:])
    sampler[1] = (sampler[1][0] - 5.0, *sampler[1][1:])  # its mask leaves the first token out
    run.write_rollouts("0", [replace(r, sampler_logprobs=lp) for r, lp in zip(rollouts, sampler, strict=True)])
    (run.path / "rollouts" / "1.parquet").unlink()
    (run.path / "grams" / "1.safetensors").unlink()
    table = check(run, {}, responses=2)
    worst = pick(table, "sampler_worst_token").iloc[0]
    assert (worst["rollout_id"], worst["token"]) == (4, 2)
    assert worst["value"] == pytest.approx(0.75, abs=1e-6)
    assert worst["text"] == "abcdef"[rollouts[4].token_ids[2] - 2]
    assert worst["sampler_logprob"] - worst["policy_logprob"] == pytest.approx(0.75, abs=1e-6)
    assert pick(table, "sampler_worst_token").iloc[1]["value"] == pytest.approx(0, abs=1e-6)
    (response,) = pick(table, "sampler_response_max").to_dict("records")
    assert (response["rollout_id"], response["value"]) == (4, pytest.approx(0.75, abs=1e-6))
    assert set(pick(table, "sampler_mean_abs")["verdict"]) == {"agree"}


def test_responses_that_are_all_alike_are_badly_conditioned(tmp_path):
    run = make_run(tmp_path, LENGTHS)
    for prompt_id in run.prompt_ids:
        write_responses(run, prompt_id, responses((5,) * 2)[:1] * 4)
    measure(run, {"targets": ("last:v",)})
    table = check(run, {}, responses=2)
    shares = pick(table, "mean_share")
    # masks differ: every second response loses its first token, so nearly alike is as far as it goes
    assert (shares["value"] > 0.5).all()
    assert set(shares["verdict"]) == {"D loses digits"}
    assert (pick(table, "condition")["value"] > 2).all()


def test_bad_counts_and_empty_runs(checked, tmp_path):
    run, _ = checked
    with pytest.raises(GradvarError, match="--responses: expected at least 2, received 1"):
        check(run, {}, responses=1)
    with pytest.raises(GradvarError, match="--prompts: expected at least 1, received 0"):
        check(run, {}, prompts=0)
    with pytest.raises(GradvarError, match="gradvar measure"):
        check(make_run(tmp_path), {})


def test_the_run_records_how_it_was_measured(checked):
    run, _ = checked
    stage = run.info["stages"]["measure"]
    assert stage["dtype"] == "float32"
    assert stage["attention"] == "sdpa"
    assert run.info["config"]["measure"]["include_bias"] is True
    gram = run.grams("0")[run.targets[0]]
    assert (gram.dtype, gram.include_bias, gram.temperature) == ("float32", True, 1.0)
    assert math.isfinite(gram.matrix.sum())
