"""Plans that stay within a memory budget, activations counted."""

import pytest

from gradvar.errors import GradvarError
from gradvar.gradients import fit_measurement, measure_scores, plan_measurement
from tests.gradients import references
from tests.gradients.models import make_model, make_prompt_and_responses

LENGTHS = (150, 90, 120, 60, 30, 140)


@pytest.fixture(scope="module")
def model():
    return make_model("qwen2", num_hidden_layers=4, max_position_embeddings=512)


@pytest.mark.parametrize("share", [2.0, 0.8, 0.5])
def test_smaller_budgets_give_smaller_batches_and_the_same_grams(model, share):
    prompt, responses = make_prompt_and_responses(LENGTHS)
    free = plan_measurement(model, prompt, responses, "1:qkv,mlp")
    budget = int(share * free.cost.peak_bytes)
    plan = fit_measurement(model, prompt, responses, "1:qkv,mlp", memory_budget=budget)
    assert plan.cost.peak_bytes <= budget
    assert plan.memory_budget < budget
    assert (plan.token_budget < free.token_budget) == (share < 2)
    assert plan.checkpointing == "off"
    whole = measure_scores(model, prompt, responses, "1:qkv,mlp")
    fitted = measure_scores(
        model, prompt, responses, "1:qkv,mlp",
        token_budget=plan.token_budget, memory_budget=plan.memory_budget, checkpointing=plan.checkpointing,
    )  # fmt: skip
    assert fitted.plan.passes == plan.passes
    for key, gram in whole.grams.items():
        assert references.error(fitted.grams[key].gram(), gram.gram()) < 1e-12


def test_checkpointing_comes_on_where_batches_of_one_do_not_fit(model):
    prompt, responses = make_prompt_and_responses(LENGTHS)
    cost = plan_measurement(model, prompt, responses, "0:q", token_budget=1).cost
    budget = int(1.9 * (cost.activation_bytes + cost.logits_bytes))
    plan = fit_measurement(model, prompt, responses, "0:q", memory_budget=budget)
    assert plan.checkpointing == "non_reentrant"
    assert plan.cost.peak_bytes <= budget
    with pytest.raises(GradvarError, match="too small for the longest response alone"):
        fit_measurement(model, prompt, responses, "0:q", memory_budget=budget, checkpointing="off")


def test_the_least_that_is_named_would_do(model):
    prompt, responses = make_prompt_and_responses(LENGTHS)
    with pytest.raises(GradvarError, match=r"expected at least (\d+) bytes") as caught:
        fit_measurement(model, prompt, responses, "0:q", memory_budget=100_000)
    least = int(str(caught.value).split("at least ")[1].split()[0])
    assert fit_measurement(model, prompt, responses, "0:q", memory_budget=least).cost.peak_bytes <= least


def test_a_token_budget_is_a_limit(model):
    prompt, responses = make_prompt_and_responses(LENGTHS)
    assert fit_measurement(model, prompt, responses, "0:q", token_budget=200).token_budget == 200
