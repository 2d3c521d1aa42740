"""Plans that stay within a memory budget: smaller batches, checkpointing, more passes, and the same Grams."""

import pytest
import torch

from gradvar.errors import GradvarError
from gradvar.gradients import fit, measure_scores, plan_measurement
from tests.gradients import references
from tests.gradients.models import least_budget, make_model, make_prompt_and_responses

LENGTHS = (150, 90, 120, 60, 30, 140)


@pytest.fixture(scope="module")
def model():
    return make_model("qwen2", num_hidden_layers=4, max_position_embeddings=512)


@pytest.mark.parametrize("share", [2.0, 0.8, 0.5])
def test_smaller_budgets_give_smaller_batches_and_the_same_grams(model, share):
    prompt, responses = make_prompt_and_responses(LENGTHS)
    free = plan_measurement(model, prompt, responses, "1:qkv,mlp")
    budget = int(share * 2 * (free.cost.activation_bytes + free.cost.logits_bytes))
    plan = plan_measurement(model, prompt, responses, "1:qkv,mlp", memory_budget=budget)
    assert plan.cost.peak_bytes <= budget == plan.memory_budget
    assert (plan.token_budget < free.token_budget) == (share < 1)
    assert plan.checkpointing == "off"
    whole = measure_scores(model, prompt, responses, "1:qkv,mlp")
    fitted = measure_scores(model, prompt, responses, "1:qkv,mlp", memory_budget=budget)
    assert fitted.plan.passes == plan.passes
    assert fitted.plan.token_budget == plan.token_budget
    for key, gram in whole.grams.items():
        assert references.error(fitted.grams[key].gram(), gram.gram()) < 1e-12


def test_checkpointing_comes_on_where_it_is_the_only_way(model):
    prompt, responses = make_prompt_and_responses(LENGTHS)
    least = least_budget(model, prompt, responses, "0:q")
    plain = least_budget(model, prompt, responses, "0:q", checkpointing="off")
    assert least < plain
    plan = plan_measurement(model, prompt, responses, "0:q", memory_budget=plain - 1)
    assert plan.checkpointing == "non_reentrant"
    assert plan.cost.peak_bytes <= plain - 1
    with pytest.raises(GradvarError, match=f"too small: expected at least {plain} bytes"):
        plan_measurement(model, prompt, responses, "0:q", memory_budget=plain - 1, checkpointing="off")


@pytest.mark.parametrize("targets", ["0:q", "2:qkv,mlp", "lm_head", ["lm_head", "last:o"]])
@pytest.mark.parametrize("kind", ["off", "reentrant", "non_reentrant", None])
def test_the_least_that_is_named_does_and_nothing_less(model, targets, kind):
    prompt, responses = make_prompt_and_responses(LENGTHS)
    least = least_budget(model, prompt, responses, targets, checkpointing=kind)
    plan = plan_measurement(model, prompt, responses, targets, memory_budget=least, checkpointing=kind)
    assert plan.cost.peak_bytes <= least
    with pytest.raises(GradvarError, match=f"at least {least} bytes"):
        plan_measurement(model, prompt, responses, targets, memory_budget=least - 1, checkpointing=kind)


def test_a_token_budget_is_a_limit(model):
    prompt, responses = make_prompt_and_responses(LENGTHS)
    assert plan_measurement(model, prompt, responses, "0:q", token_budget=200).token_budget == 200


def test_batches_are_made_smaller_where_that_saves_passes(monkeypatch):
    model = make_model("qwen2", hidden_size=64, intermediate_size=192, max_position_embeddings=512)
    prompt, responses = make_prompt_and_responses([40] * 24)
    options = {"memory_budget": 8_000_000, "checkpointing": "off"}
    plan = plan_measurement(model, prompt, responses, "all:mlp", **options)
    with monkeypatch.context() as patch:
        patch.setattr("gradvar.gradients.fit._Search.smaller", lambda self, plan: [])
        usual = plan_measurement(model, prompt, responses, "all:mlp", **options)
    assert plan.token_budget < usual.token_budget
    assert 1 < len(plan.passes) < len(usual.passes)
    assert plan.cost.peak_bytes <= 8_000_000
    assert plan.cost.flop < usual.cost.flop
    fitted = measure_scores(model, prompt, responses, "all:mlp", **options)
    whole = measure_scores(model, prompt, responses, "all:mlp")
    assert fitted.plan.passes == plan.passes
    for key, gram in whole.grams.items():
        assert references.error(fitted.grams[key].gram(), gram.gram()) < 1e-12


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_more_memory_is_never_slower_by_the_plan_s_own_reckoning(monkeypatch, device):
    """Checkpointing is weighed against more passes and smaller batches."""
    size = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 8, "max_position_embeddings": 1024}
    model = make_model("qwen2", torch.float32, **size)
    request = (model, *make_prompt_and_responses([400] * 40), "1:qkv,mlp")
    if device == "cuda":
        monkeypatch.setattr(fit, "_work", fit._seconds_on_cuda)
    reckoned, own = [], fit._work
    monkeypatch.setattr(fit, "_work", lambda job, plan: seen.append(own(job, plan)) or seen[-1])
    kinds = set()
    for mebibytes in range(40, 76, 6):
        seen = []
        plan = plan_measurement(*request, memory_budget=mebibytes << 20)
        kinds.add((plan.checkpointing, len(plan.passes) > 1))
        reckoned.append(min(seen))
    assert reckoned == sorted(reckoned, reverse=True)
    assert len(kinds) > 1


def test_a_containers_limit_is_what_is_free(monkeypatch, tmp_path):
    from gradvar.gradients.plan import free_memory

    host = free_memory(torch.device("cpu"))
    monkeypatch.setattr("gradvar.gradients.plan._CGROUP", tmp_path)
    tmp_path.joinpath("memory.current").write_text("1000\n")
    tmp_path.joinpath("memory.max").write_text("max\n")
    assert free_memory(torch.device("cpu")) > 10_000 < host
    tmp_path.joinpath("memory.max").write_text("5000\n")
    assert free_memory(torch.device("cpu")) == 4000


def test_without_a_budget_it_is_what_is_free_less_a_margin(model, monkeypatch):
    """Of several devices the fullest counts."""
    free = {"cpu": 1 << 30, "meta": 1 << 29}
    monkeypatch.setattr("gradvar.gradients.fit.free_memory", lambda device: free[device.type])
    request = (model, *make_prompt_and_responses((9, 5)), "last:q")
    assert 0.7 * free["cpu"] < plan_measurement(*request).memory_budget < 0.9 * free["cpu"]
    places = {torch.device(name) for name in free}
    monkeypatch.setattr("gradvar.gradients.fit.devices_of", lambda model: places)
    assert 0.7 * free["meta"] < plan_measurement(*request).memory_budget < 0.9 * free["meta"]
