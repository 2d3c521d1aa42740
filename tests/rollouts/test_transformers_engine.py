from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM, MambaConfig, MambaForCausalLM

from gradvar.errors import GradvarError
from gradvar.models import find_model
from gradvar.rollouts.engines import SamplingRequest, SamplingSettings, prompt_seed, sample
from gradvar.rollouts.engines.transformers_engine import decode_batch
from gradvar.runs.records import Prompt
from tests.rollouts.tiny import (
    CONTEXT,
    END_IDS,
    chi_square_p,
    first_two_probabilities,
    make_tokenizer,
    token_logprobs,
)

PROMPT = (2, 3, 4)


@pytest.fixture(scope="module")
def model(tiny_folder):
    return AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()


def request(name="0", count=8, prompt=PROMPT, first_rollout_id=0, seed=None):
    return SamplingRequest(
        prompt=Prompt(prompt_id=name, text="abc", token_ids=prompt),
        count=count,
        first_rollout_id=first_rollout_id,
        seed=prompt_seed(0, int(name)) if seed is None else seed,
    )


def sampled(folder, requests, **options):
    """Sample and return rollouts by prompt id, and the sum of the progress that was told."""
    settings = SamplingSettings(model=find_model(str(folder)), **({"max_tokens": 40} | options))
    found, progress = {}, []
    sample(
        "transformers",
        settings,
        requests,
        on_prompt=lambda one, rollouts: found.update({one.prompt.prompt_id: rollouts}),
        on_progress=progress.append,
    )
    return found, sum(progress)


def test_a_spread_model_samples_the_same(tiny_folder):
    plain, _ = sampled(tiny_folder, [request()])
    spread, _ = sampled(tiny_folder, [request()], device="balanced")
    assert [r.token_ids for r in plain["0"]] == [r.token_ids for r in spread["0"]]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_distribution_is_the_policys_whatever_generation_config_says(tiny_folder, model, temperature):
    found, _ = sampled(tiny_folder, [request(count=20000)], temperature=temperature, max_tokens=2, batch_size=5000)
    counts = Counter(rollout.token_ids for rollout in found["0"])
    assert chi_square_p(counts, first_two_probabilities(model, PROMPT, temperature)) > 1e-3
    other = first_two_probabilities(model, PROMPT, 1.5 - temperature)
    assert chi_square_p(counts, other) < 1e-9, "the test would not notice a wrong temperature"


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_logprobs_are_those_of_a_plain_forward_pass(tiny_folder, model, temperature):
    found, progress = sampled(tiny_folder, [request(count=32)], temperature=temperature, batch_size=20)
    assert progress == 32
    for rollout in found["0"]:
        exact = token_logprobs(model, PROMPT, rollout.token_ids, temperature)
        assert rollout.sampler_logprobs == pytest.approx(exact, abs=1e-4)


def test_ends_are_kept_and_told_apart(tiny_folder):
    found, _ = sampled(tiny_folder, [request(count=200)], max_tokens=6)
    last = Counter()
    for index, rollout in enumerate(found["0"]):
        assert rollout.rollout_id == index
        assert not set(rollout.token_ids[:-1]) & set(END_IDS), "a response went on after its end"
        stopped = rollout.token_ids[-1] in END_IDS
        assert rollout.finish_reason == ("stop" if stopped else "length")
        assert stopped or rollout.length == 6
        assert len(rollout.text) == rollout.length - stopped, "the text leaves the end token out"
        last[rollout.token_ids[-1] if stopped else "length", rollout.length == 6] += 1
    # Every way to end occurred: both end tokens, the limit, and an end token exactly at the limit.
    assert {(0, False), (1, False), ("length", True)} <= set(last)
    assert (0, True) in last or (1, True) in last


def test_a_prompt_gets_the_same_whatever_was_sampled_before(tiny_folder):
    three = [request("0"), request("1", prompt=(5, 6)), request("2")]
    torch.manual_seed(1)
    together, _ = sampled(tiny_folder, three)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    alone, _ = sampled(tiny_folder, [three[2]])
    assert torch.equal(torch.get_rng_state(), state), "the global generator was used"
    assert alone["2"] == together["2"]
    assert [r.token_ids for r in together["0"]] != [r.token_ids for r in together["2"]], "prompts share their noise"


def test_growing_a_run_draws_new_responses(tiny_folder):
    more = request(first_rollout_id=8, seed=prompt_seed(0, 0, 8))
    first, _ = sampled(tiny_folder, [request()])
    second, _ = sampled(tiny_folder, [more])
    assert [rollout.rollout_id for rollout in second["0"]] == list(range(8, 16))
    assert not {r.token_ids for r in first["0"] if r.length > 5} & {r.token_ids for r in second["0"]}


def test_every_batch_is_drawn_anew(tiny_folder):
    found, _ = sampled(tiny_folder, [request(count=16)], batch_size=8)
    long = [rollout.token_ids for rollout in found["0"] if rollout.length > 5]
    assert len(set(long)) == len(long)


def test_bfloat16_logprobs_are_computed_in_float32(tiny_folder):
    found, _ = sampled(tiny_folder, [request(count=16)], dtype="bfloat16")
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.bfloat16).eval()
    for rollout in found["0"]:
        exact = token_logprobs(model, PROMPT, rollout.token_ids, 1.0)
        assert rollout.sampler_logprobs == pytest.approx(exact, abs=0.2)
        assert any(value != torch.tensor(value).bfloat16().item() for value in rollout.sampler_logprobs)


def test_the_whole_context_can_be_used(tiny_folder):
    found, _ = sampled(tiny_folder, [request(count=1000)], batch_size=1000, max_tokens=CONTEXT - len(PROMPT))
    assert max(rollout.length for rollout in found["0"]) > 30


def test_no_requests_need_no_model(tmp_path):
    sample("transformers", None, [], on_prompt=print)


def test_logits_that_are_not_numbers(model):
    class Broken(torch.nn.Module):
        dtype = torch.float32

        def forward(self, **inputs):
            output = model(**inputs)
            output.logits = output.logits * float("nan")
            return output

    with pytest.raises(GradvarError, match="not numbers at response token 0"):
        run_decode(Broken())


def test_a_model_without_a_cache_to_carry_on():
    config = MambaConfig(
        vocab_size=8, hidden_size=16, num_hidden_layers=1, state_size=4, eos_token_id=0, pad_token_id=0
    )
    with pytest.raises(GradvarError, match="keeps no key-value cache"):
        run_decode(MambaForCausalLM(config).eval())


def test_out_of_memory_names_the_batch_size(tiny_folder, monkeypatch):
    def full(*arguments, **options):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr("gradvar.rollouts.engines.transformers_engine.decode_batch", full)
    with pytest.raises(GradvarError, match="smaller --batch-size"):
        sampled(tiny_folder, [request()])


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_other_architectures(kind, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if kind == "gpt2":
        config = GPT2Config(vocab_size=8, n_embd=32, n_layer=2, n_head=2, n_positions=64, eos_token_id=0)
        model = GPT2LMHeadModel(config)
    else:
        config = LlamaConfig(
            vocab_size=8,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            eos_token_id=0,
        )
        model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    found, _ = sampled(tmp_path, [request(count=12)], temperature=0.7)
    for rollout in found["0"]:
        exact = token_logprobs(model.eval(), PROMPT, rollout.token_ids, 0.7)
        assert rollout.sampler_logprobs == pytest.approx(exact, abs=1e-4)


def run_decode(model):
    return decode_batch(
        model,
        PROMPT,
        4,
        temperature=1.0,
        max_tokens=5,
        end_ids=END_IDS,
        generator=torch.Generator().manual_seed(0),
        on_progress=lambda finished: None,
    )
