"""Random-sign probes and prefixes from the same pass, against literal loops of backward passes."""

from functools import partial

import numpy as np
import pytest
import torch

from gradvar.errors import GradvarError
from gradvar.gradients import list_targets, measure_scores, resolve_targets
from gradvar.gradients.reweighted import prefix_lengths, random_signs
from tests.gradients import references
from tests.gradients.models import FLOAT32_INSIDE, least_budget, make_model, make_prompt_and_responses

SPECS = ["all:qkv", "last:o,mlp"]
SEED = 7


@pytest.fixture(scope="module")
def qwen():
    return make_model("qwen2")


def literal_taus(model, targets, prompt, responses, probes, *, ids=None, masks=None, **options):
    """Per key, (K, N) squared norms: the same signs, one response and one probe at a time, in plain autograd."""
    found = {target.key: np.zeros((probes, len(responses))) for target in targets}
    for i, response in enumerate(responses):
        signs = random_signs(SEED, prompt, ids[i] if ids else i, len(response), probes)
        mask = np.ones(len(response)) if masks is None or masks[i] is None else np.array(masks[i])
        for k in range(probes):
            scores = references.flat_scores(
                model, targets, prompt, [response], masks=[(signs[k] * mask).tolist()], **options
            )
            for key, flat in scores.items():
                found[key][k, i] = flat[0] @ flat[0]
    return found


def check_against_literal(model, specs, **options):
    prompt, responses = make_prompt_and_responses((1, 12, 5))
    targets = resolve_targets(model, specs)
    keys = [t.key for t in targets]
    if "memory_budget" in options:
        options["memory_budget"] = least_budget(model, prompt, responses, keys, probes=3)
    measured = measure_scores(model, prompt, responses, keys, probes=3, seed=SEED, **options)
    shared = {name: options[name] for name in ("temperature", "include_bias") if name in options}
    expected = literal_taus(
        model, targets, prompt, responses, 3,
        ids=options.get("rollout_ids"), masks=options.get("loss_masks"), **shared,
    )  # fmt: skip
    assert measured.taus.keys() == expected.keys()
    for key, norms in expected.items():
        tau = measured.taus[key]
        np.testing.assert_allclose(tau.value, norms.mean(0), rtol=1e-10, atol=1e-12 * norms.max(), err_msg=key)
        np.testing.assert_allclose(tau.error, norms.std(0, ddof=1) / np.sqrt(3), rtol=1e-6, atol=1e-10 * norms.max())
        assert (tau.target, tau.probes, tau.seed) == (key, 3, SEED)
    return measured


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"token_budget": 1},
        {"temperature": 0.6, "include_bias": False},
        {"loss_masks": [None, [1, 1, 0, 0, 1, 0, 1, 1, 1, 0, 0, 1], [0, 0, 1, 1, 1]]},
        {"rollout_ids": [40, 3, -1]},
        {"memory_budget": "least"},
    ],
)
def test_probes_equal_the_literal_loop_over_the_same_signs(qwen, options):
    measured = check_against_literal(qwen, SPECS, **options)
    assert (len(measured.plan.passes) > 1) == ("memory_budget" in options)


def test_a_probe_or_prefix_costs_one_more_truncated_backward_pass_of_each_batch_and_no_forward():
    prompt, responses = make_prompt_and_responses()  # two batches of at most 70 tokens

    def runs(probes, prefixes=0):
        model = make_model("qwen2", num_hidden_layers=3)
        forward, backward = [], [0, 0, 0]

        def at_forward(module, args, output, layer):
            def count(gradient):
                backward[layer] += 1

            forward.append(layer)
            if output.requires_grad:
                output.register_hook(count)

        for layer, module in enumerate(model.model.layers):
            module.mlp.register_forward_hook(partial(at_forward, layer=layer))
        measure_scores(model, prompt, responses, "1:q", token_budget=70, probes=probes, prefixes=prefixes, seed=SEED)
        return len(forward), *backward

    forward, lowest, middle, highest = runs(0)
    assert lowest == 0
    for probes in (1, 4):
        assert runs(probes) == (forward, 0, middle + 2 * probes, highest + 2 * probes)
    assert runs(0, prefixes=4) == (forward, 0, middle + 2 * 3, highest + 2 * 3), "the last is the whole response"


@pytest.mark.parametrize("name", ["gpt2", "phi3", "gemma", "qwen2_tied"])
def test_probes_of_other_architectures(name):
    model = make_model(name)
    head = ["lm_head"] if name == "qwen2_tied" else []
    check_against_literal(model, [*(t.key for t in list_targets(model) if t.kind != "head"), *head])


def test_probes_of_a_module_called_twice_and_of_one_whose_tokens_go_alone():
    model = make_model("llama")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    check_against_literal(model, ["model.layers.0.mlp.*"])

    class TimeFirst(torch.nn.Module):
        def __init__(self, mlp):
            super().__init__()
            self.inner = mlp

        def forward(self, x):
            return self.inner(x.transpose(0, 1)).transpose(0, 1)

    model = make_model("llama")
    model.model.layers[1].mlp = TimeFirst(model.model.layers[1].mlp)
    assert check_against_literal(model, ["last:mlp,q"]).plan.token_budget == 1


def test_taus_are_unbiased_for_the_sum_of_token_norms(qwen):
    """Within Monte Carlo error: for 24 numbers 4.5 standard errors are one false alarm in about 5,000."""
    prompt, responses = make_prompt_and_responses((1, 6, 10, 4))
    masks = [None, None, [1, 1, 0, 0, 0, 1, 1, 1, 1, 1], None]
    targets = resolve_targets(qwen, ["last:qkv,mlp"])
    measured = measure_scores(qwen, prompt, responses, "last:qkv,mlp", probes=400, seed=1, loss_masks=masks)
    for i, response in enumerate(responses):
        exact = references.token_squared_norms(qwen, targets, prompt, response, mask=masks[i])
        for key, norms in exact.items():
            tau = measured.taus[key]
            slack = 4.5 * tau.error[i] + 1e-10 * norms.sum()
            assert abs(tau.value[i] - norms.sum()) < slack, f"{key}, response {i}: biased"
            assert tau.error[i] < 0.2 * norms.sum() or i == 0
            assert (i > 0) or tau.error[i] < 1e-10 * tau.value[i]  # one token: every sign gives its norm


@pytest.mark.parametrize("budget", [1, 60, 10_000])
def test_the_grams_and_log_probs_stay_what_they_were(qwen, budget):
    """Later backward passes must not touch what the first one left (with a budget of 1 nothing is padded)."""
    prompt, responses = make_prompt_and_responses()
    plain = measure_scores(qwen, prompt, responses, SPECS, token_budget=budget)
    probed = measure_scores(qwen, prompt, responses, SPECS, probes=2, seed=0, token_budget=budget)
    assert plain.taus == {}
    for key, gram in plain.grams.items():
        assert np.array_equal(gram.gram(), probed.grams[key].gram())
    assert all(np.array_equal(a, b) for a, b in zip(plain.logprobs, probed.logprobs, strict=True))


def test_taus_know_the_seed_and_not_the_batch_mates(qwen):
    prompt, responses = make_prompt_and_responses()
    options = {"probes": 4, "token_budget": 60}
    whole = measure_scores(qwen, prompt, responses, "last:qkv", seed=3, **options).taus
    again = measure_scores(qwen, prompt, responses, "last:qkv", seed=3, **options).taus
    other = measure_scores(qwen, prompt, responses, "last:qkv", seed=4, **options).taus
    order = [4, 1]
    some = measure_scores(
        qwen, prompt, [responses[i] for i in order], "last:qkv", seed=3, rollout_ids=order, probes=4
    ).taus
    for key, tau in whole.items():
        assert np.array_equal(tau.value, again[key].value)
        assert np.abs(tau.value - other[key].value).max() > 1e-3 * tau.value.max()
        np.testing.assert_allclose(some[key].value, tau.value[order], rtol=1e-12)


def test_signs_of_fewer_probes_are_the_first_of_more():
    many = random_signs(5, [1, 2], 3, 40, 8)
    assert np.array_equal(many[:3], random_signs(5, [1, 2], 3, 40, 3))
    assert set(np.unique(many)) == {-1.0, 1.0}
    others = [random_signs(*args, 40, 8) for args in ((6, [1, 2], 3), (5, [1, 3], 3), (5, [1, 2], 4), (5, [1, 2], -3))]
    assert all(not np.array_equal(many, other) for other in others)


def test_a_single_probe_has_no_standard_error(qwen):
    prompt, responses = make_prompt_and_responses()
    tau = next(iter(measure_scores(qwen, prompt, responses, "last:v", probes=1, seed=0).taus.values()))
    assert np.isnan(tau.error).all()
    assert (tau.value > 0).all()


# -- prefixes


def literal_prefixes(model, targets, prompt, responses, prefixes, *, masks=None, **options):
    """Per key, (N, k) squared norms: the score of the first loss tokens alone, counted one by one."""
    found = {target.key: np.zeros((len(responses), prefixes)) for target in targets}
    lengths = np.zeros((len(responses), prefixes), dtype=int)
    for i, response in enumerate(responses):
        mask = [1] * len(response) if masks is None or masks[i] is None else masks[i]
        carriers = [t for t, m in enumerate(mask) if m]
        for j in range(prefixes):
            lengths[i, j] = int(np.ceil((j + 1) / prefixes * len(carriers) - 1e-9))
            part = [float(t in carriers[: lengths[i, j]]) for t in range(len(response))]
            for key, flat in references.flat_scores(
                model, targets, prompt, [response], masks=[part], **options
            ).items():
                found[key][i, j] = flat[0] @ flat[0]
    return found, lengths


@pytest.mark.parametrize("prefixes", [1, 2, 4, 7])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.6, "include_bias": False},
        {"loss_masks": [None, [1, 1, 0, 0, 1, 0, 1, 1, 1, 0, 0, 1], [0, 0, 1, 1, 1]], "token_budget": 1},
        {"memory_budget": "least"},
    ],
)
def test_prefixes_equal_the_literal_loop(qwen, options, prefixes):
    prompt, responses = make_prompt_and_responses((1, 12, 5))
    targets = resolve_targets(qwen, SPECS)
    if "memory_budget" in options:
        options = {"memory_budget": least_budget(qwen, prompt, responses, SPECS, prefixes=prefixes)}
    measured = measure_scores(qwen, prompt, responses, SPECS, prefixes=prefixes, **options)
    shared = {name: options[name] for name in ("temperature", "include_bias") if name in options}
    expected, lengths = literal_prefixes(
        qwen, targets, prompt, responses, prefixes, masks=options.get("loss_masks"), **shared
    )
    assert measured.prefixes.keys() == expected.keys()
    for key, norms in expected.items():
        found = measured.prefixes[key]
        assert np.array_equal(found.lengths, lengths)
        # k and q see no gradient before the second token: zero up to rounding
        np.testing.assert_allclose(found.value, norms, rtol=1e-10, atol=1e-12 * norms.max(), err_msg=key)
        assert np.array_equal(found.value[:, -1], measured.grams[key].gram().diagonal())


@pytest.mark.parametrize("name", ["gpt2", "phi3", "gemma2", "qwen2_tied"])
def test_prefixes_of_other_architectures(name):
    model = make_model(name)
    targets = [t for t in list_targets(model) if t.kind != "head" or name == "qwen2_tied"]
    prompt, responses = make_prompt_and_responses((9, 12, 5))
    measured = measure_scores(model, prompt, responses, [t.key for t in targets], prefixes=3)
    expected, _ = literal_prefixes(model, targets, prompt, responses, 3)
    for key, norms in expected.items():
        roundings = 2e-5 if name in FLOAT32_INSIDE else 1e-10
        np.testing.assert_allclose(
            measured.prefixes[key].value, norms, rtol=roundings, atol=roundings / 100 * norms.max()
        )


def test_a_prefix_is_the_score_of_the_shorter_response(qwen):
    prompt, responses = make_prompt_and_responses((12, 30))
    norms = next(iter(measure_scores(qwen, prompt, responses, "last:v", prefixes=3).prefixes.values()))
    for j, _ in enumerate(norms.lengths[0]):
        cut = [response[: norms.lengths[i, j]] for i, response in enumerate(responses)]
        gram = next(iter(measure_scores(qwen, prompt, cut, "last:v").grams.values())).gram()
        np.testing.assert_allclose(norms.value[:, j], gram.diagonal(), rtol=1e-11)


def test_prefix_lengths_are_even_and_end_with_the_whole():
    assert prefix_lengths(10, 4).tolist() == [3, 5, 8, 10]
    assert prefix_lengths(2, 5).tolist() == [1, 1, 2, 2, 2]
    for n in range(1, 40):
        for k in range(1, 9):
            lengths = prefix_lengths(n, k)
            assert lengths[-1] == n
            assert lengths[0] >= 1
            assert (np.diff(lengths) >= 0).all()
            assert np.ptp(np.diff(lengths, prepend=0)) <= 1


def test_probes_and_prefixes_together_are_each_by_itself(qwen):
    prompt, responses = make_prompt_and_responses()
    both = measure_scores(qwen, prompt, responses, SPECS, prefixes=3, probes=2, seed=0)
    probes = measure_scores(qwen, prompt, responses, SPECS, probes=2, seed=0)
    prefixes = measure_scores(qwen, prompt, responses, SPECS, prefixes=3)
    assert probes.prefixes == prefixes.taus == {}
    for key, tau in probes.taus.items():
        np.testing.assert_allclose(both.taus[key].value, tau.value, rtol=1e-13)
        np.testing.assert_allclose(both.prefixes[key].value, prefixes.prefixes[key].value, rtol=1e-13)


# -- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefixes": -1}, "prefixes: expected 0 or more, received -1"),
        ({"probes": -1}, "probes: expected 0 or more, received -1"),
        ({"probes": 2}, "expected a seed"),
        ({"probes": 2, "seed": -3}, "seed: expected 0 or more"),
    ],
)
def test_bad_requests(qwen, options, message):
    with pytest.raises(GradvarError, match=message):
        measure_scores(qwen, *make_prompt_and_responses(), "last:v", **options)
