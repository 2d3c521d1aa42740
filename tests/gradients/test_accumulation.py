"""What is summed in which precision: factors' products in float32, the Gram in float64, TF32 and cuDNN's attention off.

On the CPU; that CUDA's products with float32 results are such sums only a GPU shows (`test_gpu.py`).
"""

import numpy as np
import pytest
import torch

from gradvar.gradients import cross_grams, measure_scores
from gradvar.gradients.gram import FactorStore, GradientStore, MatrixStore
from gradvar.gradients.spill import HostFactorStore, HostMatrixStore, HostMemory
from tests.gradients import references
from tests.gradients.models import make_model, make_prompt_and_responses

CPU = torch.device("cpu")
STORES = {
    "factors": FactorStore,
    "matrices": MatrixStore,
    "factors on the host": lambda *size: HostFactorStore(*size, HostMemory(pinned=False)),
    "matrices on the host": lambda *size: HostMatrixStore(*size, HostMemory(pinned=False)),
}


@pytest.mark.parametrize("kind", STORES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_factors_are_multiplied_and_summed_in_float32(dtype, kind):
    """Modules called twice too; sums in half precision would be off by 1e-3 and more."""
    generator = torch.Generator().manual_seed(0)
    store, flat = STORES[kind](3, 24, 40, torch.float32, CPU), []
    for i in range(3):
        total, bias = torch.zeros(24, 40, dtype=torch.float64), torch.zeros(24, dtype=torch.float64)
        for tokens in (300, 7):
            a, delta = (torch.randn(tokens, width, generator=generator).to(dtype) for width in (40, 24))
            store.add(i, a, delta)
            total += delta.double().T @ a.double()
            bias += delta.double().sum(0)
        flat.append(torch.cat([total.flatten(), bias]).numpy())
    assert references.error(store.gram(True, 3 * 40 * 4 * 5).numpy(), references.gram_of(flat)) < 1e-6
    norms = store.squared_norms(True, 1 << 20).numpy()
    np.testing.assert_allclose(norms, [float(np.dot(x, x)) for x in flat], rtol=1e-6)


@pytest.mark.parametrize("tile", [1, 1 << 20])
def test_stretches_tiles_and_biases_are_added_up_in_float64(tile, monkeypatch):
    """2^24 and 60 times 1: in float32 each 1 would be lost."""
    monkeypatch.setattr("gradvar.gradients.gram._STRETCH", 1)
    store = MatrixStore(1, 8, 8, torch.float32, CPU)
    gradient, bias = torch.ones(8, 8), torch.ones(8)
    gradient[0, 0] = bias[0] = 4096
    gradient[-1, -3:] = 0
    store.add_gradient(0, gradient, bias)
    assert float(store.gram(False, tile)) == 4096**2 + 60
    assert float(store.gram(True, tile)) == 2 * 4096**2 + 60 + 7


def settings():
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    return {
        "float32 products": (matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision),
        "convolutions": cudnn.conv.fp32_precision,
        "half sums": (matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction),
        "cudnn attention": torch.backends.cuda.cudnn_sdp_enabled(),
    }


def loosen():
    """Set everything the other way; returns how it is read then."""
    torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = "tf32"
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    torch.backends.cuda.enable_cudnn_sdp(True)
    return settings()


@pytest.fixture
def loose():
    before, sdp = settings(), torch.backends.cuda.cudnn_sdp_enabled()
    yield loosen()
    torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision = before["float32 products"]
    torch.backends.cudnn.conv.fp32_precision = before["convolutions"]
    torch.backends.cuda.enable_cudnn_sdp(sdp)


@pytest.mark.parametrize("several", [False, True])
def test_no_tf32_and_no_cudnn_attention_in_forward_backward_and_gram(several, loose, monkeypatch):
    """Looked at where each runs, not before or behind."""
    seen = {}
    own = GradientStore.gram

    def gram(self, *args, **options):
        seen["gram"] = settings()
        return own(self, *args, **options)

    def forward(module, args, output):
        seen["forward"] = settings()
        if output.requires_grad:
            output.register_hook(lambda gradient: seen.update(backward=settings()))

    monkeypatch.setattr(GradientStore, "gram", gram)
    model = make_model("llama")
    model.model.layers[1].self_attn.o_proj.register_forward_hook(forward)
    prompt, responses = make_prompt_and_responses()
    if several:
        cross_grams(model, [prompt, prompt[::-1]], [responses, responses], "last:q")
    else:
        measure_scores(model, prompt, responses, "last:q", probes=1, seed=0)
    exact = {
        "float32 products": ("ieee", "ieee"), "convolutions": "ieee", "half sums": (False, False),
        "cudnn attention": False,
    }  # fmt: skip
    assert seen == {"gram": exact, "forward": exact, "backward": exact}
    assert settings() == loose
