"""What only a CUDA device can show: half precision against float32, packing, TF32 kept out, memory, several devices."""

import numpy as np
import pytest
import torch

from gradvar import attention
from gradvar.errors import GradvarError
from gradvar.gradients import SketchPlan, check_precision, cross_grams, list_targets, measure_scores, plan_measurement
from gradvar.gradients.curve import Curve
from gradvar.gradients.gram import FactorStore, HeadStore, MatrixStore, add_product
from gradvar.gradients.spill import HostFactorStore, HostMatrixStore, HostMemory
from gradvar.gradients.states import full_precision
from tests.gradients import references
from tests.gradients.models import CONFIGS, FLOAT32_INSIDE, make_model, make_prompt_and_responses

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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_torch_s_own_kernel_for_packed_sequences(dtype):
    """Shared heads; against each sequence alone, gradients too, and against the CPU in float32 through a model."""
    device = torch.device("cuda", torch.cuda.current_device())
    for heads, key_heads, width in ((4, 4, 64), (8, 2, 128), (6, 1, 32)):
        assert attention._agrees(device, dtype, heads, key_heads, width)
    size = {"hidden_size": 64, "head_dim": 16}
    expected = grams(make_model("qwen3", torch.float32, **size).to(dtype).float())
    attention.register()
    model = make_model("qwen3", torch.float32, **size).to(dtype).cuda()
    model.set_attn_implementation(attention.VARLEN)
    prompt, responses = make_prompt_and_responses()
    plan = measure_scores(model, prompt, responses, SPECS).plan
    assert plan.token_budget > 1
    assert gap(grams(model), expected) < 0.1
    assert gap(grams(model), grams(model, packing=False)) < 0.1


def test_a_float32_model_packs_with_each_sequence_alone():
    attention.register()
    model = make_model("qwen2", torch.float32).cuda()
    expected = grams(model)
    model.set_attn_implementation(attention.VARLEN)
    assert gap(grams(model, packing=True), expected) < 1e-4


def test_spilled_grams_under_load_are_those_kept():
    """Copies beside other work on the device: too early a read or too early a reuse would show in the numbers."""
    device = torch.device("cuda")
    generator = torch.Generator().manual_seed(0)
    size = (12, 96, 160, torch.float32, device)
    load, busy = torch.randn(2048, 2048, device=device), torch.cuda.Stream()
    for kind, plain in ((HostFactorStore, FactorStore), (HostMatrixStore, MatrixStore)):
        host = HostMemory(pinned=True)
        here, there = plain(*size), kind(*size, host)
        for response in [*range(12), 3]:
            a, delta = (torch.randn(501, width, generator=generator).to(device) for width in (160, 96))
            with torch.cuda.stream(busy):
                load = torch.tanh(load @ load)
            here.add(response, a, delta)
            there.add(response, a, delta)
            del a, delta  # their memory is for the next ones
            host.forget()
        for tile in (12 * 160 * 4 * 7, 1 << 22):
            with full_precision():
                assert references.error(there.gram(True, tile).numpy(), here.gram(True, tile).numpy()) < 1e-6


def test_a_spilled_input_that_the_model_writes_again_is_refused():
    """Behind a copy that takes its time, the next batch's write would be what the host gets."""
    device = torch.device("cuda")
    host = HostMemory(pinned=True)
    store = HostFactorStore(2, 8, 4096, torch.float32, device, host)
    store.key = "layers.3.mlp.up_proj"
    buffer = torch.ones(20_000, 4096, device=device)
    store.add(0, buffer, torch.ones(20_000, 8, device=device))
    host.forget()
    buffer.fill_(2)
    with pytest.raises(GradvarError, match=r"layers\.3\.mlp\.up_proj: .*input again for other responses"):
        store.gram(False, 1 << 22)


def test_half_products_are_added_in_float32():
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(64, 64, generator=generator).bfloat16() for _ in range(2))
    total = torch.randn(64, 64, generator=generator)
    found = total.cuda()
    with full_precision():
        add_product(left.cuda(), right.cuda(), found)
    torch.testing.assert_close(found.cpu(), total + left.float() @ right.float(), rtol=1e-5, atol=1e-4)


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
    accelerate = pytest.importorskip("accelerate")
    expected = grams(make_model("qwen2", torch.float32))
    model = accelerate.cpu_offload(make_model("qwen2", torch.float32), execution_device="cuda:0")
    assert gap(grams(model), expected) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_probes_prefixes_and_sketches_on_cuda(dtype):
    prompt, responses = make_prompt_and_responses()
    options = {"probes": 2, "prefixes": 3, "seed": 0, "sketch": SketchPlan(dimension=256)}
    expected = measure_scores(make_model("qwen2", dtype).float(), prompt, responses, SPECS, **options)
    found = measure_scores(make_model("qwen2", dtype).cuda(), prompt, responses, SPECS, **options)
    limit = 1e-4 if dtype == torch.float32 else 0.1
    for key in expected.grams:
        np.testing.assert_allclose(found.taus[key].value, expected.taus[key].value, rtol=limit)
        np.testing.assert_allclose(found.prefixes[key].value, expected.prefixes[key].value, rtol=limit)
        size = np.abs(expected.sketches[key].matrix).max()
        np.testing.assert_allclose(found.sketches[key].matrix, expected.sketches[key].matrix, atol=limit * size)


def test_the_head_and_its_tied_embedding_on_cuda():
    prompt, responses = make_prompt_and_responses()
    for name in ("qwen2", "qwen2_tied"):
        expected = measure_scores(make_model(name, torch.float32), prompt, responses, "lm_head").grams
        found = measure_scores(make_model(name, torch.float32).cuda(), prompt, responses, "lm_head").grams
        for key, gram in expected.items():
            assert references.error(found[key].gram(), gram.gram()) < 1e-4


def test_the_head_s_products_in_half_precision_are_those_in_float32():
    """Operands in bfloat16 are multiplied as they are, the gradient at the logits in two parts."""
    generator = torch.Generator().manual_seed(0)
    weight, hidden = (torch.randn(size, 64, generator=generator).bfloat16() for size in (500, 90))
    tokens = torch.randint(0, 500, (90,), generator=generator)
    logits = hidden.float() @ weight.float().T / 8
    flat = (logits.softmax(-1) - torch.eye(500)[tokens]).T.double() @ hidden.double() / -8
    for device in ("cpu", "cuda"):
        store = HeadStore(1, 0, 500, weight.to(device), None, Curve(), 8.0, torch.float32)
        store.add_output(0, hidden.to(device), tokens, torch.ones(90, device=device), logits.logsumexp(-1).to(device))
        out = torch.empty((480, 64), device=device)
        with full_precision():
            store.fill(0, 10, 490, out)
        assert (out.cpu() - flat[10:490]).abs().max() < 1e-5 * flat.abs().max()


def test_autocast_on_cuda_reaches_the_model():
    prompt, responses = make_prompt_and_responses()
    model = make_model("qwen2", torch.float32).cuda()
    with torch.autocast("cuda", torch.bfloat16):
        measured = measure_scores(model, prompt, responses, "last:q")
    (gram,) = measured.grams.values()
    (expected,) = measure_scores(model, prompt, responses, "last:q").grams.values()
    assert measured.dtype == "float32 autocast bfloat16"
    assert 1e-6 < references.error(gram.gram(), expected.gram()) < 0.1


@pytest.mark.parametrize("kind", ["reentrant", "non_reentrant"])
def test_checkpointing_and_the_float32_check_on_cuda(kind):
    model = make_model("qwen2", torch.float32).cuda()
    assert gap(grams(model, checkpointing=kind), grams(model)) < 1e-5
    prompt, responses = make_prompt_and_responses()
    assert max(row.gradient_error for row in check_precision(model, prompt, responses, SPECS).rows) < 1e-4


def test_several_prompts_together_on_cuda():
    prompt, responses = make_prompt_and_responses()
    model = make_model("qwen2", torch.float32)
    prompts, everything = [prompt, prompt[::-1]], [responses, responses[:3]]
    expected = cross_grams(model, prompts, everything, SPECS)
    for key, gram in cross_grams(model.cuda(), prompts, everything, SPECS).items():
        assert references.error(gram, expected[key]) < 1e-4


def test_gradients_spilled_to_locked_memory_of_the_host():
    """The same Grams in one pass, within the budget; most go to the host and back."""
    model = make_model("qwen2", hidden_size=512, intermediate_size=1408, max_position_embeddings=512).cuda()
    prompt, responses = make_prompt_and_responses([100 + i for i in range(48)])
    expected = measure_scores(model, prompt, responses, "all:qkv,mlp", host_memory_budget=0)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    budget = 200 << 20
    found = measure_scores(model, prompt, responses, "all:qkv,mlp", memory_budget=budget, host_memory_budget=4 << 30)
    assert "host" in {block.home for blocks in found.plan.passes for block in blocks}
    assert len(found.plan.passes) == 1
    assert torch.cuda.max_memory_allocated() - before <= budget + (64 << 20)  # cuBLAS takes its own
    for key, gram in expected.grams.items():
        assert references.error(found.grams[key].gram(), gram.gram()) < 1e-8  # random weights: roundings grow
    host = HostMemory(pinned=True)
    assert host.pinned
    assert host.copy(torch.ones(8, device="cuda")).is_pinned()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", CONFIGS)
def test_every_projection_on_cuda_equals_plain_autograd(name):
    """In float64, however the work is done; refused is what the CPU refuses. Rotary angles are float32 there too."""
    model = make_model(name).cuda()
    prompt, responses = make_prompt_and_responses()
    targets = list_targets(model)
    flat = references.flat_scores(model, targets, prompt, responses, temperature=0.7)
    expected = {key: references.gram_of(one) for key, one in flat.items()}
    ways = [
        {"token_budget": 1},
        {"token_budget": 60},
        {"token_budget": 60, "padding_side": "left"},
        {"packing": True},
        {"checkpointing": "reentrant"},
        {"checkpointing": "non_reentrant"},
    ]

    def outcome(model, way):
        try:
            return measure_scores(model, prompt, responses, list(expected), temperature=0.7, **way).grams
        except GradvarError as error:
            return str(error)

    for way in ways:
        found = outcome(model, way)
        if isinstance(found, str):
            assert found == outcome(make_model(name), way)
            continue
        for key, gram in expected.items():
            gap = references.error(found[key].gram(), gram)
            assert gap < (2e-5 if name in FLOAT32_INSIDE else 1e-10), f"{key}, {way}: off by {gap:.1e}"


@pytest.mark.parametrize("name", ["sdpa", attention.VARLEN])
def test_a_plan_counts_attention_with_shared_heads(name):
    """As much on CUDA as on the CPU, packed or not; torch 2.11 counts no shared heads."""
    attention.register()
    model = make_model("qwen2", torch.bfloat16, hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
    model.set_attn_implementation(name)
    prompt, responses = make_prompt_and_responses()
    for packing, tokens in ((False, 1), (False, None), (name == attention.VARLEN, None)):
        work = [
            plan_measurement(model.to(device), prompt, responses, SPECS, packing=packing, token_budget=tokens).cost.flop
            for device in ("cpu", "cuda")
        ]
        assert work[1] == pytest.approx(work[0], rel=0.02)


def test_a_model_spread_over_the_device_and_the_host():
    accelerate = pytest.importorskip("accelerate")
    expected = grams(make_model("qwen2").cuda())
    places = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": "cpu", "model.norm": 0}
    places |= {"model.rotary_emb": 0, "lm_head": "cpu"}
    model = accelerate.dispatch_model(make_model("qwen2"), places, main_device=0)
    assert gap(grams(model), expected) < 1e-10


def test_every_plan_gives_the_same_grams():
    """Smaller batches, the host's memory, more passes, checkpointing: what a budget leads to."""
    model = make_model("qwen2", hidden_size=256, intermediate_size=704, max_position_embeddings=2048).cuda()
    prompt, responses = make_prompt_and_responses([400] * 12)
    asked = (model, prompt, responses, "last:qkv,mlp")
    expected = measure_scores(*asked).grams
    for budget in (60 << 20, 80 << 20, 100 << 20, 120 << 20, 200 << 20, 400 << 20):
        for host in (0, 4 << 30):
            found = measure_scores(*asked, memory_budget=budget, host_memory_budget=host).grams
            for key, gram in expected.items():
                assert references.error(found[key].gram(), gram.gram()) < 1e-10
