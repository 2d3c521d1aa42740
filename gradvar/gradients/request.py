"""What is refused before anything is computed: requests that do not fit the model, weights used in two places."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gradvar.errors import GradvarError
from gradvar.gradients.batches import Batch, Probe, last_hidden, make_batches
from gradvar.gradients.devices import input_device, is_offloaded, values
from gradvar.gradients.logprobs import Head
from gradvar.gradients.positions import position_limit
from gradvar.gradients.targets import Target, output_embeddings

_REACH_SHARE = 1 / 8
"""Part of what another token moves that is taken for rounding in half precision."""

_NEAR = 2
"""Tokens before another one that are looked at by themselves."""


def check_request(
    model: nn.Module,
    prompt: Sequence[int],
    responses: Sequence[Sequence[int]],
    masks: Sequence[Sequence[int] | None] | None,
    temperature: float,
    ids: tuple[int, ...],
) -> list[list[int]]:
    """Check everything about the request that needs no computation; return the masks, all written out."""
    _check_model(model)
    if not responses:
        raise GradvarError("no responses were given: expected at least one")
    if not len(prompt):
        raise GradvarError("the prompt is empty: expected at least one token before the response")
    if not (math.isfinite(temperature) and temperature > 0):
        raise GradvarError(f"temperature: expected a positive number, received {temperature}")
    if len(ids) != len(responses) or len(set(ids)) < len(ids):
        raise GradvarError(f"rollout ids: expected {len(responses)} different ones, received {len(ids)}")
    if masks is not None and len(masks) != len(responses):
        raise GradvarError(f"loss masks: expected one for each of {len(responses)} responses, received {len(masks)}")
    vocabulary = int(model.get_input_embeddings().num_embeddings)  # type: ignore[operator]
    _check_ids(prompt, vocabulary, "the prompt")
    limit = position_limit(model)
    head = output_embeddings(model)
    predicted = min(vocabulary, int(getattr(head, "out_features", vocabulary)))
    written: list[list[int]] = []
    for i, response in zip(ids, responses, strict=True):
        if not len(response):
            raise GradvarError(f"response {i} is empty: expected at least one token")
        _check_ids(response, vocabulary, f"response {i}")
        _check_ids(response, predicted, f"response {i}", "output embedding")
        if limit is not None and len(prompt) + len(response) - 1 > limit:
            raise GradvarError(
                f"response {i} with its prompt feeds {len(prompt) + len(response) - 1} tokens: the model has {limit} "
                "positions; leave it out or use a model with a longer context"
            )
        mask = masks[len(written)] if masks is not None else None
        if mask is not None and len(mask) != len(response):
            raise GradvarError(f"response {i}: its loss mask has {len(mask)} entries for {len(response)} tokens")
        if mask is not None and not all(m in (0, 1) for m in mask):
            raise GradvarError(f"response {i}: its loss mask may hold only 0 and 1")
        values = [1] * len(response) if mask is None else [int(m) for m in mask]
        if not any(values):
            raise GradvarError(f"response {i}: its loss mask is 0 everywhere, so no token carries loss")
        written.append(values)
    return written


def whole_numbers(ids: Sequence[int], what: str) -> list[int]:
    """Return token ids as a list of int, whatever sequence (array, tensor) they came in.

    Raises:
        GradvarError: One is no whole number.
    """
    try:
        return [operator.index(x) for x in ids]
    except TypeError:
        raise GradvarError(f"{what}: expected token ids, whole numbers, received {str(ids)[:60]}") from None


def _check_ids(ids: Sequence[int], vocabulary: int, what: str, holder: str = "vocabulary") -> None:
    wrong = next((x for x in ids if not 0 <= x < vocabulary), None)
    if wrong is not None:
        raise GradvarError(
            f"{what} holds token id {wrong}: the model's {holder} has ids 0 to {vocabulary - 1}; was it made by "
            "another tokenizer?"
        )


def _check_model(model: nn.Module) -> None:
    if hasattr(model, "_orig_mod") or any(_hides_hooks(module) for module in model.modules()):
        raise GradvarError("the model is compiled, so hooks may not fire: pass the uncompiled one (model._orig_mod)")
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_input_embeddings") or model.get_input_embeddings() is None:  # type: ignore[operator]
        raise GradvarError(f"expected a transformers causal language model, received {type(model).__name__}")
    if getattr(config, "return_dict", True) is False:
        raise GradvarError("the model gives tuples, without names: set model.config.return_dict = True")
    text = config.get_text_config()
    cap = getattr(text, "attn_logit_softcapping", None)
    if cap is not None and getattr(config, "_attn_implementation", None) == "sdpa":
        raise GradvarError(
            f"sdpa attention leaves out the soft cap of this model's attention (attn_logit_softcapping={cap:g}): load "
            'it with attn_implementation="eager"'
        )
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise GradvarError("the model was loaded under torch.inference_mode, so it has no gradients: load it outside")
    if getattr(config, "is_encoder_decoder", False):
        raise GradvarError(f"{type(model).__name__} is an encoder-decoder: expected a causal language model")


def _hides_hooks(module: nn.Module) -> bool:
    """Return whether a compiled module holds what hooks are put on; norms and activations hold nothing."""
    hooked = next(module.children(), None) is not None or isinstance(module, (nn.Linear, Conv1D, nn.Embedding))
    return module._compiled_call_impl is not None and hooked


def check_sharing(
    model: nn.Module, targets: Sequence[Target], head: Head, include_bias: bool = True
) -> tuple[str | None, float]:
    """Return the path and scale of the input embedding where the chosen head shares its weight; refuse other sharing.

    Raises:
        GradvarError: A target's weight is used elsewhere too, where its part of the gradient is not captured.
    """
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for parameter in (module._parameters.get("weight"), module._parameters.get("bias")):
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(path)
    tied: tuple[str | None, float] = (None, 1.0)
    for target in targets:
        module = model.get_submodule(target.module)
        if target.direct is not None:  # autograd adds up every use of the parameter
            if is_offloaded(module):
                raise GradvarError(
                    f"{target.key} is offloaded, so autograd's gradient of it is lost: choose other targets, or keep "
                    f"{target.module} on a device"
                )
            continue
        others = [path for path in owners[id(module._parameters["weight"])] if path != target.module]
        shift = module._parameters.get("bias") if include_bias else None
        shared = [path for path in owners[id(shift)] if path != target.module] if shift is not None else []
        if shared:
            raise GradvarError(
                f"{target.key} shares its bias with {', '.join(shared)}, whose part of the gradient cannot be "
                "separated: choose other targets, or leave biases out"
            )
        embedding = model.get_input_embeddings()  # type: ignore[operator]
        if module is head.module and is_offloaded(module) and model.config.get_text_config().tie_word_embeddings:  # type: ignore[operator, union-attr]
            others = [path for path, other in model.named_modules() if other is embedding]  # no longer one tensor
        if module is head.module and len(others) == 1:
            scale = _embedding_scale(model.get_submodule(others[0]))
            if scale is not None:
                tied = (others[0], scale)
                continue
        if others:
            raise GradvarError(
                f"{target.key} shares its weight with {', '.join(others)}, whose part of the gradient cannot be "
                "separated: choose other targets"
            )
        if isinstance(module, Conv1D) and module is head.module:
            raise GradvarError(f"{target.key}: an output embedding that is a Conv1D is not measured")
    return tied


def _embedding_scale(module: nn.Module) -> float | None:
    """Return s where the module's output is s W[ids] (Gemma scales its embedding), None where it is anything else."""
    if not isinstance(module, nn.Embedding) or module.max_norm is not None or module.scale_grad_by_freq:
        return None
    with torch.no_grad(), values(module):
        ids = module.weight.any(1).nonzero()[:8, 0]  # what is 0, as padding is, tells nothing
        rows, output = module.weight[ids].double(), module(ids).double()
        scale = float((rows * output).sum() / (rows * rows).sum().clamp_min(torch.finfo(torch.float64).tiny))
        gap = float((output - scale * rows).abs().max())
        if gap > 8 * torch.finfo(module.weight.dtype).eps * float(output.abs().max()):
            return None
    return scale


def undisturbed(base: nn.Module, ids: list[int], states: Tensor, side: str) -> Probe | None:
    """Return a padded batch where the padded row's states are those that it has alone before one token more.

    Then the model is causal and takes padding. None says nothing: `check_causal` and `check_padding` tell which it is
    not.

    Args:
        base: The inner model.
        ids: Some token ids, of which the last is no padding.
        states: (1, T, D) their last hidden states.
        side: Where padding goes.
    """
    half = len(ids) // 2
    if side not in ("right", "left") or half < 2 or ids[-1] == 0:
        return None
    long = [*ids[:half], *ids[:2]]  # what is fed: the first half and all of these but the last
    with torch.no_grad():
        (batch,) = make_batches(ids[:half], [ids[half:], long], 10_000, input_device(base), side)
        hidden = last_hidden(base, batch)
        row = batch.members.index(0)
        beside = hidden[row, batch.firsts[row] :][: len(ids) - 1].double()
        alone = states[0, :-1].double()
        reach = alone[:0]
        if is_half(base):
            other = torch.tensor([[int(ids[0] == 0), *ids[1:]]], device=input_device(base))
            reach = base(input_ids=other, use_cache=False).last_hidden_state[0, 1:-1].double() - alone[1:]
    finite = bool(alone.isfinite().all()) and bool(hidden.isfinite().all())
    # what sees a token or two ahead shows in the last ones alone, and would be lost among all in half precision
    parts = [(beside, alone), (beside[-_NEAR:], alone[-_NEAR:])]
    if not finite or not all(same_states(*part, reach, base) for part in parts):
        return None
    return Probe(prompt=tuple(ids[:half]), batch=batch, hidden=hidden)


def check_causal(base: nn.Module, probe: list[int]) -> None:
    """Refuse a model whose states at a token depend on later ones: an encoder, or a decoder not told that it is one.

    Raises:
        GradvarError: Another last token changes the states before it.
    """
    first, second, word = (probe * 3)[:3]
    endings = [[word, 0], [int(word == 0), 0]]  # the last token of a response is not fed
    device = input_device(base)
    with torch.no_grad():
        (batch,) = make_batches([first, second], endings, 10_000, device)
        states = last_hidden(base, batch)[:, :2].double()
        moved = last_hidden(base, other_start(batch))[0, 1].double() if is_half(base) else states[0, 1]
    if bool(states.isfinite().all()) and not same_states(states[0], states[1], moved - states[0, 1], base):
        raise GradvarError(
            f"{type(base).__name__} is not causal: its states at a token depend on later tokens, so it gives no "
            "log-probability of a response; expected a causal language model (is_decoder=True in the configuration?)"
        )


def check_padding(base: nn.Module, probe: list[int], side: str) -> bool:
    """Return whether responses may share a batch: whether a response's states are the same padded beside another.

    Raises:
        GradvarError: Another side than "right" or "left", or the model's states depend on padding on the left: it
            counts positions from the first column.
    """
    if side not in ("right", "left"):
        raise GradvarError(f'padding side: expected "right" or "left", received {side!r}')
    if not probe:
        return True
    device = input_device(base)
    short, long = probe[-1:] * 4, [int(probe[-1] == 0)] * 6  # what is fed: the probe and all of these but the last
    with torch.no_grad():
        (batch,) = make_batches(probe, [short, long], 10_000, device, side)
        (alone,) = make_batches(probe, [short], 10_000, device, side)
        row = batch.members.index(0)
        still = last_hidden(base, alone)[0, len(probe) :].double()
        start = batch.firsts[row] + len(probe)
        beside = last_hidden(base, batch)[row, start : start + len(still)].double()
        moved = last_hidden(base, other_start(alone))[0, len(probe) :].double() if is_half(base) else still
    if same_states(beside, still, moved - still, base) or not bool(still.isfinite().all()):
        return True
    if side == "left":
        raise GradvarError("padding on the left changes this model's hidden states: pad on the right")
    return False


def other_start(batch: Batch) -> Batch:
    """Return the batch with another token in its first row's first real column."""
    ids = batch.input_ids.clone()
    ids[0, batch.firsts[0]] = int(ids[0, batch.firsts[0]] == 0)
    return replace(batch, input_ids=ids)


def same_states(states: Tensor, others: Tensor, reach: Tensor, base: nn.Module) -> bool:
    """Return whether states agree to some roundings, of float32 at best: some models compute in it always.

    Roundings of half precision add up to as much as what is looked for; there the states must agree to a small part of
    how far another token before them moves them.

    Args:
        states: (K, D) float64.
        others: (K, D) float64, the same states had in another way.
        reach: (K', D) what another token moved; looked at in half precision alone.
        base: The model they come from.
    """
    epsilon = max(torch.finfo(_floating(base)).eps, torch.finfo(torch.float32).eps)
    gap = (states - others).abs()
    if is_half(base):
        return _rms(gap) <= max(_REACH_SHARE * _rms(reach), epsilon / 8 * _rms(others))
    return bool((gap <= 64 * epsilon * others.abs().amax()).all())


def is_half(base: nn.Module) -> bool:
    """Return whether the model's weights are in half precision, where roundings are as large as what is looked for."""
    return torch.finfo(_floating(base)).bits < 32


def _floating(base: nn.Module) -> torch.dtype:
    return next(p.dtype for p in base.parameters() if p.is_floating_point())


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())
