import importlib.util
import json
from itertools import pairwise

import pytest

from gradvar.errors import GradvarError
from gradvar.rollouts.engines import SamplingRequest, SamplingSettings, default_engine, prompt_seed, sample
from gradvar.rollouts.engines.requests import end_token_ids, make_rollout
from gradvar.runs.records import Prompt
from tests.rollouts.tiny import make_tokenizer


def test_seeds_of_neighbours_lie_far_apart():
    seeds = sorted(prompt_seed(seed, index, first) for seed in (0, 1) for index in range(300) for first in (0, 128))
    gaps = [after - before for before, after in pairwise(seeds)]
    assert min(gaps) > 16384, "vLLM gives the i-th of n responses the seed + i"
    assert seeds[0] >= 0
    assert seeds[-1] < 2**62
    assert prompt_seed(0, 3) == prompt_seed(0, 3, 0)


def test_seeds_are_those_of_yesterday():
    """A run that goes on after an upgrade draws what it would have drawn."""
    assert prompt_seed(0, 0) == PINNED[0]
    assert prompt_seed(7, 12, 128) == PINNED[1]


PINNED = (3948308845846928943, 2395578844362231612)


def test_negative_seeds_are_refused():
    with pytest.raises(GradvarError, match="--seed: expected 0 or more, received -1"):
        prompt_seed(-1, 0)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"temperature": 0.0}, "--temperature: expected a number above 0, received 0.0"),
        ({"temperature": float("nan")}, "--temperature"),
        ({"max_tokens": 0}, "--max-tokens: expected at least 1"),
        ({"batch_size": 0}, "--batch-size"),
        ({"dtype": "int8"}, "--dtype: expected one of float32, bfloat16, float16, received 'int8'"),
        ({"gpu_memory_utilization": 1.2}, "--gpu-memory-utilization"),
        ({"tensor_parallel_size": 0}, "--tensor-parallel-size"),
    ],
)
def test_settings_that_cannot_be(options, match):
    with pytest.raises(GradvarError, match=match):
        SamplingSettings(model=None, **options)


def test_engines_that_are_not_there(monkeypatch):
    with pytest.raises(GradvarError, match="--engine: expected one of transformers, vllm, received 'vlm'"):
        sample("vlm", None, [], on_prompt=print)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(GradvarError, match=r"vLLM is not installed; pip install gradvar\[vllm\]"):
        sample("vllm", None, [], on_prompt=print)
    assert default_engine() == "transformers"


def test_default_engine_needs_a_gpu_for_vllm(monkeypatch):
    import torch

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert default_engine() == "transformers"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert default_engine() == "vllm"


def test_requests_ask_for_something():
    with pytest.raises(GradvarError, match="prompt 4: expected at least 1 rollout, received 0"):
        SamplingRequest(prompt=Prompt(prompt_id="4", text="", token_ids=(1,)), count=0, seed=0)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"generation_config.json": {"eos_token_id": [1, 5]}, "config.json": {"eos_token_id": 7}}, (0, 1, 5)),
        ({"generation_config.json": {}, "config.json": {"eos_token_id": 7}}, (0,)),
        ({"config.json": {"eos_token_id": 7}}, (0, 7)),
        ({"config.json": {"text_config": {"eos_token_id": 6}}}, (0, 6)),
        ({"config.json": {"eos_token_id": None}}, (0,)),
    ],
)
def test_every_end_token_counts(tmp_path, files, expected):
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert end_token_ids(tmp_path, make_tokenizer()) == expected


def test_an_end_token_at_the_limit_is_a_stop():
    rollout = make_rollout(4, [2, 1], [-1.0, -2.0], (0, 1), make_tokenizer())
    assert (rollout.finish_reason, rollout.text, rollout.rollout_id) == ("stop", "a", 4)
    assert make_rollout(0, [2, 3], [-1.0, -2.0], (0, 1), make_tokenizer()).finish_reason == "length"
