"""targets and measure --dry-run: what they print, and that they write nothing."""

import json
import shutil

import pytest

from cli import console
from cli.main import main
from gradvar.demo import policy_path
from gradvar.runs import open_run
from gradvar.stages import measure
from tests.stages.small import INFINITE, make_run, responses, write_responses


@pytest.fixture
def call(capsys, monkeypatch):
    monkeypatch.setattr(console.result, "_width", 160)  # a console made under COLUMNS keeps that width

    def run(*arguments, code=0) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main([str(argument) for argument in arguments])
        out = capsys.readouterr()
        assert left.value.code == code, out.err
        assert "Traceback" not in out.err
        return out.out if code == 0 else out.err.strip().splitlines()[-1]

    return run


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path).path


def everything(path):
    return {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_targets_are_listed_from_the_configuration_alone(call, tmp_path):
    shutil.copy(policy_path() / "config.json", tmp_path / "config.json")
    out = call("targets", tmp_path)
    (row,) = [line for line in out.splitlines() if line.startswith("model.layers.*.self_attn.q_proj")]
    assert row.split()[1:] == ["0-3", "q", "128", "x", "128", "yes", "4", "x", "16.5", "k"]
    assert "mlp  picks mlp.gate_proj, mlp.up_proj, mlp.down_proj" in out
    assert "1 Embedding" in out
    assert "model.layers.2.mlp.up_proj" in call("targets", tmp_path, "--all")
    assert "mlp" not in call("targets", tmp_path, "--spec", "last:qkv").partition("qkv ")[0]


def test_targets_as_json(call, tmp_path):
    shutil.copy(policy_path() / "config.json", tmp_path / "config.json")
    document = json.loads(call("targets", tmp_path, "--json"))
    assert document["layers"] == 4
    first = document["targets"][0]
    assert first["key"] == "model.layers.0.self_attn.q_proj"
    assert (first["rows"], first["columns"], first["parameters"], first["bias"]) == (128, 128, 128 * 129, True)
    assert document["presets"]["o"] == ["model.layers.*.self_attn.o_proj"]


def test_quantised_weights_are_told(call, tmp_path):
    config = json.loads((policy_path() / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "quantised (awq)" in call("targets", tmp_path)


def test_targets_of_what_is_no_model(call, tmp_path):
    assert "no such folder" in call("targets", tmp_path / "nowhere", code=2)
    assert "no config.json" in call("targets", tmp_path, code=2)
    line = call("targets", policy_path(), "--spec", "last:qvk", code=2)
    assert "'qvk' is not a kind" in line


def test_a_dry_run_tells_the_plan_and_writes_nothing(call, run):
    before = everything(run)
    out = call("measure", run, "--dry-run", "--targets", "all:mlp", "--probes", "2", "--memory-budget", "0.01")
    assert everything(run) == before
    for words in ("batches", "padding", "passes", "model.layers.0.mlp.up_proj", "2 probes", "FLOP", "beside the model"):
        assert words in out
    document = json.loads(
        call("measure", run, "--dry-run", "--targets", "all:mlp", "--memory-budget", "0.01", "--json")
    )
    assert document["peak_bytes"] <= 0.01 * 2**30
    assert document["flop"] == sum(one["flop"] for one in document["prompts"])
    (one, _) = document["prompts"]
    kept = [block["target"] for blocks in one["passes"] for block in blocks]
    assert set(kept) == set(document["targets"]) == set(one["missing"]["grams"])
    assert everything(run) == before


def test_a_dry_run_tells_what_the_host_holds(call, run, monkeypatch):
    """The CPU plays a device without room: the host is used before batches are made smaller."""
    monkeypatch.setattr("gradvar.gradients.gram.PIECE", 1 << 10)  # little on its way at one time
    options = ["measure", run, "--dry-run", "--targets", "all:mlp", "--memory-budget", "0.0004"]
    alone = json.loads(call(*options, "--json"))
    shared = json.loads(call(*options, "--host-memory-budget", "1", "--json"))
    assert alone["host_bytes"] == 0 < shared["host_bytes"]
    for one, other in zip(alone["prompts"], shared["prompts"], strict=True):
        assert one["token_budget"] < other["token_budget"]
        held = [sum(block["bytes"] for block in blocks if block["home"] == "host") for blocks in other["passes"]]
        assert max(held) == other["host_bytes"] < other["transfer_bytes"]
    out = call(*options, "--host-memory-budget", "1")
    assert "in the host's memory" in out
    assert "host" in out.partition("in memory of")[2]


def test_more_probes_cost_more(call, run):
    plain, more = (
        json.loads(call("measure", run, "--dry-run", "--probes", probes, "--json"))["flop"] for probes in ("0", "4")
    )
    assert more > plain


def test_a_dry_run_of_what_is_measured(call, run):
    measure(open_run(run), {"targets": ("last:v",)})
    assert "nothing is missing: 2 prompts" in call("measure", run, "--dry-run")
    out = call("measure", run, "--dry-run", "--prefixes", "3", "--json")
    assert [one["missing"]["grams"] for one in json.loads(out)["prompts"]] == [[], []]
    assert [len(one["missing"]["prefixes"]) for one in json.loads(out)["prompts"]] == [1, 1]


def test_a_budget_too_small_for_one_response(call, run):
    line = call("measure", run, "--dry-run", "--memory-budget", "0.00001", code=2)
    assert "is too small" in line
    assert "for the longest response alone" in line
    assert "expected at least" in line


def test_check_prints_words_and_the_worst_tokens(call, run):
    measure(open_run(run), {"targets": ("last:v",)})
    out = call("check", run, "--responses", "3")
    for words in ("precise", "alone", "in a batch", "score identity", "entropy balance", "conditioning", "position"):
        assert words in out
    assert "sampler against policy: disagree" in out  # small.py's sampler says -1 of every token
    assert "float32, sdpa attention, biases counted" in out
    assert "float32, sdpa attention, biases counted" in call("info", run)
    document = json.loads(call("check", run, "--json"))
    assert {row["quantity"] for row in document["check"]} >= {
        "gradient_cosine",
        "deviation_error",
        "sampler_worst_token",
    }
    assert "--responses: expected at least 2" in call("check", run, "--responses", "1", code=2)


def test_check_of_a_run_that_was_not_measured(call, run):
    assert "gradvar measure" in call("check", run, code=2)


def test_measure_says_what_was_added_and_what_was_left_out(call, tmp_path):
    token_ids = responses((4, 5, 6, 4))
    token_ids[1][0] = INFINITE
    run = make_run(tmp_path, spoil=True)
    write_responses(run, "1", token_ids)
    out = call("measure", run.path, "--probes", "2", "--prefixes", "3", "--leave-out-non-finite")
    assert ", tau by 2 probes, 3 prefixes" in " ".join(out.split())
    assert list(json.loads(call("measure", run.path, "--json"))["left_out"]["1"]) == ["1"]
    assert "left out  1 responses" in call("info", run.path)
