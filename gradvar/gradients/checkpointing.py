"""Activation checkpointing above the lowest target: a layer's activations are made again at backward, not kept.

transformers checkpoints in training mode only and ignores the wish in eval mode, where the measurement runs; so the
decoder layers are wrapped here. A layer whose input carries no graph (the lowest target's own, and all below) runs as
it is. Dropout is off, so both runs of a layer are the same and no random state is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from gradvar.errors import GradvarError
from gradvar.gradients.devices import is_offloaded
from gradvar.gradients.targets import decoder_layers
from gradvar.runs.config import CHECKPOINTING


def choose_checkpointing(model: nn.Module, wish: str | None) -> str:
    """Return "off", "reentrant" or "non_reentrant"; without a wish what was switched on in the model is honoured.

    Raises:
        GradvarError: A wish that is none of the three.
    """
    if wish is None:
        # transformers 5.20 renamed it, and warns of the old name
        renamed = hasattr(model, "is_activation_checkpointing")
        on = getattr(model, "is_activation_checkpointing" if renamed else "is_gradient_checkpointing", False)
        return "non_reentrant" if on else "off"
    if wish not in CHECKPOINTING:
        raise GradvarError(f"checkpointing: expected one of {', '.join(CHECKPOINTING)}, received {wish!r}")
    return wish


@contextmanager
def checkpointed(model: nn.Module, kind: str) -> Iterator[None]:
    """Checkpoint every decoder layer whose input carries a graph; the layers are as before on leaving."""
    if kind == "off":
        yield
        return
    layers = list(dict.fromkeys(layer for _, layer in decoder_layers(model)))
    before = [(layer, layer.__dict__.get("forward")) for layer in layers]
    try:
        for layer in layers:
            offloaded = any(is_offloaded(module) for module in layer.modules())
            layer.forward = _wrapped(layer.forward, kind == "reentrant", offloaded)
        yield
    finally:
        for layer, own in before:
            if own is not None:
                layer.forward = own
            else:
                layer.__dict__.pop("forward", None)


def _wrapped(own: Callable[..., Any], reentrant: bool, offloaded: bool) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        flat = [*args, *kwargs.values()]  # the reentrant kind sees positional tensors only
        inside = any(_carries_graph(value) for value in flat if not isinstance(value, Tensor))
        if not torch.is_grad_enabled() or not (inside or any(_carries_graph(value) for value in flat)):
            return own(*args, **kwargs)
        if inside and reentrant:
            raise GradvarError(
                "reentrant checkpointing loses the gradient of tensors that this model hands its layers in tuples: "
                "choose non_reentrant"
            )

        def run(*values: Any) -> Any:
            return own(*values[: len(args)], **dict(zip(kwargs, values[len(args) :], strict=True)))

        # a layer left midway would keep the weights that were brought for it
        with set_checkpoint_early_stop(not offloaded):
            return checkpoint(run, *flat, use_reentrant=reentrant, preserve_rng_state=False)

    return forward


def _carries_graph(value: object) -> bool:
    if isinstance(value, Tensor):
        return value.requires_grad
    if isinstance(value, (tuple, list)):
        return any(_carries_graph(item) for item in value)
    if isinstance(value, dict):
        return any(_carries_graph(item) for item in value.values())
    return False
