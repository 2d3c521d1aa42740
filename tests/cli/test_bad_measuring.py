"""Mistakes around measuring, through the command line: one line, exit code 2, nothing changed."""

import json
import re

import pytest
import torch

from cli.main import main
from gradvar.demo import policy_path
from gradvar.runs import Rollout, open_run
from tests.stages.small import INFINITE, make_run, responses, write_responses


@pytest.fixture
def refused(capsys):
    def call(*arguments) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main([str(argument) for argument in arguments])
        err = capsys.readouterr().err
        assert left.value.code == 2, err
        assert "Traceback" not in err
        last = err.strip().splitlines()[-1]
        assert last.startswith("gradvar: "), err
        return last

    return call


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--targets", "*.self_attn.q_porj"], ["matches nothing", "q_proj"]),
        (["--targets", "last:router"], ["matches nothing", "these layers have", "measurable:"]),
        (["--targets", "99:qkv"], ["layers 0 to 1", "99"]),
        (["--targets", "model.norm"], ["is a Qwen2RMSNorm", "cannot be measured"]),
        (["--checkpointing", "always"], ["off, reentrant, non_reentrant", "'always'"]),
        (["--attention", "fast"], ["--attention: expected one of auto, eager, sdpa", "'fast'"]),
        (["--attention", "flash_attention_2"], ["--attention flash_attention_2: expected a CUDA device"]),
        (["--attention", "flex_attention"], ["no backward of it on cpu"]),
        (["--probes", "-1"], ["--probes: expected 0 or more"]),
        (["--probes", "few"], ["'few'"]),
        (["--prefixes", "1"], ["--prefixes: expected at least 2"]),
        (["--memory-budget", "0"], ["--memory-budget: expected GiB above 0"]),
        (["--token-budget", "0"], ["--token-budget: expected at least 1"]),
        (["--no-bias", "--dry-run", "--memory-budget", "0.00001"], ["too small", "expected at least", "GiB"]),
    ],
)
def test_options_that_cannot_be_met(refused, run, options, words):
    before = {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file() and p.name != ".lock"}
    line = refused("measure", run.path, *options)
    for word in words:
        assert word in line
    assert {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file() and p.name != ".lock"} == before


def done(*arguments):
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    assert left.value.code == 0


def test_an_attention_that_mixes_packed_sequences_is_refused_by_name(refused, run, monkeypatch):
    """As eager and sdpa of older transformers do; `--no-packing` is named as the way out."""
    from gradvar.gradients import batches

    own = batches.Batch.positions.fget
    plain = property(lambda self: None if self.packed else own(self))
    monkeypatch.setattr(batches.Batch, "positions", plain)  # sequences are told apart by their positions
    line = refused("measure", run.path, "--packing", "--targets", "last:qkv")
    for word in ("mixes packed sequences", "sdpa attention", "--no-packing", "another --attention"):
        assert word in line
    assert not any((run.path / "grams").glob("*"))


def test_one_run_holds_one_attention(refused, run):
    done("measure", run.path, "--attention", "eager")
    assert open_run(run.path).info["stages"]["measure"]["attention"] == "eager"
    line = refused("measure", run.path, "--attention", "sdpa", "--targets", "0:qkv")
    assert "was measured with eager attention, received --attention sdpa" in line
    done("measure", run.path, "--targets", "0:qkv")  # left out, it is the run's
    assert open_run(run.path).info["stages"]["measure"]["attention"] == "eager"
    assert "--attention: expected one of" in refused("check", run.path, "--attention", "fast")


def test_packed_and_padded_runs_agree(tmp_path):
    import numpy as np

    grams = []
    for name, options in (("a", []), ("b", ["--attention", "gradvar_varlen", "--packing"])):
        tmp_path.joinpath(name).mkdir()
        one = make_run(tmp_path / name)
        done("measure", one.path, *options)
        one = open_run(one.path)
        grams.append({p.prompt_id: one.grams(p.prompt_id) for p in one.prompts()})
    for prompt_id, of_prompt in grams[0].items():
        for key, gram in of_prompt.items():
            np.testing.assert_allclose(grams[1][prompt_id][key].gram(), gram.gram(), rtol=1e-4, atol=1e-6)


def test_a_response_that_is_not_finite_is_named_with_the_option(refused, run):
    token_ids = responses((4, 5, 6))
    token_ids[1][0] = INFINITE
    spoiled = make_run(run.path.parent / "spoiled", spoil=True)
    write_responses(spoiled, "1", token_ids)
    line = refused("measure", spoiled.path)
    assert "prompt '1'" in line
    assert "response 1:" in line
    assert "--leave-out-non-finite" in line
    assert open_run(spoiled.path).measured_prompt_ids() == ["0"]  # what was finished is kept


def test_a_budget_too_small_for_one_response_and_the_least_that_would_do(refused, run):
    line = refused("measure", run.path, "--memory-budget", "0.00001")
    least = int(re.search(r"expected at least (\d+) bytes", line)[1])
    assert not run.measured_prompt_ids()
    with pytest.raises(SystemExit) as left:
        main(["measure", str(run.path), "--memory-budget", str(1.05 * least / 2**30)])
    assert left.value.code == 0


def test_a_response_beyond_the_models_positions(refused, run):
    long = Rollout(rollout_id=0, token_ids=(3,) * 70, text="", finish_reason="length")
    run.write_rollouts("0", [long, Rollout(rollout_id=1, token_ids=(3,), text="", finish_reason="stop")])
    line = refused("measure", run.path)
    assert "response 0 with its prompt feeds 71 tokens: the model has 64 positions" in line


def test_ids_outside_the_vocabulary(refused, run):
    odd = [Rollout(rollout_id=i, token_ids=(3, 99), text="", finish_reason="stop") for i in range(2)]
    run.write_rollouts("0", odd)
    assert "response 0 holds token id 99: the model's vocabulary has ids 0 to 7" in refused("measure", run.path)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"response_token_ids": []}, "response_token_ids is empty"),
        ({"response_token_ids": [3, 10**6]}, "1000000"),
        ({"response_token_ids": [3] * 5000}, "the model's context is"),
        ({"response_token_ids": [3, 4], "loss_mask": [0, 0]}, "no token carries loss"),
        ({"response_token_ids": [3, 4], "loss_mask": [1]}, "loss_mask has 1 entries for 2 response tokens"),
    ],
)
def test_imports_that_could_not_be_measured(refused, tmp_path, row, words):
    path = tmp_path / "r.jsonl"
    good = {"prompt_token_ids": [1, 2], "response_token_ids": [3, 4]}
    path.write_text("\n".join(json.dumps(one) for one in (good, {**good, **row})))
    line = refused("sample", tmp_path / "r", "--model", policy_path(), "--from", path)
    assert words in line
    assert "row 1" in line
    assert not (tmp_path / "r" / "rollouts").exists()


def test_a_full_gpu_ends_in_one_line(monkeypatch, capsys):
    def full(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")

    monkeypatch.setattr("cli.main.app", full)
    with pytest.raises(SystemExit) as left:
        main(["measure", "run"])
    assert left.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "GPU's memory ran out" in lines[0]
    assert "--memory-budget" in lines[0]
