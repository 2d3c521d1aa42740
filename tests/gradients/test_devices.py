"""Models that accelerate offloads or spreads over devices give the Grams of the plain model."""

import accelerate
import numpy as np
import pytest
import torch

from gradvar.errors import GradvarError
from gradvar.gradients import check_precision, cross_grams, measure_scores, resolve_targets
from gradvar.gradients.devices import devices_of
from gradvar.models import find_model, load_model, resolve_device, token_device
from tests.gradients import references
from tests.gradients.models import make_model, make_prompt_and_responses, state

PLACES = ["cpu_offload", "disk_offload", "dispatch"]


def placed(model, place, folder):
    """The model with its weights elsewhere, brought to the CPU when a module runs."""
    if place == "cpu_offload":
        return accelerate.cpu_offload(model, execution_device="cpu")
    if place == "disk_offload":
        accelerate.disk_offload(model, str(folder), execution_device="cpu")
        return model
    inner = next(name for name, _ in model.named_children())
    layers = [f"{inner}.{name}" for name, _ in model.get_submodule(inner).named_children()]
    homes = dict.fromkeys([*layers, "lm_head"], "cpu")
    stack = next(name for name in layers if name.endswith((".layers", ".h")))
    del homes[stack]
    homes |= {f"{stack}.0": "cpu", f"{stack}.1": "disk"}
    return accelerate.dispatch_model(model, homes, main_device="cpu", offload_dir=str(folder), force_hooks=True)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("name", "specs"),
    [
        ("qwen2", ["all:qkv", "last:o,mlp", "lm_head"]),
        ("qwen2_tied", ["lm_head", "last:qkv"]),
        ("gpt2", ["all:qkv", "last:mlp"]),
        ("phi3", ["all:qkv", "last:mlp"]),
        ("gemma2", ["0:qkv"]),
    ],
)
def test_offloaded_models_give_the_same_grams(name, specs, place, tmp_path):
    prompt, responses = make_prompt_and_responses()
    options = {"token_budget": 60, "probes": 2, "seed": 0}
    whole = measure_scores(make_model(name), prompt, responses, specs, **options)
    model = placed(make_model(name), place, tmp_path)
    assert any(parameter.is_meta for parameter in model.parameters())
    before = state(model)
    measured = measure_scores(model, prompt, responses, specs, **options)
    assert state(model) == before
    assert measured.grams.keys() == whole.grams.keys()
    for key, gram in whole.grams.items():
        assert references.error(measured.grams[key].gram(), gram.gram()) < 1e-12
        np.testing.assert_allclose(measured.taus[key].value, whole.taus[key].value, rtol=1e-10)
    for kind in ("reentrant", "non_reentrant"):
        again = measure_scores(model, prompt, responses, specs, checkpointing=kind, **options)
        for key, gram in whole.grams.items():
            assert references.error(again.grams[key].gram(), gram.gram()) < 1e-12


@pytest.mark.parametrize("room", [{"cpu": "10GB"}, {"cpu": 20_000}])
def test_a_folder_spread_over_what_there_is_gives_the_same_grams(room, tmp_path):
    """`--device balanced`, with room for all weights and with so little that most stay on the disk."""
    make_model("qwen2", torch.float32).save_pretrained(tmp_path)
    folder = find_model(str(tmp_path))
    plain = load_model(folder, dtype="float32", device="cpu")
    spread = load_model(folder, dtype="float32", device=resolve_device("balanced"), max_memory=room)
    assert any(parameter.is_meta for parameter in spread.parameters()) == (room["cpu"] == 20_000)
    assert token_device(spread) == torch.device("cpu")
    assert devices_of(spread) == {torch.device("cpu")}
    prompt, responses = make_prompt_and_responses()
    expected = measure_scores(plain, prompt, responses, "all:qkv,mlp").grams
    found = measure_scores(spread, prompt, responses, "all:qkv,mlp").grams
    assert found.keys() == expected.keys()
    for key, gram in expected.items():
        assert references.error(found[key].gram(), gram.gram()) < 1e-5
    assert next(iter(cross_grams(spread, [prompt], [responses], "last:q").values())).shape == (len(responses),) * 2


def test_balanced_without_accelerate_is_refused(monkeypatch, tmp_path):
    make_model("qwen2", torch.float32).save_pretrained(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(GradvarError, match="--device balanced needs accelerate"):
        load_model(find_model(str(tmp_path)), dtype="float32", device="balanced")


def test_offloaded_experts_are_refused_by_name_and_their_attention_is_measured():
    prompt, responses = make_prompt_and_responses()
    whole = measure_scores(make_model("mixtral"), prompt, responses, "last:attn")
    model = accelerate.cpu_offload(make_model("mixtral"), execution_device="cpu")
    measured = measure_scores(model, prompt, responses, "last:attn")
    for key, gram in whole.grams.items():
        assert references.error(measured.grams[key].gram(), gram.gram()) < 1e-12
    with pytest.raises(GradvarError, match=r"experts\S* has weights on the meta device"):
        measure_scores(model, prompt, responses, "last:mlp")


def test_weights_without_values_are_refused():
    with torch.device("meta"):
        model = make_model("llama")
    with pytest.raises(GradvarError, match="meta device"):
        resolve_targets(model, "last:q")


def test_no_float32_copy_of_an_offloaded_model():
    model = accelerate.cpu_offload(make_model("llama", torch.bfloat16), execution_device="cpu")
    with pytest.raises(GradvarError, match=r"offloaded.*pass the reference"):
        check_precision(model, *make_prompt_and_responses(), "last:q")
    check_precision(model, *make_prompt_and_responses(), "last:q", reference=make_model("llama", torch.float32))


FLAGS = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("before", [True, False])
def test_backends_are_exact_inside_and_as_before_outside(monkeypatch, before, error):
    matmul, cuda = torch.backends.cuda.matmul, torch.backends.cuda
    usual = [getattr(matmul, name) for name in FLAGS], cuda.cudnn_sdp_enabled(), torch.get_float32_matmul_precision()
    try:
        for name in FLAGS:
            setattr(matmul, name, before)
        cuda.enable_cudnn_sdp(before)
        torch.set_float32_matmul_precision("medium")
        seen = []

        def look(done):
            seen.append([*(getattr(matmul, name) for name in FLAGS), cuda.cudnn_sdp_enabled()])
            seen.append(torch.get_float32_matmul_precision())
            if error is not None:
                raise error("stop")

        model = make_model("llama")
        if error is None:
            measure_scores(model, *make_prompt_and_responses(), "last:q", on_progress=look)
        else:
            with pytest.raises(error):
                measure_scores(model, *make_prompt_and_responses(), "last:q", on_progress=look)
        assert seen[:2] == [[False, False, False], "highest"]
        assert [getattr(matmul, name) for name in FLAGS] == [before, before]
        assert cuda.cudnn_sdp_enabled() == before
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        for name, value in zip(FLAGS, usual[0], strict=True):
            setattr(matmul, name, value)
        cuda.enable_cudnn_sdp(usual[1])
        torch.set_float32_matmul_precision(usual[2])


def _newer_names():
    backends = torch.backends
    halves = [getattr(backends.cuda.matmul, f"{name}{part}") for name in FLAGS for part in ("", "_split_k")]
    accumulation = backends.cuda.matmul.allow_fp16_accumulation
    return [backends.cuda.matmul.fp32_precision, backends.mkldnn.matmul.fp32_precision, *halves, accumulation]


@pytest.mark.parametrize(("cuda", "mkldnn"), [("tf32", "ieee"), ("tf32", "bf16"), ("ieee", "tf32"), ("none", "none")])
def test_precision_set_by_torch_s_newer_names(cuda, mkldnn):
    """torch refuses to tell the precision by its older name once the newer ones disagree with it."""
    matmul, other = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    usual = _newer_names()
    try:
        matmul.fp32_precision, other.fp32_precision = cuda, mkldnn
        matmul.allow_bf16_reduced_precision_reduction = (False, False)
        matmul.allow_fp16_accumulation = True
        before, seen = _newer_names(), []
        measure_scores(
            make_model("llama"),
            *make_prompt_and_responses(),
            "last:q",
            on_progress=lambda _: seen.append(_newer_names()),
        )
        assert seen[0] == ["ieee", "ieee", False, False, False, True, False]
        assert _newer_names() == before
    finally:
        matmul.fp32_precision, other.fp32_precision = usual[:2]
        for name, allow, split in zip(FLAGS, usual[2:6:2], usual[3:6:2], strict=True):
            setattr(matmul, name, (allow, split))
        matmul.allow_fp16_accumulation = usual[6]
