"""Real vLLM, its CPU build or a GPU's: .venv-vllm/bin/python -m pytest -m vllm (make test-vllm)."""

import importlib.util
import os
import signal
import subprocess
from collections import Counter

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from gradvar.errors import GradvarError
from gradvar.models import find_model
from gradvar.rollouts.engines import SamplingRequest, SamplingSettings, prompt_seed, sample
from gradvar.runs.records import Prompt
from tests.rollouts.tiny import END_IDS, chi_square_p, first_two_probabilities, token_logprobs

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed (make test-vllm)"),
]

PROMPT = (2, 3, 4)
ON_GPU = torch.cuda.is_available()
LOGPROB_TOLERANCE = 2e-2 if ON_GPU else 1e-4
"""float32 throughout; a GPU's attention kernels may use TF32."""
TRAP_SEED = 123_456


def request(name, count, prompt=PROMPT, seed=None):
    return SamplingRequest(
        prompt=Prompt(prompt_id=name, text="", token_ids=prompt),
        count=count,
        seed=prompt_seed(0, int(name)) if seed is None else seed,
    )


REQUESTS = [
    request("0", 3000),
    request("1", 64),
    request("2", 64),
    request("3", 64, prompt=(5, 6, 7, 2, 2, 3)),
    request("4", 8, seed=TRAP_SEED),
    request("5", 8, seed=TRAP_SEED + 1),
]


def sampled(folder, requests, temperature):
    settings = SamplingSettings(
        model=find_model(str(folder)),
        temperature=temperature,
        max_tokens=24,
        device="cuda" if ON_GPU else "cpu",
        gpu_memory_utilization=0.3,
        enforce_eager=True,
    )
    found, progress = {}, []
    sample(
        "vllm",
        settings,
        requests,
        on_prompt=lambda one, rollouts: found.update({one.prompt.prompt_id: rollouts}),
        on_progress=progress.append,
    )
    assert sum(progress) == sum(one.count for one in requests)
    return found


@pytest.fixture(scope="module")
def model(tiny_folder):
    return AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def at_one(tiny_folder):
    return sampled(tiny_folder, REQUESTS, 1.0)


@pytest.fixture(scope="module")
def at_half(tiny_folder):
    return sampled(tiny_folder, REQUESTS[:2], 0.5)


@pytest.fixture(params=[1.0, 0.5])
def rollouts_at(request, at_one, at_half):
    return request.param, at_one if request.param == 1.0 else at_half


def test_distribution_is_the_policys_whatever_generation_config_says(rollouts_at, model):
    temperature, found = rollouts_at
    counts = Counter(rollout.token_ids[:2] for rollout in found["0"])
    assert chi_square_p(counts, first_two_probabilities(model, PROMPT, temperature)) > 1e-3
    other = first_two_probabilities(model, PROMPT, 1.5 - temperature)
    assert chi_square_p(counts, other) < 1e-9, "the test would not notice a wrong temperature"


def test_logprobs_agree_with_transformers_at_the_sampling_temperature(rollouts_at, model, record_property):
    temperature, found = rollouts_at
    differences, to_raw = [], []
    for rollout in found["1"]:
        exact = token_logprobs(model, PROMPT, rollout.token_ids, temperature)
        raw = token_logprobs(model, PROMPT, rollout.token_ids, 1.0)
        differences += np.abs(np.subtract(rollout.sampler_logprobs, exact)).tolist()
        to_raw += np.abs(np.subtract(rollout.sampler_logprobs, raw)).tolist()
    print(
        f"temperature {temperature}: vLLM and transformers differ by {max(differences):.2e} at most, "
        f"{np.mean(differences):.2e} in the mean, over {len(differences)} tokens [nats]; "
        f"vLLM's and the log-probs at temperature 1 by {np.mean(to_raw):.2e}"
    )
    assert max(differences) < LOGPROB_TOLERANCE
    if temperature != 1.0:
        assert np.mean(to_raw) > 0.1, "the test would not notice raw log-probabilities"


def test_ends_are_kept_and_told_apart(at_one):
    last = Counter()
    for index, rollout in enumerate(at_one["0"]):
        assert rollout.rollout_id == index
        assert not set(rollout.token_ids[:-1]) & set(END_IDS), "a response went on after its end"
        stopped = rollout.token_ids[-1] in END_IDS
        assert rollout.finish_reason == ("stop" if stopped else "length")
        assert stopped or rollout.length == 24
        last[rollout.token_ids[-1] if stopped else "length"] += 1
    assert {0, 1, "length"} <= set(last)


def long_responses(rollouts):
    return {rollout.token_ids for rollout in rollouts if rollout.length > 7}


def test_neighbouring_prompts_share_no_noise(at_one):
    assert len(long_responses(at_one["1"])) > 10
    assert not long_responses(at_one["1"]) & long_responses(at_one["2"])


def test_the_trap_is_real_seeds_that_lie_close_share_noise(at_one):
    """Why prompt_seed exists: response i + 1 of one prompt is response i of the prompt seeded one higher."""
    first, second = ([rollout.token_ids for rollout in at_one[name]] for name in ("4", "5"))
    assert first[1:] == second[:-1]


@pytest.mark.skipif(ON_GPU, reason="on a GPU the batch is part of the last bits")
def test_a_prompt_gets_the_same_whatever_was_sampled_before(tiny_folder, at_one):
    alone = sampled(tiny_folder, [REQUESTS[3]], 1.0)
    assert alone["3"] == at_one["3"]


def test_a_killed_process_is_one_clear_line(tiny_folder, monkeypatch):
    started = []
    popen = subprocess.Popen

    def recorded(*arguments, **options):
        started.append(popen(*arguments, **options))
        return started[-1]

    monkeypatch.setattr("gradvar.rollouts.engines.vllm_engine.subprocess.Popen", recorded)
    settings = SamplingSettings(model=find_model(str(tiny_folder)), max_tokens=60, gpu_memory_utilization=0.3)
    requests = [request(str(index), 2000) for index in range(4)]
    finished = []

    def on_progress(count):
        os.kill(started[-1].pid, signal.SIGKILL)

    with pytest.raises(GradvarError, match="--engine vllm: its process was killed") as caught:
        sample(
            "vllm",
            settings,
            requests,
            on_prompt=lambda one, rollouts: finished.append(one.prompt.prompt_id),
            on_progress=on_progress,
        )
    assert "\n" not in str(caught.value)
    assert len(finished) < 4


def test_what_vllm_refuses_is_one_clear_line(tiny_folder):
    settings = SamplingSettings(model=find_model(str(tiny_folder)), max_tokens=5000)
    with pytest.raises(GradvarError, match=r"--engine vllm: .*max_model_len") as caught:
        sample("vllm", settings, [request("0", 2)], on_prompt=lambda one, rollouts: None)
    assert "\n" not in str(caught.value)
