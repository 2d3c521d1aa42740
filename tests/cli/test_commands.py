"""Every command on a finished run: what it prints, its JSON, and the ways in from outside."""

import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
import torch

import gradvar
from cli.main import main
from gradvar.demo import policy_path, problems_path, template_path
from gradvar.models import find_model, load_model
from tests.conftest import gradvar as run_command


@pytest.fixture
def call(capsys):
    def run(*arguments) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main([str(argument) for argument in arguments])
        out = capsys.readouterr()
        assert left.value.code == 0, out.err
        return out.out

    return run


@pytest.fixture
def run(finished_run, tmp_path):
    shutil.copytree(finished_run, tmp_path / "run")
    return tmp_path / "run"


def test_the_demo_ends_with_verdict_table_and_paths(finished_run, tmp_path):
    shutil.copytree(finished_run, tmp_path / "run")
    done = run_command("demo", tmp_path / "run", "--n-prompts", "3", "--rollouts", "24")
    assert done.returncode == 0, done.stderr
    for words in ("grows as length to the power", "Total CV of each aggregator", "vl_norm α=1", "dr_grpo", "E s = 0"):
        assert words in done.stdout
    named = re.findall(r"\S+\.(?:png|parquet)", done.stdout)
    assert len(named) >= 5
    for path in named:
        assert (tmp_path / "run" / path.split("/run/")[1]).stat().st_size > 0
    assert "\x1b[" not in done.stdout  # no colour where no terminal is


@pytest.mark.parametrize(
    "name", ["info", "fit", "cv", "alpha", "audit", "figures", "report", "reward", "measure", "sample"]
)
def test_json_is_json(call, run, name):
    document = json.loads(call(name, run, "--json"))
    assert isinstance(document, dict)
    assert document


def test_info_shows_the_first_prompt_as_the_model_sees_it(call, run):
    first = gradvar.open_run(run).prompts()[0]
    out = call("info", run)
    assert first.text.strip() in out
    assert f"{len(first.token_ids)} tokens" in out
    document = json.loads(call("info", run, "--json"))
    assert document["first_prompt"]["token_ids"] == list(first.token_ids)
    assert document["stages"]["sample"]["problems"]["schema"] == "CountDown"


def test_a_dry_run_shows_the_prompt_and_writes_nothing(call, tmp_path):
    options = ["--model", policy_path(), "--prompts", problems_path(), "--template", template_path()]
    document = json.loads(call("sample", tmp_path / "r", *options, "--max-tokens", "64", "--dry-run", "--json"))
    assert document["problems"]["chosen"] == document["prompts"]
    assert not (tmp_path / "r").exists()


def test_figures_are_written_and_hold_vector_text(call, run):
    shutil.rmtree(run / "figures")
    files = json.loads(call("figures", run, "--json"))["files"]
    assert {"length_law_score.png", "length_law_grpo.pdf", "aggregator_cv.png", "alpha_curve.png"} <= {
        f.rpartition("/")[2] for f in files
    }
    for name in ("length_law_score.pdf", "aggregator_cv.pdf"):
        assert b"/Type3" not in (run / "figures" / name).read_bytes()


def test_estimate_options_reach_the_tables(call, run):
    document = json.loads(call("cv", run, "--json", "--group-size", "4", "--rule", "vl_norm", "--alpha", "1.25"))
    rows = [row for row in document["cv"] if row["quantity"] == "cv" and row["rule"] is not None]
    assert {(row["rule"], row["alpha"], row["group_size"]) for row in rows} == {("vl_norm", 1.25, 4)}
    assert all(row["seed"] == 0 and row["level"] == 0.95 for row in rows)


def test_settings_from_a_file_and_the_command_line_wins(call, run, tmp_path):
    (tmp_path / "c.toml").write_text("group-size = 4\nadvantage = 'rloo'\n")
    document = json.loads(call("cv", run, "--json", "--config", tmp_path / "c.toml", "--advantage", "mean"))
    rows = [row for row in document["cv"] if row["quantity"] == "cv"]
    assert {(row["group_size"], row["advantage"]) for row in rows} == {(4, "mean")}


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_rollouts_made_elsewhere_give_the_same_numbers(call, run, tmp_path, suffix):
    source = gradvar.open_run(run)
    rows = []
    for prompt in source.prompts():
        rewards = source.rewards(prompt.prompt_id)
        for rollout, reward in zip(source.rollouts(prompt.prompt_id), rewards, strict=True):
            rows.append(
                {
                    "prompt_id": prompt.prompt_id,
                    "prompt_token_ids": list(prompt.token_ids),
                    "response_token_ids": list(rollout.token_ids),
                    "logprobs": list(rollout.sampler_logprobs),
                    "reward": float(reward),
                }
            )
    path = tmp_path / f"elsewhere.{suffix}"
    frame = pd.DataFrame(rows)
    frame.to_parquet(path) if suffix == "parquet" else frame.to_json(path, orient="records", lines=True)
    other = tmp_path / "imported"
    call("sample", other, "--model", policy_path(), "--from", path)
    call("reward", other)
    call("measure", other)
    call("cv", other)
    ours, theirs = gradvar.open_run(other), source
    for one, two in zip(ours.scores(), theirs.scores(), strict=True):
        np.testing.assert_allclose(one.gram, two.gram, rtol=1e-9)
        np.testing.assert_array_equal(one.rewards, two.rewards)
        np.testing.assert_array_equal(one.truncated, two.truncated)
    assert "imported" in call("info", other)


def test_a_sampler_at_another_temperature_is_the_first_thing_told(call, run, tmp_path):
    source = gradvar.open_run(run)
    prompt = source.prompts()[0]
    rows = [
        {
            "prompt_token_ids": list(prompt.token_ids),
            "response_token_ids": list(rollout.token_ids),
            "logprobs": [0.8 * lp - 0.1 for lp in rollout.sampler_logprobs],
        }
        for rollout in source.rollouts(prompt.prompt_id)
    ]
    path = tmp_path / "elsewhere.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    call("sample", tmp_path / "other", "--model", policy_path(), "--from", path)
    out = call("measure", tmp_path / "other")
    assert out.startswith("SAMPLER AND POLICY DISAGREE on 1 of 1 prompt:")
    assert "SAMPLER AND POLICY" not in call("measure", run)


def test_the_run_holds_the_policys_own_gradients(run):
    """The whole way against plain autograd in float64: prompt, rollouts, Gram, log-probabilities."""
    source = gradvar.open_run(run)
    prompt = source.prompts()[0]
    rollouts = source.rollouts(prompt.prompt_id)[:5]
    model = load_model(find_model(str(policy_path())), dtype="float64", device="cpu")
    grams = source.grams(prompt.prompt_id)
    weights = {name: model.get_submodule(name) for name in grams}
    rows: dict[str, list[torch.Tensor]] = {name: [] for name in grams}
    for rollout, measured in zip(rollouts, source.measures(prompt.prompt_id).policy_logprobs, strict=False):
        ids = torch.tensor([[*prompt.token_ids, *rollout.token_ids]])
        start = len(prompt.token_ids)
        logprobs = model(input_ids=ids).logits[0, start - 1 : -1].log_softmax(-1)
        chosen = logprobs.gather(1, ids[0, start:, None])[:, 0]
        np.testing.assert_allclose(measured, chosen.detach().numpy(), atol=2e-4)
        np.testing.assert_allclose(rollout.sampler_logprobs, chosen.detach().numpy(), atol=2e-4)
        for name, module in weights.items():
            parameters = [module.weight] + ([module.bias] if module.bias is not None else [])
            parts = torch.autograd.grad(chosen.sum(), parameters, retain_graph=True)
            rows[name].append(torch.cat([part.flatten() for part in parts]))
    for name, gram in grams.items():
        gradients = torch.stack(rows[name]).numpy()
        expected = gradients @ gradients.T
        np.testing.assert_allclose(gram.matrix[:5, :5], expected, atol=1e-4 * np.abs(expected).max())
