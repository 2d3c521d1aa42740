"""The literal definition, slow and in float64: one response at a time, plain autograd over the model's own logits.

Shares no code with the engine.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray


def token_log_probs(model, prompt, response, temperature=1.0):
    """(L,) log pi of each response token, with its graph."""
    ids = torch.tensor([list(prompt) + list(response)])
    logits = model(input_ids=ids, use_cache=False).logits[0].to(torch.float64)
    log_pi = torch.log_softmax(logits / temperature, dim=-1)
    first = len(prompt) - 1
    return torch.stack([log_pi[first + t, token] for t, token in enumerate(response)])


def full_distribution(model, prompt, response, temperature=1.0):
    """(L, V) probabilities each response token was drawn from."""
    ids = torch.tensor([list(prompt) + list(response)])
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0].double()
    first = len(prompt) - 1
    return torch.softmax(logits / temperature, dim=-1)[first : first + len(response)].numpy()


def score_gradients(
    model, prompt, responses: Sequence[Sequence[int]], names: Sequence[str], *, masks=None, temperature=1.0
) -> dict[str, list[torch.Tensor]]:
    """Per parameter name, the gradient of sum_t m_t log pi(o_t) for each response."""
    named = dict(model.named_parameters(remove_duplicate=False))
    parameters = [named[name] for name in names]
    before = [(p, p.requires_grad) for p in model.parameters()]
    model.eval()
    for p, _ in before:
        p.requires_grad_(False)
    for p in parameters:
        p.requires_grad_(True)
    found: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    for i, response in enumerate(responses):
        mask = torch.ones(len(response)) if masks is None or masks[i] is None else torch.tensor(masks[i])
        total = (token_log_probs(model, prompt, response, temperature) * mask.double()).sum()
        for name, gradient in zip(names, torch.autograd.grad(total, parameters), strict=True):
            found[name].append(gradient.detach().double().clone())
    for p, was in before:
        p.requires_grad_(was)
    return found


def gram_of(gradients: Sequence[torch.Tensor]) -> NDArray[np.float64]:
    """(N, N) inner products, one by one."""
    n = len(gradients)
    gram = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            gram[i, j] = float((gradients[i] * gradients[j]).sum())
    return gram


def target_gram(model, target, prompt, responses, *, include_bias=True, masks=None, temperature=1.0):
    """The literal Gram of one target: its module's weight (and bias), cut to its rows."""
    names = [f"{target.module}.weight"] + ([f"{target.module}.bias"] if include_bias and target.has_bias else [])
    gradients = score_gradients(model, prompt, responses, names, masks=masks, temperature=temperature)
    conv = type(model.get_submodule(target.module)).__name__ == "Conv1D"
    start, stop = target.rows or (0, target.out_features)
    pieces = [(g.T if conv else g)[start:stop] for g in gradients[names[0]]]
    gram = gram_of(pieces)
    if len(names) == 2:
        gram = gram + gram_of([g[start:stop] for g in gradients[names[1]]])
    return gram
