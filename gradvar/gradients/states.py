"""The user's model is borrowed: what the measurement changes in it is put back, whatever happens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Put every parameter out of the graph and every module in eval mode (no dropout); restore both on leaving.

    A graph that a hook begins at the input embedding (transformers' `enable_input_require_grads`, which comes with
    checkpointing and adapters) is cut there too: backward would run through every layer for nothing. It is left to run
    where the embedding's own gradient is asked for.
    """
    training = [(module, module.training) for module in model.modules()]
    # by module and name: where weights are offloaded every call puts other tensors in their place
    trainable = [
        (module, name, parameter.requires_grad)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
    ]
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None  # type: ignore[operator]
    hook = None
    try:
        if embedding is not None:
            hook = embedding.register_forward_hook(_cut)
        for module, _ in training:
            module.training = False
        for owner, name, _ in trainable:
            _parameter(owner, name).requires_grad_(False)
        yield
    finally:
        if hook is not None:
            hook.remove()
        try:
            _restore(training, trainable)
        except KeyboardInterrupt:  # Ctrl-C in the midst of it
            _restore(training, trainable)
            raise


def _cut(module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
    """Cut what begins at the output itself: a graph that a measured module began before is to be kept."""
    trained = any(parameter.requires_grad for parameter in module.parameters())
    return output if trained or not output.is_leaf else output.detach()


def _restore(training: list[tuple[nn.Module, bool]], trainable: list[tuple[nn.Module, str, bool]]) -> None:
    for module, was in training:
        module.training = was
    for owner, name, was in trainable:
        _parameter(owner, name).requires_grad_(was)


def _parameter(module: nn.Module, name: str) -> nn.Parameter:
    parameter = module._parameters[name]
    if parameter is None:
        raise RuntimeError(f"{type(module).__name__}.{name} was taken away in the midst of a measurement")
    return parameter


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


_HALVES = (
    "allow_bf16_reduced_precision_reduction",
    "allow_fp16_reduced_precision_reduction",
    "allow_fp16_accumulation",
)


@contextmanager
def full_precision() -> Iterator[None]:
    """Make products as precise as their dtype allows, and keep off what has given NaN; as before on leaving.

    float32 products are float32 products (no TF32, no bfloat16 splitting), half precision is summed in float32, and
    attention does not run in cuDNN, whose backward has given NaN with a mask (TRL issue 7181).
    """
    matmul = torch.backends.cuda.matmul
    before = {name: getattr(matmul, name) for name in _HALVES if hasattr(matmul, name)}
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    try:
        with _float32_products():
            for name in before:
                setattr(matmul, name, _with_split(name, False))
            torch.backends.cuda.enable_cudnn_sdp(False)
            yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        for name, was in before.items():
            setattr(matmul, name, _with_split(name, was))


def _with_split(name: str, value: bool) -> bool | tuple[bool, bool]:
    """Return the setting as torch takes it: without its second part torch switches split-K sums on again."""
    split = getattr(torch.backends.cuda.matmul, f"{name}_split_k", None)  # newer than torch 2.9
    return value if split is None else (value, split)


@contextmanager
def _float32_products() -> Iterator[None]:
    """Keep TF32 and bfloat16 out of float32 products, under torch's older name of the setting and its newer ones."""
    cudnn = torch.backends.cudnn  # convolutions: state-space models have them
    holders: list[Any] = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    holders += [getattr(cudnn, name, None) for name in ("conv", "rnn")]
    newer: list[tuple[Any, str]] = [(one, one.fp32_precision) for one in holders if hasattr(one, "fp32_precision")]
    convolutions = None if hasattr(getattr(cudnn, "conv", None), "fp32_precision") else cudnn.allow_tf32
    older = None
    with suppress(RuntimeError):  # torch does not tell it by the older name once it was set by a newer one
        older = torch.get_float32_matmul_precision()
    try:
        if older is not None:
            torch.set_float32_matmul_precision("highest")
        for one, _ in newer:
            one.fp32_precision = "ieee"
        if convolutions is not None:
            cudnn.allow_tf32 = False
        yield
    finally:
        if convolutions is not None:
            cudnn.allow_tf32 = convolutions
        if older is not None:
            torch.set_float32_matmul_precision(older)
        for one, was in newer:  # the older name sets these too
            one.fp32_precision = was
