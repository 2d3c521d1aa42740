"""Every mistake ends in one line that says what was expected and received, exit code 2, nothing lost, no traceback."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

import gradvar
from cli.main import main
from gradvar.demo import policy_path, problems_path, template_path


@pytest.fixture
def refused(capsys):
    def call(*arguments: str | Path) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main([str(argument) for argument in arguments])
        err = capsys.readouterr().err
        assert left.value.code == 2, err
        last = err.strip().splitlines()[-1]
        assert last.startswith("gradvar: "), err
        assert "Traceback" not in err
        return last

    return call


@pytest.fixture
def run(finished_run, tmp_path):
    shutil.copytree(finished_run, tmp_path / "run")
    return tmp_path / "run"


def asked(model=None, prompts=None, *more):
    base = ["--model", model or policy_path(), "--prompts", prompts or problems_path(), "--template", template_path()]
    return [*base, "--max-tokens", "64", "--n-prompts", "2", "--rollouts", "16", *more]


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_models_that_are_none(refused, tmp_path):
    line = refused("sample", tmp_path / "r", *asked(model=tmp_path / "nowhere"))
    assert "no such folder" in line
    assert "nowhere" in line
    assert "expected a folder" in refused("sample", tmp_path / "r", *asked(model=write(tmp_path / "file", "")))
    (tmp_path / "empty").mkdir()
    assert "no config.json" in refused("sample", tmp_path / "r", *asked(model=tmp_path / "empty"))
    shutil.copytree(policy_path(), tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    assert "no *.safetensors" in refused("sample", tmp_path / "r", *asked(model=tmp_path / "bare"))
    assert not (tmp_path / "r").exists() or not (tmp_path / "r" / "run.json").exists()


def test_a_tokenizer_without_end_token(refused, tmp_path):
    shutil.copytree(policy_path(), tmp_path / "endless")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = tmp_path / "endless" / name
        if path.exists():
            path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "eos_token"}))
    assert "no end token" in refused("sample", tmp_path / "r", *asked(model=tmp_path / "endless"))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.jsonl", b"", "empty"),
        ("p.jsonl", b'{"wrong": 1}\n', "wrong"),
        ("p.jsonl", b'{"prompt": null}\n', "null"),
        ("p.jsonl", b'{"nums": [1, 2], "target": null}\n', "null"),
        ("p.jsonl", b'{"prompt": "\xff"}\n', "UTF-8"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": \n', "line 2"),
        ("p.txt", b"a", ".txt"),
    ],
)
def test_prompt_files_that_cannot_be_used(refused, tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content)
    line = refused("sample", tmp_path / "r", *asked(prompts=path))
    assert words in line
    assert str(path) in line


def test_a_missing_prompt_file(refused, tmp_path):
    assert "none.jsonl" in refused("sample", tmp_path / "r", *asked(prompts=tmp_path / "none.jsonl"))
    assert "--prompts" in refused("sample", tmp_path / "r", "--model", policy_path())
    assert "--model" in refused("sample", tmp_path / "r")


def test_prompts_that_are_not_in_the_file(refused, tmp_path):
    options = [*asked()[:-4], "--prompt-ids", "99999"]
    assert "'99999' is not in the file" in refused("sample", tmp_path / "r", *options)


def test_a_prompt_longer_than_the_context(refused, tmp_path):
    rows = [{"nums": [1, 2, 3], "target": 6}, {"nums": [1] * 4000, "target": 6}]
    path = write(tmp_path / "p.jsonl", "\n".join(map(json.dumps, rows)))
    assert "prompt 1 has" in refused("sample", tmp_path / "r", *asked(prompts=path))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--rollouts", "1"], "--rollouts: expected at least 2"),
        (["--temperature", "0"], "--temperature: expected a number above 0"),
        (["--temperature", "-1"], "--temperature"),
        (["--temperature", "warm"], "'warm'"),
        (["--max-tokens", "100000"], "does not fit"),
        (["--engine", "sglang"], "transformers"),
        (["--template", "nowhere.txt"], "nowhere.txt"),
        (["--prompt-ids", "3"], "--n-prompts and --prompt-ids"),
        (["--n-prompts", "0"], "--n-prompts"),
        (["--dtype", "int4"], "--dtype"),
        (["--no-such-option"], "--no-such-option"),
    ],
)
def test_sampling_options(refused, tmp_path, options, words):
    assert words in refused("sample", tmp_path / "r", *asked(None, None, *options))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--targets", "last:qvk"], "qkv"),
        (["--targets", "99:qkv"], "99"),
        (["--targets", "*.self_attn.q_porj"], "q_proj"),
        (["--rule", "grop"], "grpo"),
        (["--advantage", "gae"], "rloo"),
        (["--alpha", "one"], "'one'"),
        (["--group-size", "500"], "--group-size"),
        (["--reward", "nowhere.py:f"], "nowhere.py"),
        (["--reward", "mathh"], "math"),
        (["--config", "nowhere.toml"], "nowhere.toml"),
    ],
)
def test_the_whole_job_is_checked_before_anything_is_sampled(refused, tmp_path, options, words):
    line = refused("run", tmp_path / "r", *asked(), *options)
    assert words in line
    assert not (tmp_path / "r" / "rollouts").exists()


def test_runs_that_are_none(refused, tmp_path):
    assert "no run directory" in refused("fit", tmp_path / "nowhere")
    write(tmp_path / "mine.txt", "")
    assert "has no run.json" in refused("cv", tmp_path)
    assert "not empty" in refused("sample", tmp_path, *asked())


def test_a_folder_that_cannot_be_written(refused, tmp_path):
    line = refused("sample", "/proc/gradvar-run", *asked())
    assert line.startswith("gradvar: cannot write to /proc/gradvar-run")


def test_a_newer_format(refused, run):
    info = json.loads((run / "run.json").read_text())
    write(run / "run.json", json.dumps({**info, "format_version": 2}))
    assert "format_version 2" in refused("info", run)


@pytest.mark.parametrize(("kind", "arguments"), [("grams", ["fit"]), ("rollouts", ["measure"]), ("rewards", ["cv"])])
def test_a_damaged_file_is_named_and_nothing_is_lost(refused, run, kind, arguments):
    path = next((run / kind).iterdir())
    path.write_bytes(path.read_bytes()[:100])
    others = {p: p.read_bytes() for p in run.rglob("*.parquet") if p != path}
    line = refused(*arguments, run)
    assert str(path) in line
    assert "damaged" in line
    assert {p: p.read_bytes() for p in others} == others


def test_imported_ids_that_do_not_fit_the_model(refused, tmp_path):
    path = write(tmp_path / "r.jsonl", json.dumps({"prompt_token_ids": [1, 2], "response_token_ids": [3, 10**6]}))
    line = refused("sample", tmp_path / "r", "--model", policy_path(), "--from", path)
    assert "1000000" in line


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("raise KeyError('gold')", "KeyError"),
        ("pass", "returned nothing"),
        ("return float('nan')", "nan"),
        ("return 'right'", "'right'"),
        ("return {'points': 1}", "score"),
    ],
)
def test_reward_functions_that_fail(refused, run, tmp_path, body, words):
    source = f"def f(data_source, solution_str, ground_truth, extra_info=None):\n    {body}\n"
    path = write(tmp_path / "mine.py", source)
    before = {p.name: p.read_bytes() for p in (run / "rewards").iterdir()}
    line = refused("reward", run, "--reward", f"{path}:f")
    assert words in line
    assert "rollout 0" in line
    assert {p.name: p.read_bytes() for p in (run / "rewards").iterdir()} == before


def test_a_group_larger_than_the_rollouts(refused, run):
    assert "at most the 24 rollouts" in refused("cv", run, "--group-size", "25")


def test_equal_rewards_are_said_plainly_and_the_score_is_still_fitted(run, tmp_path, capsys):
    source = "def one(data_source, solution_str, ground_truth, extra_info=None):\n    return 1.0\n"
    path = write(tmp_path / "mine.py", source)
    for arguments in (["reward", run, "--reward", f"{path}:one"], ["fit", run], ["cv", run]):
        with pytest.raises(SystemExit) as left:
            main([str(argument) for argument in arguments])
        assert left.value.code == 0
        if arguments[0] == "reward":
            assert "all rewards are equal" in capsys.readouterr().err
    law = gradvar.open_run(run).table("law")
    exponents = law[(law["quantity"] == "deviation_exponent") & (law["advantage"] == "score")]
    assert exponents["value"].notna().any()
    cv = gradvar.open_run(run).table("cv")
    assert cv[cv["quantity"] == "cv"]["value"].isna().all()
    assert isinstance(cv, pd.DataFrame)


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(gradvar.GradvarError):
        main(["--debug", "fit", str(tmp_path / "nowhere")])


@pytest.mark.parametrize(
    "arguments",
    [
        ["cv", "--rule", "grpoo"],
        ["cv", "--group-size", "24"],
        ["alpha", "--group-size", "500"],
        ["fit", "--advantage", "gae"],
        ["reward", "--reward", "nowhere.py:f"],
        ["reward", "--reward", "gsm8k"],
        ["measure", "--targets", "99:qkv"],
        ["sample", "--temperature", "0.5"],
        ["sample", "--engine", "imported"],
        ["sample", "--prompt-ids", ","],
        ["run", "--rule", "grpoo"],
    ],
)
def test_a_refused_command_changes_nothing(refused, run, arguments):
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != ".lock"}
    refused(arguments[0], run, *arguments[1:])
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != ".lock"} == before


def test_a_scoring_that_broke_off_is_not_pooled(refused, run, tmp_path):
    source = "calls = []\ndef f(**k):\n    calls.append(1)\n    assert len(calls) < 30, 'no more'\n    return 1.0\n"
    path = write(tmp_path / "mine.py", source)
    assert "no more" in refused("reward", run, "--reward", f"{path}:f")
    assert "scoring" in refused("fit", run)
    with pytest.raises(SystemExit) as left:
        main(["reward", str(run), "--reward", "countdown"])
    assert left.value.code == 0


def test_an_import_of_single_responses(refused, tmp_path):
    path = write(tmp_path / "r.jsonl", json.dumps({"prompt_token_ids": [1, 2], "response_token_ids": [3, 4]}))
    assert "expected at least 2" in refused("sample", tmp_path / "r", "--model", policy_path(), "--from", path)


def test_an_import_too_small_for_two_groups_is_refused_before_it_is_measured(refused, tmp_path):
    rows = [
        {"prompt_token_ids": [1, 2], "response_token_ids": [3, 4 + k], "reward": float(k % 2), "prompt_id": "p"}
        for k in range(6)
    ]
    path = write(tmp_path / "r.jsonl", "\n".join(json.dumps(row) for row in rows))
    run = tmp_path / "r"
    line = refused("run", run, "--model", policy_path(), "--from", path, "--group-size", "4")
    assert "expected at most 3, half the 6 verified responses" in line
    assert not list(run.glob("grams/*"))
    assert list(run.glob("rewards/*"))


def test_a_prompt_that_is_not_unicode(refused, tmp_path):
    path = write(tmp_path / "p.jsonl", '{"prompt": "\\ud800 a", "answer": "1"}\n')
    options = ["--template", "none", *asked(prompts=path)[:4], "--max-tokens", "64"]
    assert "not valid Unicode" in refused("sample", tmp_path / "r", *options)


def test_a_gram_that_is_none(refused, run):
    opened = gradvar.open_run(run)
    prompt_id = opened.prompt_ids[0]
    grams = opened.grams(prompt_id)
    first = next(iter(grams.values()))
    first.matrix[0, 1] = 1e30
    opened.write_grams(prompt_id, grams, rollouts_digest=opened.grams_label(prompt_id))
    assert "not a Gram matrix" in refused("fit", run)
