import pytest
import torch

from gradvar.errors import GradvarError
from gradvar.estimators import RULES, aggregation_weights
from gradvar.losses import aggregate_loss

LENGTHS = [5, 1, 12, 7]
TOKENS = 12


def mask_of(lengths, dtype=torch.float64):
    return (torch.arange(TOKENS)[None] < torch.tensor(lengths)[:, None]).to(dtype)


@pytest.mark.parametrize("rule", list(RULES))
@pytest.mark.parametrize("groups", [None, ["a", "b", "b", "a"]])
def test_gradient_is_the_weighted_sum_of_token_gradients(rule, groups):
    """d loss / d theta = sum_i x_i sum_t d token_loss_it / d theta, each token differentiated alone."""
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(3, dtype=torch.float64, generator=generator, requires_grad=True)
    features = torch.randn(4, TOKENS, 3, dtype=torch.float64, generator=generator)
    mask = mask_of(LENGTHS)

    def token_loss():
        return torch.tanh(features @ theta)

    loss = aggregate_loss(token_loss(), mask, rule, alpha=0.75, max_length=TOKENS, groups=groups)
    (got,) = torch.autograd.grad(loss, theta)
    x = aggregation_weights(rule, LENGTHS, alpha=0.75, max_length=TOKENS, groups=groups)
    expected, value = torch.zeros(3, dtype=torch.float64), 0.0
    for i in range(4):
        for t in range(LENGTHS[i]):
            alone = token_loss()[i, t]
            expected += x[i] * torch.autograd.grad(alone, theta)[0]
            value += x[i] * alone.item()
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)
    assert loss.item() == pytest.approx(value, rel=1e-12)
    assert loss.dtype == torch.float64
    assert loss.ndim == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_masked_tokens_never_matter(bad):
    token_loss = torch.ones(4, TOKENS, dtype=torch.float64)
    token_loss[mask_of(LENGTHS) == 0] = bad
    token_loss.requires_grad_()
    loss = aggregate_loss(token_loss, mask_of(LENGTHS), "grpo")
    assert loss.item() == pytest.approx(1.0)
    loss.backward()
    assert torch.isfinite(token_loss.grad).all()


def test_empty_responses_do_not_count():
    token_loss = torch.rand(4, TOKENS, generator=torch.Generator().manual_seed(1))
    lengths = [5, 0, 12, 7]
    keep = torch.tensor([0, 2, 3])
    for rule in RULES:
        whole = aggregate_loss(token_loss, mask_of(lengths), rule, alpha=1.0, max_length=TOKENS, groups=[0, 0, 1, 1])
        part = aggregate_loss(
            token_loss[keep], mask_of(lengths)[keep], rule, alpha=1.0, max_length=TOKENS, groups=[0, 1, 1]
        )
        torch.testing.assert_close(whole, part)


def test_all_empty_is_zero_with_gradient():
    token_loss = torch.rand(2, TOKENS, requires_grad=True)
    loss = aggregate_loss(token_loss, torch.zeros(2, TOKENS), "dapo")
    loss.backward()
    assert loss.item() == 0.0
    assert (token_loss.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_losses_are_summed_in_float32(dtype):
    """70000 does not fit float16, 4097 tokens are no bfloat16 number: neither sums nor weights are made in them."""
    token_loss = torch.full((2, 4097), 16.0, dtype=dtype, requires_grad=True)
    mask = torch.ones(2, 4097)
    for rule in RULES:
        loss = aggregate_loss(token_loss, mask, rule, alpha=1.0, max_length=4097)
        whole = token_loss.detach().double().requires_grad_()
        exact = aggregate_loss(whole, mask, rule, alpha=1.0, max_length=4097)
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(exact.item(), rel=1e-6)
        (got,), (expected,) = torch.autograd.grad(loss, token_loss), torch.autograd.grad(exact, whole)
        assert got.dtype == dtype
        torch.testing.assert_close(got, expected.to(dtype))
    assert aggregate_loss(torch.ones(1, 2, dtype=torch.float64), torch.ones(1, 2), "dapo").dtype == torch.float64


def test_prompt_mean_takes_groups():
    with pytest.raises(GradvarError, match="give groups"):
        aggregate_loss(torch.ones(2, 3), torch.ones(2, 3), "prompt_mean")
    with pytest.raises(GradvarError, match="give groups"):
        aggregate_loss(torch.ones(2, 3), torch.zeros(2, 3), "prompt_mean")
    mask = torch.tensor([[1, 0, 0], [1, 1, 1]])
    loss = aggregate_loss(torch.tensor([[2.0, 9, 9], [3, 4, 5]]), mask, "prompt_mean", groups=[0, 1])
    assert loss.item() == pytest.approx(3.0)


def test_boolean_and_integer_masks():
    token_loss = torch.rand(4, TOKENS)
    expected = aggregate_loss(token_loss, mask_of(LENGTHS), "dapo")
    for dtype in (torch.bool, torch.int64):
        torch.testing.assert_close(aggregate_loss(token_loss, mask_of(LENGTHS, dtype), "dapo"), expected)


@pytest.mark.parametrize(
    ("token_loss", "mask", "arguments", "words"),
    [
        (torch.ones(2, 3), torch.ones(2, 4), {"rule": "grpo"}, "must both be"),
        (torch.ones(6), torch.ones(6), {"rule": "grpo"}, "must both be"),
        (torch.ones(2, 3), torch.full((2, 3), 0.5), {"rule": "grpo"}, "only 0 and 1"),
        (torch.ones(2, 3), torch.ones(2, 3), {"rule": "dr_grpo"}, "give max_length"),
        (torch.ones(2, 3), torch.zeros(2, 3), {"rule": "dr_grpo"}, "give max_length"),
        (torch.ones(2, 3), torch.ones(2, 3), {"rule": "nope"}, "unknown rule"),
        (torch.ones(2, 3), torch.ones(2, 3), {"rule": "grpo", "groups": [0]}, "label every response"),
    ],
)
def test_refuses(token_loss, mask, arguments, words):
    with pytest.raises(GradvarError, match=words):
        aggregate_loss(token_loss, mask, **arguments)
