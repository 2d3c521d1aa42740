"""Activation checkpointing acts in eval mode, and changes nothing in the results."""

import numpy as np
import pytest
import torch

from gradvar.errors import GradvarError
from gradvar.gradients import list_targets, measure_scores
from tests.gradients import references
from tests.gradients.models import CONFIGS, FLOAT32_INSIDE, make_model, make_prompt_and_responses, state, uneven

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

KINDS = ["reentrant", "non_reentrant"]
SPECS = ["all:qkv", "last:o,mlp"]


def measured(model, specs=SPECS, **options):
    return measure_scores(model, *make_prompt_and_responses(), specs, token_budget=60, **options)


def gap(one, other):
    assert one.grams.keys() == other.grams.keys()
    return max(references.error(other.grams[key].gram(), gram.gram()) for key, gram in one.grams.items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_checkpointing_does_not_matter(name, kind):
    model = make_model(name)
    specs = [t.key for t in list_targets(model) if t.kind != "head"]
    once = measured(model, specs)
    again = measured(model, specs, checkpointing=kind)
    assert gap(once, again) < (2e-5 if name in FLOAT32_INSIDE else 1e-12)
    assert (once.plan.checkpointing, again.plan.checkpointing) == ("off", kind)
    for a, b in zip(once.logprobs, again.logprobs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("specs", [["0:q"], ["0:qkv", "last:mlp"], ["lm_head"], ["lm_head", "last:qkv"]])
def test_probes_prefixes_and_the_tied_head_under_checkpointing(kind, specs):
    model = make_model("qwen2_tied", num_hidden_layers=4)
    options = {"probes": 3, "seed": 0, "prefixes": 3}
    once = measured(model, specs, **options)
    again = measured(model, specs, checkpointing=kind, **options)
    assert gap(once, again) < 1e-12
    for key, tau in once.taus.items():
        np.testing.assert_allclose(again.taus[key].value, tau.value, rtol=1e-10)
        largest = once.prefixes[key].value.max()
        np.testing.assert_allclose(
            again.prefixes[key].value, once.prefixes[key].value, rtol=1e-10, atol=1e-12 * largest
        )


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_under_autocast(kind):
    model = make_model("qwen2", torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        once, again = measured(model), measured(model, checkpointing=kind)
    assert gap(once, again) < 1e-6  # the second run of a layer is in bfloat16 too


class Counter:
    """Calls of each layer's MLP on the responses (not the short probes), and the bytes that backward will need."""

    def __init__(self, model, tokens):
        self.calls = [0] * len(model.model.layers)
        self.bytes = 0
        for i, layer in enumerate(model.model.layers):

            def count(module, args, i=i):
                self.calls[i] += args[0].shape[1] == tokens

            layer.mlp.register_forward_pre_hook(count)
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda x: x)

    def pack(self, x):
        if torch._C._current_graph_task_id() == -1:  # not within backward
            self.bytes += x.numel() * x.element_size()
        return x


def calls_and_bytes(target, *, enable=None, train=False, **options):
    model = make_model("qwen2", num_hidden_layers=6, attention_dropout=0.5)
    if enable is not None:
        name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # since 5.20
        switch = getattr(model, f"{name}_checkpointing_enable")
        switch(**{f"{name}_checkpointing_kwargs": {"use_reentrant": enable}})
    model.train(train)
    prompt, responses = make_prompt_and_responses((50,))  # longer than any probe
    counter = Counter(model, len(prompt) + 49)
    with counter.hooks:
        result = measure_scores(model, prompt, responses, target, **options)
    return counter.calls, counter.bytes, result


@pytest.mark.parametrize("kind", KINDS)
def test_only_layers_above_the_lowest_target_run_again(kind):
    off, kept, _ = calls_and_bytes("2:q")
    assert off == [1] * 6
    on, less, _ = calls_and_bytes("2:q", checkpointing=kind)
    assert on == [1, 1, 1, 2, 2, 2]
    assert less < 0.5 * kept, "layers kept their activations all the same"
    assert calls_and_bytes("last:q", checkpointing=kind)[0] == [1] * 6


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_what_is_switched_on_in_the_model_acts_in_either_mode(train, reentrant):
    """transformers itself would ignore it in eval mode; in training mode it would not, but with dropout."""
    calls, _, result = calls_and_bytes("2:q", enable=reentrant, train=train)
    plain = calls_and_bytes("2:q")[2]
    assert calls == [1, 1, 1, 2, 2, 2]
    assert result.plan.checkpointing == "non_reentrant"
    assert gap(plain, result) < 1e-12
    assert calls_and_bytes("2:q", enable=reentrant, train=train, checkpointing="off")[0] == [1] * 6


def test_a_graph_begun_at_the_embeddings_is_cut():
    """transformers makes the embeddings require gradients for adapters and checkpointing: no work for us."""
    model = make_model("qwen2_tied", num_hidden_layers=4)
    once = measured(model, ["lm_head", "last:qkv"])
    model.enable_input_require_grads()
    before, reached = state(model), []
    assert gap(once, measured(model, ["lm_head", "last:qkv"])) < 1e-12

    def watch(module, args, output):
        if output.requires_grad:
            reached.append(1)

    model.model.layers[1].mlp.register_forward_hook(watch)
    assert gap(measured(make_model("qwen2_tied", num_hidden_layers=4), "last:qkv"), measured(model, "last:qkv")) < 1e-12
    assert not reached, "a graph below the lowest target"
    assert state(model)[0] == before[0]
    assert model.get_input_embeddings()(torch.tensor([[3]])).requires_grad


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_the_model_is_left_as_it_was(kind, error):
    model = uneven("gemma2")
    model.model.layers[0].forward = model.model.layers[0].forward  # as accelerate leaves it: an attribute of its own
    before = state(model)
    calls = []

    def fail(done):
        calls.append(done)
        if error is not None and len(calls) > 1:
            raise error("stop here")

    if error is None:
        measured(model, checkpointing=kind, on_progress=fail)
    else:
        with pytest.raises(error):
            measured(model, checkpointing=kind, on_progress=fail)
    assert len(calls) > 1
    assert state(model) == before


def test_reentrant_checkpointing_is_refused_where_it_would_lose_gradients():
    model = make_model("llama")
    top = model.model.layers[1]
    usual = top.forward

    def unpack(hidden, **kwargs):
        return usual(hidden[0] if isinstance(hidden, tuple) else hidden, **kwargs)

    top.forward = unpack
    top.register_forward_pre_hook(lambda module, args: ((args[0],), *args[1:]))
    once = measured(model, "all:qkv")
    assert gap(once, measured(model, "all:qkv", checkpointing="non_reentrant")) < 1e-12
    with pytest.raises(GradvarError, match="choose non_reentrant"):
        measured(model, "all:qkv", checkpointing="reentrant")


def test_an_unknown_kind_is_refused():
    with pytest.raises(GradvarError, match="expected one of off, reentrant, non_reentrant, received 'on'"):
        measured(make_model("llama"), checkpointing="on")
