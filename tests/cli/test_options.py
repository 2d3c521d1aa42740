"""An option of the estimates holds for the command it was given to, and for no later one."""

import json

import numpy as np
import pytest

import gradvar
from benchmarks.synthetic import simulated_prompt, write_run
from cli.main import main

TARGETS = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]


@pytest.fixture
def call(capsys):
    def run(*arguments, code=0) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main([str(argument) for argument in arguments])
        out = capsys.readouterr()
        assert left.value.code == code, out.err
        return out.out if code == 0 else out.err.strip().splitlines()[-1]

    return run


@pytest.fixture
def run(tmp_path):
    prompts = [
        simulated_prompt(str(q), 32, TARGETS, beta=0.4, signal=3.0, rng=np.random.default_rng([5, q])) for q in range(4)
    ]
    return write_run(tmp_path / "r", prompts)


def test_an_option_given_once_changes_no_later_verdict(call, run):
    plain = json.loads(call("fit", run.path, "--json"))["law"]
    call("audit", run.path, "--margin", "5", "--advantage", "rloo", "--level", "0.8", "--seed", "9")
    again = json.loads(call("fit", run.path, "--json"))["law"]
    assert again == plain
    call("fit", run.path, "--margin", "5", "--advantage", "rloo")
    rows = json.loads(call("audit", run.path, "--json"))["audit"]
    exponents = [row for row in rows if row["quantity"] == "within_exponent"]
    assert {(row["margin_low"], row["margin_high"], row["advantage"]) for row in exponents} == {(0.75, 1.25, "grpo")}
    assert {row["advantage"] for row in json.loads(call("cv", run.path, "--json"))["cv"]} == {"grpo"}


def test_the_run_records_what_each_stage_was_given(call, run):
    call("fit", run.path, "--advantage", "rloo")
    call("audit", run.path, "--margin", "5")
    held = gradvar.open_run(run.path)
    assert (held.options("fit").advantage, held.options("fit").margin) == ("rloo", 0.25)
    assert (held.options("audit").advantage, held.options("audit").margin) == ("grpo", 5.0)
    assert held.options("cv").group_size == 8  # the default, before there is one


def test_a_margin_of_ones_own_is_said_beside_the_verdict(call, run):
    assert "(margin" not in call("fit", run.path)
    out = call("fit", run.path, "--margin", "5")
    assert "proportional to length (margin 5: [-4, 6])" in " ".join(out.split())
    assert "(margin" not in call("audit", run.path)
    assert "(margin < 0.4)" in call("audit", run.path, "--length-margin", "0.4")


def test_comparing_leaves_the_options_of_the_runs_alone(call, run, tmp_path):
    import shutil

    shutil.copytree(run.path, tmp_path / "other")
    call("fit", run.path)
    before = [gradvar.open_run(path).options("fit") for path in (run.path, tmp_path / "other")]
    call("compare", run.path, tmp_path / "other", "--advantage", "rloo", "--level", "0.8")
    assert [gradvar.open_run(path).options("fit") for path in (run.path, tmp_path / "other")] == before
    assert "options" not in gradvar.open_run(tmp_path / "other").info["stages"].get("compare", {})


def test_report_and_figures_read_the_tables_as_they_were_made(call, run):
    call("fit", run.path, "--advantage", "rloo", "--margin", "5")
    call("cv", run.path, "--group-size", "4")
    call("figures", run.path)
    call("report", run.path)
    text = (run.path / "report.html").read_text()
    assert "1 ± 5" in text
    assert "rloo advantages (the law), grpo (the aggregators), groups of 4" in text
    assert f"gradvar fit {run.path} --advantage rloo --margin 5.0" in text


def test_fit_shows_classes_families_and_what_the_pooled_exponent_hides(call, run):
    out = call("fit", run.path)
    words = " ".join(out.split())
    for part in ("Exponent by reward class and truncation: all targets", "reward 1", "not truncated", "tau"):
        assert part in words
    for part in ("Which family fits", "proportional", "affine", "power", "line's R²", "log-log slope", "curvature"):
        assert part in words
    assert "(all targets), smallest of the 2 single targets'" in words
    document = json.loads(call("fit", run.path, "--json"))
    assert all(sentence[:40] in words for sentence in document["hidden"])
    held = {row["quantity"] for row in document["law"]}
    assert held >= {"within_curvature", "within_line_r2", "within_explained_affine", "within_heterogeneity_p"}
    call("report", run.path)
    text = (run.path / "report.html").read_text()
    assert "Which family fits" in text
    assert "Exponents between prompts" in text


def test_alpha_stands_on_its_own_and_plans_the_rules_asked_for(call, run):
    out = call("alpha", run.path, "--plan-rule", "dapo", "--plan-rule", "vl_norm:0.5", "--advantage", "rloo")
    words = " ".join(out.split())
    assert "rloo advantages in groups of 8" in words
    assert "least-variance weights by the fitted law" in words
    assert not (run.path / "tables" / "law.parquet").exists()
    for part in ("CV <= 1 of dapo", "CV <= 1 of vl_norm α=0.5", "Noise scale of the gradient itself", "tested: "):
        assert part in words
    document = json.loads(call("alpha", run.path, "--json", "--plan-rule", "grpo", "--advantage", "rloo"))
    assert document["advice"] in words
    assert "for example vl_norm:1" in call("alpha", run.path, "--plan-rule", "vl_norm", code=2)
    call("figures", run.path)


def test_a_negative_alpha_is_named(call, run):
    out = call("cv", run.path, "--rule", "vl_norm", "--rule", "grpo", "--alpha", "-1")
    assert "vl_norm α=-1" in out
