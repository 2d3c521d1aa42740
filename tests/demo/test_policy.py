"""The bundled policy is small, loads like any model, and is in the regime that the demo needs."""

import json
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from gradvar.demo import check_answer, policy_path, problems_path, template_path
from gradvar.demo.measure import measure_prompt, sample_responses
from gradvar.demo.prompts import TEMPLATE, format_prompt, read_problems
from gradvar.demo.traces import TraceSettings, chance_per_attempt, search_problems
from gradvar.demo.train_settings import TrainSettings, split_problems

CARD = json.loads((policy_path() / "card.json").read_text(encoding="utf-8"))
PROBLEMS = read_problems(problems_path())


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(policy_path(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(policy_path())


def test_the_folder_is_small_and_plain() -> None:
    files = sorted(path.name for path in policy_path().iterdir())
    assert files == [
        "card.json",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert sum(path.stat().st_size for path in policy_path().iterdir()) <= 8_000_000
    config = json.loads((policy_path() / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "qwen2"
    assert "auto_map" not in config
    with safe_open(policy_path() / "model.safetensors", "pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"F32"}  # noqa: SIM118
    generation = json.loads((policy_path() / "generation_config.json").read_text(encoding="utf-8"))
    assert not {"temperature", "top_k", "top_p", "repetition_penalty"} & generation.keys()


def test_it_loads_with_separate_biased_projections(model: Any, tokenizer: Any) -> None:
    attention = model.model.layers[0].self_attn
    assert all(layer.bias is not None for layer in (attention.q_proj, attention.k_proj, attention.v_proj))
    assert model.config.num_hidden_layers >= 2
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert sum(weight.numel() for weight in model.parameters()) == CARD["parameters"]


def test_problems_were_held_out_of_training() -> None:
    settings = TrainSettings(steps=1, seed=CARD["training"]["settings"]["seed"])
    held_out, trained_on = split_problems(settings)
    assert held_out == PROBLEMS
    assert len(PROBLEMS) == 64
    assert not {p.key for p in PROBLEMS} & {p.key for p in trained_on}
    assert len(trained_on) + 64 == len(search_problems(TraceSettings()))
    assert all(chance_per_attempt(problem) > 0 for problem in PROBLEMS)


def test_the_template_gives_the_prompt_of_the_training() -> None:
    template = template_path().read_text(encoding="utf-8")
    assert template == TEMPLATE == CARD["prompt"]["template"]
    problem = PROBLEMS[0]
    prompt = format_prompt(template, problem)
    assert prompt == f"Numbers: {' '.join(map(str, problem.nums))}\nTarget: {problem.target}\n"


def test_the_card_is_in_the_regime() -> None:
    held_out = CARD["held_out"]
    assert held_out["prompts"] >= 16
    assert held_out["responses_per_prompt"] == 128
    assert 0.2 <= held_out["mean_reward"] <= 0.7
    assert held_out["mixed_prompts"] > held_out["prompts"] / 2
    assert held_out["length_mean"] >= 100
    assert held_out["truncated"] < 0.02
    for prompt in held_out["by_prompt"]:
        assert prompt["length_longest"] >= 8 * prompt["length_shortest"]


def test_sampling_again_agrees_with_the_card(model: Any, tokenizer: Any) -> None:
    count = 64
    for index, problem in enumerate(PROBLEMS[:3]):
        known = CARD["held_out"]["by_prompt"][index]
        found = measure_prompt(
            model, tokenizer, problem, template=TEMPLATE, count=count, max_tokens=1024, seed=1000 + index
        )
        assert known["nums"] == list(problem.nums)
        # Both shares are binomial; 1/128 keeps the error of a share of 0 or 1 above zero.
        p = min(max(known["mean_reward"], 1 / 128), 1 - 1 / 128)
        error = math.sqrt(p * (1 - p) * (1 / count + 1 / known["responses"]))
        assert abs(found.mean_reward - known["mean_reward"]) < 5 * error, "the weights are not the card's"
        # Lengths are at most about as spread as an exponential: standard deviation = mean.
        error = known["length_mean"] * math.sqrt(1 / count + 1 / known["responses"])
        assert abs(found.length_mean - known["length_mean"]) < 5 * error, "the weights are not the card's"


def test_sampling_is_seeded_and_ends_with_the_end_token(model: Any, tokenizer: Any) -> None:
    prompt = format_prompt(TEMPLATE, PROBLEMS[0])
    before = torch.get_rng_state()
    first, again = (sample_responses(model, tokenizer, prompt, count=8, max_tokens=60, seed=seed) for seed in (5, 5))
    assert first == again
    assert first != sample_responses(model, tokenizer, prompt, count=8, max_tokens=60, seed=6)
    assert torch.equal(before, torch.get_rng_state())
    for response in first:
        assert tokenizer.eos_token_id not in response[:-1]
        assert response[-1] == tokenizer.eos_token_id or len(response) == 60


def test_right_and_wrong_responses_both_come_in_many_lengths(model: Any, tokenizer: Any) -> None:
    lengths: dict[bool, set[int]] = {True: set(), False: set()}
    for seed, problem in enumerate(PROBLEMS[:2]):
        prompt = format_prompt(TEMPLATE, problem)
        for response in sample_responses(model, tokenizer, prompt, count=64, max_tokens=1024, seed=seed):
            text = tokenizer.decode(response, skip_special_tokens=True)
            lengths[check_answer(text, problem.nums, problem.target)].add(len(response))
    assert all(len(found) >= 8 for found in lengths.values()), lengths


def test_importing_the_demo_loads_no_torch() -> None:
    code = "import sys, gradvar.demo; sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
