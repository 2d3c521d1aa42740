"""audit and compare on simulated runs: what they print, write and refuse."""

import json
import math
import shutil

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

import gradvar
from benchmarks.synthetic import simulated_prompt, write_run
from cli.main import main
from gradvar.estimators import prefix_growth
from gradvar.runs import TABLE_COLUMNS

TARGETS = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]


@pytest.fixture
def call(capsys):
    def run(*arguments, code=0) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main([str(argument) for argument in arguments])
        out = capsys.readouterr()
        assert left.value.code == code, out.err
        assert "Traceback" not in out.err
        return out.out if code == 0 else out.err.strip().splitlines()[-1]

    return run


def simulated(path, number, count, *, texts, n=32, targets=TARGETS, probed=False, **law):
    prompts = [
        simulated_prompt(str(q), n, targets, rng=np.random.default_rng([number, q]), **law) for q in range(count)
    ]
    return write_run(path, prompts, texts=texts, probed=probed)


def complete(table, seed):
    assert list(table.columns[: len(TABLE_COLUMNS)]) == list(TABLE_COLUMNS)
    for column in ("n", "method", "level", "seed", "clusters"):
        assert table[column].notna().all(), table[table[column].isna()][["quantity", column]]
    assert (table["seed"] == seed).all()


def test_audit_prints_words_and_writes_every_assumption(call, tmp_path):
    simulated(tmp_path / "r", 1, 4, texts=list("abcd"), signal=3.0)
    out = call("audit", tmp_path / "r", "--seed", "3", "--length-margin", "0.4", "--group-size", "4")
    for words in ("E s = 0", "token gradients are uncorrelated", "E[g | L] = grad J", "prompts like these", "< 0.4"):
        assert words in out
    table = gradvar.open_run(tmp_path / "r").table("audit")
    complete(table, 3)
    assert set(table["assumption"]) == {0, 1, 2, 3, 4}
    assert set(table["target"]) == {*TARGETS, "sum", "any"}
    pooled = table[table["prompt_id"].isna() & (table["target"] == "sum") & table["verdict"].notna()]
    both = pooled.groupby("assumption")["estimand"].agg(set)
    assert all(both[a] == {"these prompts", "prompts like these"} for a in (0, 2, 3, 4))
    document = json.loads(call("audit", tmp_path / "r", "--json"))
    assert {row["length_high"] for row in document["audit"]}
    assert gradvar.open_run(tmp_path / "r").options("audit").length_margin == 0.25


def test_audit_refuses_bad_options_and_writes_nothing(call, tmp_path):
    simulated(tmp_path / "r", 1, 1, texts=["a"])
    for options, words in (
        (["--token-margin", "0"], "--token-margin: expected a number above 0"),
        (["--rule", "grop"], "grpo"),
        (["--rule", "vl_norm"], "at least one alpha"),
    ):
        assert words in call("audit", tmp_path / "r", *options, code=2)
    assert not (tmp_path / "r" / "tables").exists()


def test_compare_matches_prompts_by_text(call, tmp_path):
    simulated(tmp_path / "early", 1, 5, texts=["a", "b", "c", "d", "e"], signal=3.0)
    simulated(tmp_path / "late", 2, 5, texts=["x", "b", "a", "d", "c"], signal=3.0, beta=2.0)
    out = call("compare", tmp_path / "early", tmp_path / "late", "--seed", "2")
    assert "late: 5 prompts, 4 of them" in out
    assert "with another text in early" in " ".join(out.split())
    assert "CV, ratio" in out
    run = gradvar.open_run(tmp_path / "early")
    table = run.table("compare")
    complete(table, 2)
    assert set(run.info["stages"]["compare"]["runs"]) == {"early", "late"}
    differences = table[table["against"].notna() & (table["quantity"] == "within_exponent_difference")]
    # Prompt "0" of early says "a", which is prompt "2" of late: the row carries early's id.
    assert set(differences["prompt_id"].dropna()) == {"0", "1", "2", "3"}
    own = table[table["against"].isna() & (table["quantity"] == "within_exponent") & (table["target"] == "sum")]
    early, late = (own[own["run"] == name].set_index("prompt_id")["value"] for name in ("early", "late"))
    row = differences[(differences["prompt_id"] == "0") & (differences["target"] == "sum")].iloc[0]
    assert row["value"] == pytest.approx(late["0"] - early["0"])
    alone = gradvar.open_run(tmp_path / "late")
    call("fit", alone.path)
    law = alone.table("law")
    same = law[
        (law["prompt_id"] == "2")
        & (law["target"] == "sum")
        & (law["quantity"] == "within_exponent")
        & (law["advantage"] == "grpo")
        & (law["scope"] == "all responses")
    ].iloc[0]
    assert late["0"] == pytest.approx(same["value"], rel=1e-6)
    document = json.loads(call("compare", tmp_path / "early", tmp_path / "late", "--json"))
    assert document["shared"] == {"late": 4}
    assert document["prompts"] == {"early": 5, "late": 5}


def test_compare_without_shared_prompts_or_targets_says_so(call, tmp_path):
    simulated(tmp_path / "one", 1, 2, texts=["a", "b"], signal=3.0)
    simulated(tmp_path / "two", 2, 2, texts=["c", "d"], signal=3.0, targets=["other.1.weight"])
    out = " ".join(call("compare", tmp_path / "one", tmp_path / "two").split())
    assert "shares no prompt text" in out
    assert "all measured weights of each run together" in out
    assert "against one, shared" not in out
    table = gradvar.open_run(tmp_path / "one").table("compare")
    assert set(table["target"]) == {"sum"}
    assert table["against"].isna().all()


def test_compare_refuses(call, tmp_path):
    simulated(tmp_path / "one", 1, 1, texts=["a"])
    simulated(tmp_path / "two", 2, 1, texts=["a"])
    assert "at least two runs" in call("compare", tmp_path / "one", code=2)
    assert "twice" in call("compare", tmp_path / "one", tmp_path / "two", tmp_path / "one", code=2)
    assert "no run directory" in call("compare", tmp_path / "one", tmp_path / "none", code=2)
    line = call("compare", tmp_path / "one", tmp_path / "two", "--group-size", "20", code=2)
    assert "run 'one'" in line
    assert "group size 20" in line
    assert not (tmp_path / "one" / "tables").exists()


def test_compare_says_when_the_rollouts_are_the_same(call, tmp_path):
    simulated(tmp_path / "one", 1, 2, texts=["a", "b"])
    simulated(tmp_path / "two", 2, 2, texts=["a", "b"])
    shutil.copytree(tmp_path / "one", tmp_path / "again")
    said = "again holds the same rollouts as one of 2 prompts"
    out = " ".join(call("compare", tmp_path / "one", tmp_path / "again", tmp_path / "two").split())
    assert said in out
    assert "two holds" not in out


def test_runs_in_folders_of_one_name_are_told_apart(call, tmp_path):
    for step in ("step10", "step20"):
        (tmp_path / step).mkdir()
        simulated(tmp_path / step / "run", 1, 1, texts=["a"])
    call("compare", tmp_path / "step10" / "run", tmp_path / "step20" / "run")
    table = gradvar.open_run(tmp_path / "step10" / "run").table("compare")
    assert {name.split("/")[-2] for name in table["run"]} == {"step10", "step20"}


def test_one_text_twice_in_a_run_is_matched_in_order(tmp_path):
    from gradvar.stages.compare import matched_ids

    notes: list[str] = []
    texts = {"one": {"0": "a", "1": "a", "2": "b"}, "two": {"5": "a", "1": "c", "7": "a", "8": "a"}}
    ids = matched_ids(texts, notes)
    assert ids["two"] == {"5": "0", "7": "1", "8": "8", "1": "two:1"}
    assert len(notes) == 1
    assert "first: 1" in notes[0]


def test_audit_shows_tokens_and_prefixes_where_they_were_measured(call, tmp_path):
    simulated(tmp_path / "plain", 1, 1, texts=["a"])
    assert "gradvar measure RUN --probes 4" in " ".join(call("audit", tmp_path / "plain").split())
    assert not (tmp_path / "plain" / "tables" / "prefixes.parquet").exists()
    simulated(tmp_path / "r", 1, 4, texts=list("abcd"), n=48, probed=True)
    out = call("audit", tmp_path / "r")
    assert "1 token gradients are uncorrelated: supported" in out
    assert "along responses" in out
    assert "reward 0, length bin 1 of 2" in out
    run = gradvar.open_run(tmp_path / "r")
    tokens, growth = run.table("token_covariance"), run.table("prefixes")
    for table in (tokens, growth):
        complete(table, 0)
        assert set(table["target"]) == {*TARGETS, "sum"}
        assert set(table["estimand"]) == {"these prompts", "prompts like these"}
    alone = tokens[tokens["prompt_id"].notna() & (tokens["target"] == TARGETS[0])]
    # The simulated taus differ from the norms by their probes' noise alone.
    assert alone["probe_part"].between(0.3, 1.0).all()
    one = prefix_growth(run.prefixes()["0", TARGETS[0]].value, run.prefixes()["0", TARGETS[0]].lengths)
    row = growth[(growth["prompt_id"] == "0") & (growth["target"] == TARGETS[0])].set_index("quantity")
    for quantity, expected in (
        ("prefix_within", one.within),
        ("prefix_between", one.between),
        ("prefix_difference", one.difference),
    ):
        assert row.loc[quantity, "value"] == pytest.approx(expected.value)
        assert row.loc[quantity, "high"] == pytest.approx(expected.high)
    within = growth[(growth["quantity"] == "prefix_within") & (growth["target"] == "sum")]
    np.testing.assert_allclose(within["value"], 1.5, rtol=1e-6)


def test_extras_of_dapo_beside_the_plain_update(call, tmp_path):
    simulated(tmp_path / "r", 1, 2, texts=["a", "b"], signal=3.0, targets=TARGETS[:1])
    out = call("cv", tmp_path / "r", "--extras", "--overlong-buffer", "900")
    assert "DAPO's extras, each beside the plain update" in out
    assert gradvar.open_run(tmp_path / "r").options("cv").overlong_buffer == 900
    document = json.loads(call("cv", tmp_path / "r", "--extras", "--json"))
    assert {row["extra"] for row in document["extras"] if row["rule"] == "dapo"} >= {"none", "dynamic sampling"}
    complete(gradvar.open_run(tmp_path / "r").table("extras"), 0)
    assert gradvar.open_run(tmp_path / "r").options("cv").overlong_buffer is None
    line = call("cv", tmp_path / "r", "--extras", "--overlong-buffer", "0", code=2)
    assert "--overlong-buffer: expected at least 1 token" in line
    line = call("cv", tmp_path / "r", "--extras", "--overlong-buffer", "100000", code=2)
    assert "--overlong-buffer: expected at most the 1024 tokens that a response may have, received 100000" in line


def test_tables_that_a_call_does_not_make_are_none_of_an_earlier_call(call, tmp_path):
    tables = tmp_path / "r" / "tables"
    simulated(tmp_path / "r", 1, 2, texts=["a", "b"], targets=TARGETS[:1], probed=True)
    call("cv", tmp_path / "r", "--extras", "--group-size", "4")
    call("audit", tmp_path / "r")
    made = {"audit", "cv", "extras", "prefixes", "token_covariance"}
    assert {path.stem for path in tables.iterdir()} == made
    call("cv", tmp_path / "r", "--group-size", "4")
    assert {path.stem for path in tables.iterdir()} == made - {"extras"}
    simulated(tmp_path / "bare", 1, 2, texts=["a", "b"], targets=TARGETS[:1])
    shutil.copytree(tables, tmp_path / "bare" / "tables")
    call("audit", tmp_path / "bare")
    assert {path.stem for path in (tmp_path / "bare" / "tables").iterdir()} == {"audit", "cv"}


@pytest.mark.parametrize("command", ["audit", "compare"])
def test_an_alpha_that_the_rule_does_not_take_is_refused(call, tmp_path, command):
    runs = [tmp_path / "r", tmp_path / "s"][: 1 + (command == "compare")]
    for path in runs:
        simulated(path, 1, 1, texts=["a"], targets=TARGETS[:1])
    line = call(command, *runs, "--rule", "token-mean", "--alpha", "1", code=2)
    assert line == "gradvar: --alpha: dapo takes no alpha, received 1: leave it out, or add --rule vl_norm"


def test_the_largest_seed_is_written_and_a_larger_one_refused(call, tmp_path):
    simulated(tmp_path / "r", 1, 1, texts=["a"], targets=TARGETS[:1])
    call("audit", tmp_path / "r", "--seed", str(2**63 - 1))
    complete(gradvar.open_run(tmp_path / "r").table("audit"), 2**63 - 1)
    line = call("audit", tmp_path / "r", "--seed", "99999999999999999999999", code=2)
    assert "--seed: expected a whole number from 0 to 2^63 - 1" in line


def test_many_columns_stand_in_parts_and_no_heading_is_broken(capsys, monkeypatch):
    from cli.console import wide_table

    monkeypatch.setattr("cli.console.result", Console(width=40, highlight=False))
    names = ["grpo", "dr_grpo", *(f"vl_norm α={alpha}" for alpha in (0.5, 0.75, 1, 1.5, 2))]
    wide_table("CVs", ["prompt", *names], [["p0", *([">0.967"] * 7)], ["p1", *(["1.5"] * 7)]], caption="end")
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert all(len(line) <= 40 for line in lines)
    assert (out.count("prompt "), out.count("CVs"), out.count("end"), out.count(">0.967")) == (3, 1, 1, 7)
    assert all(out.count(word) == times for word, times in (("vl_norm", 5), ("dr_grpo", 1), ("α=0.75", 1)))


def test_a_silent_prompt_is_said_below_the_numbers(call, tmp_path):
    simulated(tmp_path / "r", 1, 3, texts=["a", "b", "c"], signal=3.0, targets=TARGETS[:1])
    run = gradvar.open_run(tmp_path / "r")
    name = run.prompt_ids[0]
    ids = [rollout.rollout_id for rollout in run.rollouts(name)]
    run.write_rewards(name, ids, np.ones(len(ids)), label=("x", "y"))
    out = call("cv", tmp_path / "r")
    table = out[out.index("CV prompt by prompt") :]
    assert f"silent: all rewards equal: 1 prompt ({name})" in table
    assert not any(line.startswith(f"{name} ") for line in table.splitlines())


def test_noise_scale_of_prompts_like_these_only_where_it_has_an_interval():
    from cli.choices import _across
    from cli.console import count

    row = {"target": "sum", "prompt_id": None, "quantity": "responses_for_cv_1", "estimand": "prompts like these"}
    table = pd.DataFrame([{**row, "low": 12.2, "high": 30.0}])
    assert _across(table, row, count) == "; prompts like these [12, 30]"
    assert _across(table.assign(low=math.nan), row, count) == ""
    assert _across(table.assign(prompt_id="p0"), row, count) == ""
    assert _across(table.drop(columns="estimand"), row, count) == ""


def test_responses_that_are_a_lower_bound_are_printed_so(call, tmp_path):
    """Where rho is not above 0 nothing says how many responses it takes: more than were used is all there is."""
    simulated(tmp_path / "r", 6, 4, texts=list("abcd"), n=48, signal=0.0, targets=TARGETS[:1])
    out = call("cv", tmp_path / "r")
    table = gradvar.open_run(tmp_path / "r").table("cv")
    pooled = table[table["prompt_id"].isna() & (table["estimand"] == "these prompts") & (table["quantity"] == "rho")]
    unresolved = pooled[pooled["verdict"] == "unresolved"]
    bound = unresolved[unresolved["value"] <= 0]
    assert len(bound)
    assert bound["n_needed_at_least"].all()
    assert (unresolved["n_needed"] > unresolved["n"] / unresolved["clusters"]).all()
    finite = bound[bound["n_needed"] < 100_000]
    assert all(f"≥ {needed:.0f}" in out for needed in finite["n_needed"])


def test_a_lower_bound_says_so_in_the_report_too():
    from cli.verdicts import at_least
    from gradvar.report.tables import verdict_cell

    row = {"verdict": "unresolved", "n_needed": 65.0, "n_needed_at_least": True}
    assert "at least N 65 would tell" in str(verdict_cell(row))
    assert "(N 65 would tell)" in str(verdict_cell({**row, "n_needed_at_least": False}))
    assert (at_least("65", True), at_least("65", None), at_least(">100000", True)) == ("≥ 65", "65", ">100000")
