"""The literal definition, slow and in float64: one response at a time, plain autograd over the model's own logits.

Shares no code with the engine.
"""

from __future__ import annotations

import numpy as np
import torch


def token_log_probs(model, prompt, response, temperature=1.0):
    """(L,) log pi of each response token, with its graph."""
    ids = torch.tensor([list(prompt) + list(response)], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0].to(torch.float64)
    log_pi = torch.log_softmax(logits / temperature, dim=-1)
    first = len(prompt) - 1
    return torch.stack([log_pi[first + t, token] for t, token in enumerate(response)])


def distributions(model, prompt, response, temperature=1.0):
    """(L, V) probabilities each response token was drawn from."""
    ids = torch.tensor([list(prompt) + list(response)])
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0].double()
    first = len(prompt) - 1
    return torch.softmax(logits / temperature, dim=-1)[first : first + len(response)].numpy()


def score_gradients(model, prompt, responses, names, *, masks=None, temperature=1.0):
    """Per parameter name, the gradient of sum_t m_t log pi(o_t) for each response."""
    named = dict(model.named_parameters(remove_duplicate=False))
    parameters = [named[name] for name in names]
    before = [(p, p.requires_grad) for p in model.parameters()]
    training = model.training
    model.eval()
    for p, _ in before:
        p.requires_grad_(False)
    for p in parameters:
        p.requires_grad_(True)
    found = {name: [] for name in names}
    for i, response in enumerate(responses):
        mask = torch.ones(len(response)) if masks is None or masks[i] is None else torch.tensor(masks[i])
        log_probs = token_log_probs(model, prompt, response, temperature)
        total = (log_probs * mask.double().to(log_probs.device)).sum()
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
        for name, parameter, gradient in zip(names, parameters, gradients, strict=True):
            assert gradient is not None or ".experts." in name, f"{name} is not used"
            gradient = torch.zeros_like(parameter) if gradient is None else gradient
            found[name].append(gradient.detach().cpu().double().clone())
    for p, was in before:
        p.requires_grad_(was)
    model.train(training)
    return found


def flat_scores(model, targets, prompt, responses, *, include_bias=True, masks=None, temperature=1.0):
    """Per target key, the (N, P) float64 scores over its parameters: weight rows, then bias rows."""
    names = [name for target in targets for name in parameter_names(model, target, include_bias) if name]
    names = list(dict.fromkeys(names))
    gradients = score_gradients(model, prompt, responses, names, masks=masks, temperature=temperature)
    scores = {}
    for target in targets:
        weight_name, bias_name = parameter_names(model, target, include_bias)
        holder = model.get_submodule(target.module)
        transposed = type(holder).__name__ == "Conv1D" or getattr(holder, "is_transposed", False)
        flat = []
        for i in range(len(responses)):
            weight = gradients[weight_name][i]
            weight = weight.transpose(-1, -2) if transposed else weight
            weight = weight.reshape(-1, weight.shape[-1])  # experts one above the other
            rows = slice(*target.rows) if target.rows else slice(None)
            parts = [weight[rows].flatten()]
            if bias_name:
                parts.append(gradients[bias_name][i].flatten()[rows])
            flat.append(torch.cat(parts).numpy())
        scores[target.key] = np.stack(flat)
    return scores


def parameter_names(model, target, include_bias=True):
    """Full names of a target's weight and bias; the bias None where it has none or it does not count."""
    named = dict(model.named_parameters(remove_duplicate=False))
    weight = target.key.partition(":")[0]
    fused = weight in named  # an expert tensor is a parameter by itself, any other key a module
    weight, bias = (weight, f"{weight}_bias") if fused else (f"{weight}.weight", f"{weight}.bias")
    assert (bias in named) == target.has_bias
    return weight, bias if include_bias and target.has_bias else None


def gram_of(scores):
    """(N, N) inner products, one by one."""
    return np.array([[float(np.dot(x, y)) for y in scores] for x in scores])


def error(gram, reference):
    """Largest error of an entry relative to ||s_i|| ||s_j||; rows that are zero in theory are measured against all."""
    norms = np.sqrt(np.diag(reference))
    norms = np.maximum(norms, max(1e-12 * norms.max(), 1e-150))
    return float((np.abs(gram - reference) / np.outer(norms, norms)).max())


def token_squared_norms(model, targets, prompt, response, *, include_bias=True, mask=None, temperature=1.0):
    """Per target key, (L,) ||grad log pi_t||^2: one backward pass for each token; 0 where the mask is 0."""
    found = {target.key: np.zeros(len(response)) for target in targets}
    for t in range(len(response)):
        if mask is not None and not mask[t]:
            continue
        alone = [float(u == t) for u in range(len(response))]
        options = {"masks": [alone], "include_bias": include_bias, "temperature": temperature}
        for key, flat in flat_scores(model, targets, prompt, [response], **options).items():
            found[key][t] = float(np.dot(flat[0], flat[0]))
    return found
