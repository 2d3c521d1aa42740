"""What only a CUDA device can show: half precision against float32, packing, TF32 kept out, memory, several devices."""

import accelerate
import pytest
import torch

from gradvar.gradients import measure_scores
from gradvar.gradients.gram import FactorStore
from gradvar.gradients.states import full_precision
from tests.gradients import references
from tests.gradients.models import make_model, make_prompt_and_responses

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SPECS = ["all:qkv", "last:o,mlp"]


def grams(model, **options):
    prompt, responses = make_prompt_and_responses()
    return {key: g.gram() for key, g in measure_scores(model, prompt, responses, SPECS, **options).grams.items()}


def gap(one, other):
    assert one.keys() == other.keys()
    return max(references.error(one[key], other[key]) for key in one)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_grams_on_cuda_are_those_of_the_cpu(dtype, limit):
    """The same weights, rounded once; bfloat16 then rounds activations as it does on the CPU."""
    model = make_model("qwen2", dtype)
    expected = grams(make_model("qwen2", dtype).float())
    assert gap(grams(model.cuda()), expected) < limit


def test_packed_is_padded():
    model = make_model("qwen2", torch.float32).cuda()
    assert gap(grams(model, packing=True), grams(model, packing=False)) < 1e-4


def test_no_tf32_in_the_factors_product():
    generator = torch.Generator().manual_seed(0)
    store, flat = FactorStore(3, 256, 512, torch.float32, torch.device("cuda")), []
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        with full_precision():
            for i in range(3):
                a, delta = (torch.randn(400, width, generator=generator) for width in (512, 256))
                store.add(i, a.cuda(), delta.cuda())
                flat.append((delta.double().T @ a.double()).flatten().numpy())
            gram = store.gram(False, 1 << 20).numpy()
    finally:
        torch.set_float32_matmul_precision(before)
    assert references.error(gram, references.gram_of(flat)) < 1e-5


def test_cuda_memory_stays_within_the_budget():
    model = make_model(
        "qwen2", torch.float32, hidden_size=512, intermediate_size=1408, max_position_embeddings=512
    ).cuda()
    prompt, responses = make_prompt_and_responses([100 + i for i in range(48)])
    measure_scores(model, prompt, responses[:2], "last:q")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    budget = 200 << 20
    measure_scores(model, prompt, responses, "all:qkv,mlp", memory_budget=budget)
    workspace = 64 << 20  # cuBLAS takes its own
    assert torch.cuda.max_memory_allocated() - before <= budget + workspace


def test_a_model_that_is_offloaded_to_the_cpu():
    expected = grams(make_model("qwen2", torch.float32))
    model = accelerate.cpu_offload(make_model("qwen2", torch.float32), execution_device="cuda:0")
    assert gap(grams(model), expected) < 1e-4
