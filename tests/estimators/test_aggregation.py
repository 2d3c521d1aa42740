from dataclasses import replace

import numpy as np
import pytest

from gradvar.errors import GradvarError
from gradvar.estimators import RULES, aggregation, aggregation_weights, find_rule
from tests.estimators import references

LENGTHS = np.array([3.0, 10.0, 200.0, 47.0, 10.0])


@pytest.mark.parametrize("rule", list(RULES))
@pytest.mark.parametrize("alpha", [-0.5, 0.0, 0.75, 1.0, 2.5])
def test_matches_the_definition(rule, alpha):
    got = aggregation_weights(rule, LENGTHS, alpha=alpha, max_length=256)
    np.testing.assert_allclose(got, references.weights(rule, LENGTHS, alpha=alpha, max_length=256), rtol=1e-12)


@pytest.mark.parametrize("rule", list(RULES))
def test_groups_are_scopes_of_their_own_and_averaged(rule):
    labels = np.array(["a", "b", "a", "b", "b"])
    got = aggregation_weights(rule, LENGTHS, alpha=1.0, max_length=256, groups=labels)
    for label in "ab":
        inside = labels == label
        expected = references.weights(rule, LENGTHS[inside], alpha=1.0, max_length=256) / 2
        np.testing.assert_allclose(got[inside], expected, rtol=1e-12)


def test_groups_change_dapo_and_vl_norm_but_not_grpo_and_dr_grpo_for_equal_sizes():
    lengths, labels = np.array([2.0, 4.0, 60.0, 30.0]), [0, 0, 1, 1]
    for rule, changes in (("grpo", False), ("dr_grpo", False), ("dapo", True), ("vl_norm", True)):
        one = aggregation_weights(rule, lengths, alpha=1.0, max_length=64)
        two = aggregation_weights(rule, lengths, alpha=1.0, max_length=64, groups=labels)
        assert np.allclose(one, two) is not changes, rule


def test_alpha_zero_is_dr_grpo():
    zero = aggregation_weights("vl_norm", LENGTHS, alpha=0.0, max_length=77)
    np.testing.assert_allclose(zero, aggregation_weights("dr_grpo", LENGTHS, max_length=77), rtol=1e-14)


def test_large_alpha_does_not_overflow():
    weights = aggregation_weights("vl_norm", [1.0, 8192.0], alpha=50.0, max_length=8192)
    np.testing.assert_allclose(weights, [1 / 8192, 0.0], atol=1e-18)


@pytest.mark.parametrize("alpha", [-300.0, -40.0, 3.9, 4.1, 17.3, 200.0, 5000.0])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_no_alpha_and_no_length_overflows(alpha, dtype):
    torch = pytest.importorskip("torch")
    lengths = [1.0, 3.0, 1e5, 1e5 + 1, 1.5]
    logs = -alpha * np.log(np.array(lengths))
    expected = np.exp(logs - np.logaddexp.reduce(logs)) / 1e5
    tensor = torch.tensor(lengths, dtype=getattr(torch, dtype))
    for given in (np.array(lengths), tensor):
        got = np.asarray(aggregation_weights("vl_norm", given, alpha=alpha, max_length=1e5))
        np.testing.assert_allclose(got, expected, rtol=1e-3 if given is tensor else 1e-9, atol=1e-12)
    got = aggregation_weights("vl_norm", lengths, alpha=alpha, max_length=1e5, groups=[0, 0, 0, 1, 1])
    assert np.isfinite(got).all()
    assert got.sum() == pytest.approx(1e-5)


def test_alpha_one_has_the_least_variance_under_the_linear_law():
    """With E g the same for every response, minimise sum x_i^2 L_i at fixed sum x_i."""

    def variance(alpha):
        x = aggregation_weights("vl_norm", LENGTHS, alpha=alpha, max_length=256)
        return float((x**2 * LENGTHS).sum() / x.sum() ** 2)

    assert variance(1.0) == min(variance(a) for a in (0.0, 0.5, 0.9, 1.0, 1.1, 2.0))


def verl_loss(mode, loss, mask, n, horizon):
    """verl agg_loss (b178a3c; with 1/n in seq-mean-token-sum-norm as newer versions have it)."""
    per_sequence = (loss * mask).sum(-1)
    return {
        "token-mean": lambda: per_sequence.sum() / mask.sum(),
        "seq-mean-token-sum": lambda: per_sequence.sum() / n,
        "seq-mean-token-mean": lambda: (per_sequence / mask.sum(-1)).sum() / n,
        "seq-mean-token-sum-norm": lambda: per_sequence.sum() / n / horizon,
    }[mode]()


def trl_loss(kind, loss, mask, n, horizon):
    """TRL GRPOTrainer (f2cd577), one process, one accumulation step."""
    return {
        "grpo": lambda: ((loss * mask).sum(-1) / mask.sum(-1).clip(1)).mean(),
        "bnpo": lambda: (loss * mask).sum() / mask.sum().clip(1),
        "dapo": lambda: (loss * mask).sum() / mask.sum().clip(1),
        "dr_grpo": lambda: (loss * mask).sum() / (n * horizon),
    }[kind]()


def skyrl_loss(kind, loss, mask, n, horizon):
    """SkyRL apply_loss_reduction_to_advantages_minibatch (a956457), then the sum."""
    halves = [slice(0, n // 2), slice(n // 2, n)]
    return {
        "token_mean": lambda: (loss * mask).sum() / mask.sum(),
        "sequence_mean": lambda: (loss * mask / (n * mask.sum(-1, keepdims=True))).sum(),
        "seq_mean_token_sum_norm": lambda: (loss * mask).sum() / (n * horizon),
        "prompt_mean": lambda: sum((loss[h] * mask[h]).sum() / (2 * mask[h].sum()) for h in halves),
    }[kind]()


@pytest.mark.parametrize(
    ("framework", "names"),
    [
        (verl_loss, ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]),
        (trl_loss, ["grpo", "bnpo", "dapo", "dr_grpo"]),
        (skyrl_loss, ["token_mean", "sequence_mean", "seq_mean_token_sum_norm", "prompt_mean"]),
    ],
)
def test_frameworks_names_give_the_frameworks_losses(framework, names):
    rng = np.random.default_rng(3)
    n, tokens = 6, 40
    lengths = rng.integers(1, tokens, size=n)
    mask = (np.arange(tokens)[None] < lengths[:, None]).astype(float)
    loss = rng.normal(size=(n, tokens))
    for name in names:
        groups = [0, 0, 0, 1, 1, 1] if name == "prompt_mean" else None
        x = aggregation_weights(name, lengths, max_length=tokens, groups=groups)
        ours = (x * (loss * mask).sum(-1)).sum()
        assert ours == pytest.approx(framework(name, loss, mask, n, tokens), rel=1e-12), name


def test_no_name_stands_for_two_rules():
    names = [name for rule in RULES.values() for name in (rule.name, *rule.aliases)]
    assert len(names) == len(set(names))
    assert all(find_rule(alias) is rule for rule in RULES.values() for alias in rule.aliases)


def test_every_framework_name_says_where_it_is_from():
    """A framework's value finds its rule, but for verl's older seq-mean-token-sum-norm; every alias is explained."""
    said = {setting.name for rule in RULES.values() for setting in rule.settings}
    assert {alias for rule in RULES.values() for alias in rule.aliases} - said == {"token-sum"}
    for rule in RULES.values():
        for setting in rule.settings:
            assert bool(setting.max_length) == rule.takes_max_length, str(setting)
            if rule.name != "token_sum_norm":
                assert find_rule(setting.name) is rule
    texts = [str(setting) for setting in find_rule("dr_grpo").settings]
    assert 'TRL GRPOConfig loss_type="dr_grpo", M = max_completion_length' in texts
    assert (
        'SkyRL trainer.algorithm.loss_reduction="seq_mean_token_sum_norm", M = trainer.algorithm.max_seq_len' in texts
    )
    assert any(text.startswith("verl from pull request 5417") for text in texts)


def test_prompt_mean_takes_groups_and_the_legacy_mean_is_refused():
    with pytest.raises(GradvarError, match="give groups, or ask for 'dapo'"):
        aggregation_weights("prompt_mean", LENGTHS)
    with pytest.raises(GradvarError, match="micro-batches"):
        aggregation_weights("token_mean_legacy", LENGTHS)


def test_names_of_one_rule_are_one():
    got = aggregation.expand_rules(["prompt_mean", "token-mean", "vl_norm", "grpo", "dapo", "vl_norm"], [1.0, 0.5, 1])
    assert [(rule.name, alpha) for rule, alpha in got] == [
        ("dapo", None),
        ("vl_norm", 1.0),
        ("vl_norm", 0.5),
        ("grpo", None),
    ]


@pytest.mark.parametrize(
    ("rule", "arguments", "words"),
    [
        ("gspo", {}, r"unknown rule 'gspo' \(did you mean grpo\?\): expected one of"),
        ("dr_grpo", {}, "give max_length"),
        ("vl_norm", {"max_length": 10}, "needs alpha"),
        ("vl_norm", {"max_length": 10, "alpha": float("nan")}, "alpha must be a finite number"),
        ("vl_norm", {"max_length": 10, "alpha": "one"}, "alpha must be a finite number"),
        ("dr_grpo", {"max_length": 0}, "max_length must be a positive"),
        ("grpo", {"groups": [1, 2]}, "groups must label every response"),
    ],
)
def test_refuses(rule, arguments, words):
    with pytest.raises(GradvarError, match=words):
        aggregation_weights(rule, LENGTHS, **arguments)


@pytest.mark.parametrize("lengths", [[], [[1.0, 2.0]], [0.0, 3.0], [np.nan, 1.0]])
def test_refuses_lengths(lengths):
    with pytest.raises(GradvarError, match="lengths must"):
        aggregation_weights("grpo", lengths)


def test_integer_lengths_and_tensors():
    torch = pytest.importorskip("torch")
    expected = aggregation_weights("vl_norm", LENGTHS, alpha=0.75, max_length=256, groups=[0, 1, 0, 1, 1])
    integers = aggregation_weights("vl_norm", LENGTHS.astype(int), alpha=0.75, max_length=256, groups=[0, 1, 0, 1, 1])
    tensors = aggregation_weights(
        "vl_norm", torch.tensor(LENGTHS), alpha=0.75, max_length=256, groups=torch.tensor([0, 1, 0, 1, 1])
    )
    assert isinstance(tensors, torch.Tensor)
    np.testing.assert_allclose(integers, expected, rtol=1e-14)
    np.testing.assert_allclose(tensors.numpy(), expected, rtol=1e-14)


def test_a_registered_rule_is_known_everywhere_and_names_are_not_taken_twice(monkeypatch):
    monkeypatch.setattr(aggregation, "RULES", dict(aggregation.RULES))
    monkeypatch.setattr(aggregation, "_BY_ANY_NAME", dict(aggregation._BY_ANY_NAME))
    mine = aggregation.Rule(
        name="root_length", label="root", formula=lambda lengths, n, total, longest, alpha: lengths**-0.5 / n
    )
    aggregation.register_rule(mine)
    np.testing.assert_allclose(aggregation.aggregation_weights("root_length", [4.0, 25.0]), [0.25, 0.1])
    with pytest.raises(GradvarError, match="'root_length' is taken"):
        aggregation.register_rule(mine)
    with pytest.raises(GradvarError, match="'token-mean' is taken"):
        aggregation.register_rule(replace(mine, name="other", aliases=("token-mean",)))
