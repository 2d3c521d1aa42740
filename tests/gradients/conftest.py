import pytest
import torch
import transformers

from tests.gradients.models import grams, make_model, make_prompt_and_responses


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Tiny products are faster on one thread, and other work may hold the second core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(verbosity)
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def qwen():
    return make_model("qwen2")


@pytest.fixture(scope="module")
def whole(qwen):
    """One padded batch of everything."""
    return grams(qwen, *make_prompt_and_responses(), token_budget=10_000)
