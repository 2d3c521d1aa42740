"""The user's model is borrowed: what the measurement changes in it is put back, whatever happens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Self

import torch
from torch import nn


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Put every parameter out of the graph and every module in eval mode (no dropout); restore both on leaving.

    A graph that a hook begins at the input embedding (transformers' `enable_input_require_grads`, which comes with
    checkpointing and adapters) is cut there too: backward would run through every layer for nothing.
    """
    training = [(module, module.training) for module in model.modules()]
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None  # type: ignore[operator]
    hook = None
    try:
        if embedding is not None:
            hook = embedding.register_forward_hook(lambda module, args, output: output.detach())
        for module, _ in training:
            module.training = False
        for parameter, _ in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        if hook is not None:
            hook.remove()
        for module, was in training:
            module.training = was
        for parameter, was in trainable:
            parameter.requires_grad_(was)


@dataclass(frozen=True, kw_only=True)
class Autocast:
    """The autocast that the caller measures under; it is for the model's own code, never for the Gram's sums."""

    device: str
    dtype: torch.dtype | None
    """None where autocast is off."""

    @classmethod
    def current(cls, device: torch.device) -> Self:
        """Return the state in force."""
        on = torch.is_autocast_enabled(device.type)
        return cls(device=device.type, dtype=torch.get_autocast_dtype(device.type) if on else None)

    def on(self) -> AbstractContextManager[object]:
        """Return a context for the model's own code."""
        return nullcontext() if self.dtype is None else torch.autocast(self.device, dtype=self.dtype)

    def off(self) -> AbstractContextManager[object]:
        """Return a context for the measurement's own sums."""
        return nullcontext() if self.dtype is None else torch.autocast(self.device, enabled=False)


@contextmanager
def full_precision() -> Iterator[None]:
    """Make float32 products be float32 products (no TF32, no bfloat16 splitting), as set before on leaving."""
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        yield
    finally:
        torch.set_float32_matmul_precision(before)
