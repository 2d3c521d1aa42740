"""Settings: layers, types, ranges, files; the later layer wins and unknown names are refused."""

import pytest

from gradvar.errors import GradvarError
from gradvar.runs.config import EstimateConfig, MeasureConfig, SampleConfig, read_settings, resolve


def test_the_later_layer_wins_and_none_means_not_given():
    config = resolve(SampleConfig, {"rollouts": 64, "seed": 3}, {"rollouts": 32, "seed": None})
    assert (config.rollouts, config.seed, config.temperature) == (32, 3, 1.0)


def test_lists_become_tuples_and_whole_numbers_become_floats():
    assert resolve(MeasureConfig, {"targets": ["a", "b"]}).targets == ("a", "b")
    assert resolve(MeasureConfig, {"targets": "last:qkv"}).targets == ("last:qkv",)
    assert resolve(EstimateConfig, {"alphas": [1, 0.5]}).alphas == (1.0, 0.5)


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        (SampleConfig, {"rollouts": 1}, "--rollouts: expected at least 2"),
        (SampleConfig, {"temperature": 0.0}, "--temperature: expected a number above 0, received 0.0"),
        (SampleConfig, {"temperature": float("nan")}, "--temperature"),
        (SampleConfig, {"max_tokens": 0}, "--max-tokens: expected at least 1"),
        (SampleConfig, {"engine": "sglang"}, "one of auto, vllm, transformers"),
        (SampleConfig, {"dtype": "int8"}, "--dtype"),
        (SampleConfig, {"rollouts": "many"}, "--rollouts: expected int, received 'many'"),
        (SampleConfig, {"rollouts": True}, "--rollouts: expected int"),
        (SampleConfig, {"gpu_memory_utilization": 1.5}, "--gpu-memory-utilization"),
        (MeasureConfig, {"memory_budget": -1.0}, "--memory-budget"),
        (MeasureConfig, {"host_memory_budget": -1.0}, "--host-memory-budget"),
        (MeasureConfig, {"host_memory_budget": float("nan")}, "--host-memory-budget"),
        (EstimateConfig, {"advantage": "gae"}, "one of grpo, mean, rloo, raw, score, opo"),
        (EstimateConfig, {"level": 1.0}, "--level"),
        (EstimateConfig, {"alphas": ["x"]}, "--alpha: expected float, received 'x'"),
        (EstimateConfig, {"group_size": 1}, "--group-size"),
        (
            SampleConfig,
            {"seed": 2**63},
            "--seed: expected a whole number from 0 to 2^63 - 1, received 9223372036854775808",
        ),
        (MeasureConfig, {"seed": 2**63}, "--seed"),
        (EstimateConfig, {"seed": 2**63}, "--seed"),
        (EstimateConfig, {"seed": -1}, "--seed"),
    ],
)
def test_bad_values_are_one_line(kind, settings, words):
    with pytest.raises(GradvarError) as caught:
        resolve(kind, settings)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_config_files_use_the_names_of_the_command_line(tmp_path):
    toml, yaml = tmp_path / "a.toml", tmp_path / "a.yaml"
    toml.write_text('max-tokens = 64\ntargets = ["last:qkv"]\nbias = false\n')
    yaml.write_text("max_tokens: 64\ntargets: [last:qkv]\nbias: false\n")
    expected = {"max_tokens": 64, "targets": ["last:qkv"], "include_bias": False}
    assert read_settings(toml) == expected
    assert read_settings(yaml) == expected


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.toml", "max-tokns = 3", "did you mean 'max_tokens'"),
        ("a.toml", "= 3", "not valid TOML"),
        ("a.yaml", "a: [", "not valid YAML"),
        ("a.yaml", "- 3", "expected names with values"),
        ("a.yaml", "x: !!python/object/apply:os.system ['true']", "not valid YAML"),
        ("a.ini", "", "expected a .toml"),
    ],
)
def test_bad_config_files_are_one_line(tmp_path, name, text, words):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(GradvarError) as caught:
        read_settings(path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_config_file_is_named(tmp_path):
    with pytest.raises(GradvarError, match=r"none\.toml"):
        read_settings(tmp_path / "none.toml")
