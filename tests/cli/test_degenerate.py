"""Degenerate runs through every command: a defined, documented answer, or one clear line."""

import math
import shutil
from dataclasses import replace

import numpy as np
import pytest

import gradvar
from benchmarks.synthetic import simulated_prompt, write_run
from cli.main import main

TARGETS = ["model.layers.0.self_attn.q_proj"]
N = 32


def ordinary(name="0", n=N, **law):
    return simulated_prompt(name, n, TARGETS, signal=2.0, rng=np.random.default_rng([5, int(name)]), **law)


def changed(prompt, **fields):
    return [replace(one, **fields) for one in prompt]


def one_length():
    return [changed(ordinary(), lengths=np.full(N, 50.0), truncated=np.zeros(N, dtype=bool))]


def one_reward():
    return [changed(ordinary(), rewards=np.ones(N))]


def unverified():
    return [changed(ordinary(), rewards=np.full(N, np.nan))]


def one_response():
    return [[one.select(np.arange(1)) for one in ordinary()]]


def two_responses():
    return [[one.select(np.arange(2)) for one in ordinary()]]


def no_signal():
    """Gradients that point away from their own mean: the cross products of groups are negative."""
    prompt = []
    for one in ordinary():
        n = len(one.lengths)
        factors = one.rewards - one.rewards.mean()
        scores = np.eye(n) - 1.0 / n  # sum to 0: every cross product is -1/n
        scores /= np.where(np.abs(factors) < 1e-9, 1.0, factors)[:, None]
        prompt.append(replace(one, gram=scores @ scores.T))
    return [prompt]


def outlier():
    prompt = []
    for one in ordinary():
        scale = np.ones(N)
        scale[3] = 1e6
        prompt.append(replace(one, gram=one.gram * np.outer(scale, scale)))
    return [prompt]


def identical():
    rewards = (np.arange(N) % 2).astype(float)
    fields = {"lengths": np.full(N, 40.0), "rewards": rewards, "truncated": np.zeros(N, dtype=bool)}
    return [changed(ordinary(), gram=np.full((N, N), 2.0), **fields)]


def repeated():
    """Half of the responses are copies of the other half."""
    twice = np.repeat(np.arange(N // 2), 2)
    return [[one.select(twice) for one in ordinary()]]


def dead_target():
    return [changed(ordinary(), gram=np.zeros((N, N)))]


CASES = {
    f.__name__: f
    for f in (
        one_length,
        one_reward,
        unverified,
        one_response,
        two_responses,
        no_signal,
        outlier,
        identical,
        repeated,
        dead_target,
    )
}
REFUSED = {
    "one_response": dict.fromkeys(("fit", "cv", "alpha", "audit", "compare"), "fewer than 2 responses"),
    "two_responses": {"cv": "--group-size", "alpha": "--group-size", "compare": "group size 8"},
}
"""What is refused, with which words; everything else is answered."""


@pytest.fixture
def call(capsys):
    def run(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main([str(argument) for argument in arguments])
        out = capsys.readouterr()
        assert "Traceback" not in out.err
        assert "Warning" not in out.err
        return left.value.code, out.out, out.err

    return run


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("degenerate")
    write_run(folder / "ordinary", [ordinary("1")], texts=["another prompt"])
    for name, make in CASES.items():
        write_run(folder / name, make())
        write_run(folder / f"{name}_among", [*make(), ordinary("1"), ordinary("2")])
    return folder


@pytest.mark.parametrize("command", ["fit", "cv", "alpha", "audit", "compare"])
@pytest.mark.parametrize("case", list(CASES))
def test_every_command_answers_or_refuses_in_one_line(call, made, tmp_path, case, command):
    answers_or_refuses(call, made, tmp_path / "run", case, command, case)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["fit", "cv", "alpha", "audit", "compare"])
@pytest.mark.parametrize("case", list(CASES))
def test_a_degenerate_prompt_among_others_takes_nothing_with_it(call, made, tmp_path, case, command):
    answers_or_refuses(call, made, tmp_path / "run", case, command, f"{case}_among")


def answers_or_refuses(call, made, path, case, command, folder):
    shutil.copytree(made / folder, path)
    others = [made / "ordinary"] if command == "compare" else []
    code, out, err = call(command, path, *others)
    words = REFUSED.get(case, {}).get(command)
    if folder == "two_responses_among":
        words = None  # the other prompts are large enough
    if words is not None:
        assert code == 2, out
        assert words in err
        assert not (path / "tables").exists()
        return
    assert code == 0, err
    tables = sorted((path / "tables").glob("*.parquet"))
    assert tables
    for file in tables:
        table = gradvar.open_run(path).table(file.stem)
        for column in ("n", "method", "level", "seed", "clusters"):
            assert table[column].notna().all(), (file.stem, column)
        value, low, high = (table[column].astype(float) for column in ("value", "low", "high"))
        both = value.notna() & low.notna()
        assert (low[both] <= value[both] + 1e-9 * value[both].abs()).all(), table[both & (low > value)]
        both = value.notna() & high.notna()
        assert (high[both] >= value[both] - 1e-9 * value[both].abs()).all(), table[both & (high < value)]
        assert not np.isinf(value).any(), table[np.isinf(value)]


def row(path, table, **labels):
    found = gradvar.open_run(path).table(table)
    for name, value in labels.items():
        found = found[found[name] == value]
    return found.iloc[0]


def answered(call, made, tmp_path, case, *commands):
    shutil.copytree(made / case, tmp_path / "run")
    for command in commands:
        code, _, err = call(command, tmp_path / "run")
        assert code == 0, err
    return tmp_path / "run"


@pytest.mark.parametrize("command", ["fit", "cv", "alpha", "audit"])
def test_a_target_without_gradient_among_others_is_named_and_the_rest_answered(call, tmp_path, command):
    two = [*TARGETS, "model.layers.0.self_attn.k_proj"]
    prompts = [simulated_prompt(str(i), N, two, signal=2.0, rng=np.random.default_rng([5, i])) for i in range(2)]
    prompts = [[one[0], replace(one[1], gram=np.zeros((N, N)))] for one in prompts]
    write_run(tmp_path / "run", prompts)
    write_run(tmp_path / "alone", [one[:1] for one in prompts])
    assert call(command, tmp_path / "alone")[0] == 0
    code, _, err = call(command, tmp_path / "run")
    assert code == 0
    assert "layer 0 k_proj has no gradient at 2 of 2 prompts" in " ".join(err.split())
    for file in (tmp_path / "alone" / "tables").glob("*.parquet"):
        table, alone = (gradvar.open_run(tmp_path / run).table(file.stem) for run in ("run", "alone"))
        dead = table[table["target"] == two[1]]
        numbers = dead[~dead["quantity"].isin(["silent_share"])]
        assert numbers["value"].isna().all(), (file.stem, numbers)
        if file.stem != "forms":
            assert "no gradient: all are 0" in set(numbers["verdict"].dropna()), file.stem
        if file.stem == "alpha":  # the exponent beside the advice is of all targets, or of the only one
            table, alone = (one[one["quantity"] != "within_exponent"] for one in (table, alone))
        for name in (two[0], "sum"):
            mine = table[table["target"] == name].reset_index(drop=True)
            theirs = alone[alone["target"] == two[0]].reset_index(drop=True)
            np.testing.assert_allclose(mine["value"], theirs["value"], rtol=1e-9)


def test_a_prompt_smaller_than_the_group_is_unresolved_and_named(call, tmp_path):
    write_run(tmp_path / "run", [ordinary("1", 64), ordinary("2", 64), ordinary("3", 6)])
    for command in ("cv", "alpha"):
        code, _, err = call(command, tmp_path / "run")
        assert code == 0, err
    told = row(tmp_path / "run", "cv", quantity="cv", prompt_id="3")
    assert (told["verdict"], told["n_needed"]) == ("unresolved", 24)
    assert row(tmp_path / "run", "alpha", quantity="eta", prompt_id="3")["verdict"] == "unresolved"
    code, _, err = call("cv", tmp_path / "run", "--group-size", "65")
    assert code == 2
    assert "64 rollouts of prompt '1', which has the most" in " ".join(err.split())


@pytest.mark.slow
def test_groups_too_large_for_an_interval_at_every_prompt_leave_no_stage_without_an_answer(call, tmp_path):
    path = tmp_path / "run"
    write_run(path, [ordinary("1", 16), ordinary("2", 16)])
    shutil.copytree(path, tmp_path / "other")
    for command in ("fit", "cv", "alpha", "audit", "figures", "report"):
        code, out, err = call(command, path)
        assert code == 0, err
        if command == "alpha":
            assert "No alpha can be recommended" in out
            assert "2 prompts unresolved: fewer than 24 verified responses" in " ".join(out.split())
    table = gradvar.open_run(path).table("alpha")
    assert set(table.loc[table["quantity"] != "within_exponent", "verdict"]) == {"unresolved"}
    assert call("compare", path, tmp_path / "other")[0] == 0
    for quantity in ("eta_difference", "alpha_star_eta_difference"):
        assert row(path, "compare", quantity=quantity)["verdict"] == "unresolved"


def test_the_group_asked_for_is_among_those_planned(call, tmp_path):
    path = tmp_path / "run"
    write_run(path, [ordinary("1", 7)])
    assert call("alpha", path, "--group-size", "2")[0] == 0
    assert math.isfinite(row(path, "planning", quantity="rho", rule="grpo", group_size=2)["value"])
    write_run(tmp_path / "small", [ordinary("1", 5)])
    code, _, err = call("alpha", tmp_path / "small", "--group-size", "2")
    assert code == 0, err
    told = row(tmp_path / "small", "planning", quantity="cv", rule="grpo")
    assert (told["verdict"], told["method"]) == ("unresolved", "not estimated; fewer than 6 verified responses")


def test_what_the_answers_are(call, made, tmp_path):
    path = answered(call, made, tmp_path / "a", "one_length", "fit", "cv", "audit")
    told = row(path, "law", quantity="deviation_exponent", advantage="grpo")
    assert math.isnan(told["value"])
    assert told["verdict"] == "undetermined"
    assert "one length" in told["method"]
    assert math.isfinite(row(path, "cv", quantity="cv", rule="grpo")["value"])
    assert row(path, "cv", quantity="cv_ratio", rule="dapo")["value"] == pytest.approx(1.0)
    assert "no two length bins" in row(path, "audit", quantity="between_length_share")["method"]

    path = answered(call, made, tmp_path / "b", "one_reward", "fit", "cv", "alpha", "audit")
    silent = "silent: all rewards equal"
    assert row(path, "law", quantity="deviation_exponent", advantage="grpo")["verdict"] == silent
    assert math.isfinite(row(path, "law", quantity="deviation_exponent", advantage="score")["value"])
    assert row(path, "cv", quantity="cv")["verdict"] == silent
    assert row(path, "cv", quantity="silent_share")["value"] == 1.0
    assert row(path, "alpha", quantity="eta")["verdict"] == silent
    assert row(path, "audit", quantity="baseline_ratio")["verdict"] == silent

    path = answered(call, made, tmp_path / "c", "no_signal", "cv", "alpha")
    told = row(path, "cv", quantity="cv", rule="grpo")
    assert math.isnan(told["value"])
    assert told["verdict"] == "unresolved"
    assert told["high"] == math.inf
    assert row(path, "cv", quantity="rho", rule="grpo")["value"] < 0
    assert row(path, "alpha", quantity="eta", rule="grpo")["verdict"] == "unresolved"

    path = answered(call, made, tmp_path / "e", "dead_target", "fit", "cv", "alpha", "audit")
    nothing = "no gradient: all are 0"
    assert row(path, "identity", quantity="identity_signal")["verdict"] == nothing
    assert row(path, "law", quantity="deviation_exponent", advantage="score")["verdict"] == nothing
    assert row(path, "law", quantity="deviation_exponent", advantage="grpo")["verdict"] == nothing
    assert row(path, "proxies", quantity="rank_correlation")["verdict"] == nothing
    assert row(path, "cv", quantity="cv")["verdict"] == nothing
    assert row(path, "alpha", quantity="eta")["verdict"] == nothing
    assert row(path, "planning", quantity="cv")["verdict"] == nothing
    for assumption in range(5):
        assert row(path, "audit", assumption=assumption)["verdict"] == nothing
    assert set(gradvar.open_run(path).table("cv")["silent"]) == {0}

    path = answered(call, made, tmp_path / "d", "identical", "fit", "cv")
    assert "identical" in row(path, "law", quantity="deviation_exponent", advantage="score")["method"]
