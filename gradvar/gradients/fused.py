"""How the rows of a fused projection are laid out, found by probing the model with two tokens.

The output at the first position attends to itself alone, so among the first token's fused rows only v matters to it;
to the output at the second position, k and v of the first token matter and q does not. Zero and non-zero gradients
thus tell q, k and v apart whatever the model is. In a gated MLP the output is linear in the up rows, so their gradient
does not change when they do. Where the rows of a role are not contiguous the matrix stays one target.

What the fused matrix gives is replaced by numbers of size 1, so that the answer does not hang on its weights, and
attention runs in plain steps: fused kernels leave roundings where the gradient is 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.hooks import RemovableHandle

from gradvar.gradients.devices import execution_device, input_device
from gradvar.gradients.states import frozen

Blocks = tuple[tuple[str, int, int], ...]
"""(role, first row, last row + 1) of each block; empty where the layout is not contiguous."""
_DRAWS = 4
"""Probes of an attention projection: an entry that counts may be near 0 in one of them."""


class _ProbeDoneError(Exception):
    """Raised inside a forward pass to leave it once the probed layer has answered."""


def split_qkv(model: nn.Module, layer: nn.Module, fused: nn.Module) -> Blocks:
    """Return the q, k and v row blocks of a fused attention projection of a decoder layer.

    Args:
        model: The causal language model.
        layer: One of its decoder layers.
        fused: The fused Linear or Conv1D inside the layer.
    """
    first, second = (
        torch.stack(masks).any(0)
        for masks in zip(*(_reach(model, layer, fused, draw) for draw in range(_DRAWS)), strict=True)
    )
    value = first[0]
    key = second[0] & ~value
    query = second[1] & ~second[0]
    blocks = [("q", query), ("k", key), ("v", value)]
    total = sum(int(mask.sum()) for _, mask in blocks)
    if total != value.numel() or int(key.sum()) != int(value.sum()) or int(query.sum()) % max(int(key.sum()), 1):
        return ()
    return _contiguous(blocks)


def _reach(model: nn.Module, layer: nn.Module, fused: nn.Module, draw: int) -> list[Tensor]:
    """Return which fused rows (2 tokens, O) move the layer's output at the first position, and at the second."""
    outputs: dict[str, Tensor] = {}

    def at_fused(module: nn.Module, args: object, output: Tensor) -> Tensor:
        outputs["fused"] = _spread(output, draw).requires_grad_()
        return outputs["fused"].clone()

    def at_layer(module: nn.Module, args: object, output: object) -> None:
        outputs["layer"] = output[0] if isinstance(output, (tuple, list)) else output  # type: ignore[assignment]
        raise _ProbeDoneError

    hooks: list[RemovableHandle] = [fused.register_forward_hook(at_fused), layer.register_forward_hook(at_layer)]
    device = input_device(model)
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    ids = torch.tensor([[1 % vocabulary, 2 % vocabulary]], device=device)
    try:
        with frozen(model), torch.enable_grad(), _plain_attention(model):
            with suppress(_ProbeDoneError):
                model(input_ids=ids, use_cache=False)
            direction = _direction(outputs["layer"].shape[-1], outputs["layer"])
            answers = [outputs["layer"][0, position] @ direction for position in (0, 1)]
            return [_moves(torch.autograd.grad(x, outputs["fused"], retain_graph=True)[0][0]) for x in answers]
    finally:
        for hook in hooks:
            hook.remove()


def split_gate_up(mlp: nn.Module, fused: nn.Module, in_features: int) -> Blocks:
    """Return the gate and up row blocks of a fused gated MLP.

    Args:
        mlp: The module that takes hidden states and holds the fused projection.
        fused: The fused Linear inside it.
        in_features: Width of the hidden states.
    """
    weight = next(fused.parameters())
    rows = int(weight.shape[0] if isinstance(fused, nn.Linear) else weight.shape[1])
    if rows % 2:
        return ()
    half = rows // 2
    like = torch.empty(0, dtype=weight.dtype, device=execution_device(fused))
    hidden = _direction(2 * in_features, like).reshape(1, 2, in_features)

    def gradient(shift: Tensor | None) -> Tensor:
        seen: list[Tensor] = []

        def at_fused(module: nn.Module, args: object, output: Tensor) -> Tensor:
            leaf = (output.detach() if shift is None else output.detach() + shift).requires_grad_()
            seen.append(leaf)
            return leaf.clone()

        hook = fused.register_forward_hook(at_fused)
        try:
            with frozen(mlp), torch.enable_grad():
                output = mlp(hidden)
                output = output[0] if isinstance(output, tuple) else output
                flat = output.flatten()
                return torch.autograd.grad(flat @ _direction(flat.numel(), flat), seen[0])[0].reshape(-1, rows)
        finally:
            hook.remove()

    try:
        base = gradient(None)
        blocks: dict[int, tuple[bool, bool]] = {}
        for i in (0, 1):
            shift = torch.zeros(rows, dtype=weight.dtype, device=execution_device(fused))
            shift[i * half : (i + 1) * half] = 0.5
            moved = _moves(gradient(shift) - base, base)
            blocks[i] = (bool(moved[:, i * half : (i + 1) * half].any()), bool(moved.any()))
    except (TypeError, RuntimeError, ValueError):  # the MLP needs more than hidden states: it stays one target
        return ()
    # moving the up rows leaves their own gradient as it was and changes the gate's; moving the gate rows changes both
    if blocks[0] == (True, True) and blocks[1] == (False, True):
        return (("gate", 0, half), ("up", half, rows))
    if blocks[1] == (True, True) and blocks[0] == (False, True):
        return (("up", 0, half), ("gate", half, rows))
    return ()


@contextmanager
def _plain_attention(model: nn.Module) -> Iterator[None]:
    """Run attention in plain steps: sdpa's by its mathematical kernel, that of other libraries as eager."""
    config = getattr(model, "config", None)
    name = getattr(config, "_attn_implementation", "eager")
    if name not in ("eager", "sdpa", None):
        config._attn_implementation = "eager"  # type: ignore[union-attr]
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        if name not in ("eager", "sdpa", None):
            config._attn_implementation = name  # type: ignore[union-attr]


def _moves(gradient: Tensor, like: Tensor | None = None) -> Tensor:
    """Return where a gradient is more than rounding, measured against the largest entry (of `like`)."""
    epsilon = torch.finfo(gradient.dtype).eps
    # roundings of half precision are as large as entries that count; there plain steps leave true zeros
    roundings = 16 * epsilon if epsilon < torch.finfo(torch.float16).eps else epsilon**2
    return gradient.abs() > roundings * float((gradient if like is None else like).abs().amax())


def _spread(like: Tensor, draw: int) -> Tensor:
    """Return fixed numbers of either sign, none near 0, in the shape of `like`: heads then attend to both tokens."""
    generator = torch.Generator().manual_seed(draw)
    values = torch.rand(like.shape, generator=generator, dtype=torch.float64) - 0.5
    return (values + values.sign() * 0.5).to(device=like.device, dtype=like.dtype)


def _direction(size: int, like: Tensor) -> Tensor:
    """Return a fixed vector without zeros or symmetry, on the device and in the dtype of `like`."""
    steps = torch.arange(1, size + 1, dtype=torch.float64)
    return (torch.sin(steps * 1.7) + 1.3).to(device=like.device, dtype=like.dtype)


def _contiguous(blocks: list[tuple[str, Tensor]]) -> Blocks:
    found = []
    for name, mask in blocks:
        rows = mask.nonzero().flatten()
        start, stop = int(rows[0]), int(rows[-1]) + 1
        if stop - start != rows.numel():
            return ()
        found.append((name, start, stop))
    return tuple(sorted(found, key=lambda block: block[1]))
