"""Where a module runs and where its weights are, for models that accelerate spreads over devices or offloads.

accelerate hangs a hook on a module that brings its inputs, and where they are offloaded its weights, to the device it
runs on; in between, offloaded weights are on the meta device, without values.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from gradvar.errors import GradvarError


def _hook(module: nn.Module) -> Any:
    """Return accelerate's hook that moves inputs and weights, None where there is none."""
    hook = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", (hook,))
    return next((one for one in hooks if getattr(one, "execution_device", None) is not None), None)


def execution_device(module: nn.Module) -> torch.device:
    """Return the device that a module runs on: its hook's, or that of its first weight, or of its first submodule.

    Raises:
        GradvarError: Its weights have no values.
    """
    for part in module.modules():
        hook = _hook(part)
        if hook is not None:
            return torch.device(hook.execution_device)
        for parameter in part.parameters(recurse=False):
            if not parameter.is_meta:
                return parameter.device
    raise GradvarError(f"{type(module).__name__} has weights on the meta device (no values): load its weights first")


def devices_of(model: nn.Module) -> set[torch.device]:
    """Return every device that a part of the model runs on."""
    parts = (module for module in model.modules() if next(module.parameters(recurse=False), None) is not None)
    return {execution_device(module) for module in parts} or {input_device(model)}


def input_device(model: nn.Module) -> torch.device:
    """Return the device that token ids go to."""
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None  # type: ignore[operator]
    return execution_device(embedding if embedding is not None else model)


def is_offloaded(module: nn.Module) -> bool:
    """Return whether the module's own weights are brought by a hook when it runs."""
    return bool(getattr(_hook(module), "offload", False))


def placed(numbers: Any, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return a tensor of numbers on a device; a GPU is not waited for."""
    return moved(torch.tensor(numbers, dtype=dtype), device)


def moved(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor of the host on a device; a GPU is not waited for."""
    return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value.to(device)


@contextmanager
def values(module: nn.Module) -> Iterator[None]:
    """Hold a module's own weights on the device it runs on, where they are offloaded."""
    hook = _hook(module) if is_offloaded(module) else None
    if hook is None:
        yield
        return
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)
