"""Inputs and output gradients of chosen modules, without weight gradients.

The graph starts at the lowest tapped module: where its output needs no gradient, a detached copy that does takes its
place, so everything below runs without a graph and backward stops there. On each output a tensor hook hands the
gradient, with the input of the same call, to a sink. A module called twice hands over twice. Parameters that no Linear
holds (experts, routers) hand over the gradient that autograd accumulates for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gradvar.errors import GradvarError
from gradvar.gradients.devices import values
from gradvar.gradients.hooked import Hooked

Sink = Callable[[str, Tensor, Tensor], None]
"""(module path, input a of the call, gradient delta of its output); calls on one tensor hand over that tensor."""


class Taps(Hooked):
    """Forward hooks on modules for the length of a `with` block.

    Args:
        modules: Path to Linear or Conv1D module (or an Embedding, whose input is token ids).
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self._modules = modules
        self._checked: set[str] = set()
        self._fired: set[str] = set()
        self._sink: Sink | None = None

    def _put_on(self) -> None:
        for path, module in self._modules.items():
            self._hooks.append(module.register_forward_hook(self._hook(path), with_kwargs=True))

    def _take_off(self) -> None:
        super()._take_off()
        self._sink = None

    def listen(self, sink: Sink) -> None:
        """Start a batch: from here every call of a tapped module hands its factors to the sink at backward."""
        self._sink = sink
        self._fired.clear()

    def finish(self) -> None:
        """End a batch.

        Raises:
            GradvarError: A tapped module did not take part in the batch's log-probabilities.
        """
        self._sink = None
        silent = [path for path in self._modules if path not in self._fired]
        if silent:
            raise GradvarError(
                f"no gradient reached {', '.join(silent)}: the model did not use it for these responses, or its hooks "
                "cannot fire (a compiled model?); leave it out of the targets (`all` takes every matrix of a layer, "
                "attn,mlp those of its own attention and MLP) or pass the uncompiled model"
            )

    def _hook(self, path: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Tensor], Tensor | None]:
        def at_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            if self._sink is None or not torch.is_grad_enabled():
                return output
            value: Tensor = args[0] if args else next(iter(kwargs.values()))
            if not isinstance(output, Tensor):
                raise GradvarError(
                    f"{path} ({type(module).__name__}) gives a {type(output).__name__}, not x W' + b, so its gradient "
                    "cannot be measured: choose other targets"
                )
            version = value._version
            if path not in self._checked:
                with values(module):
                    _check_linear(path, module, value.detach().to(output.device), output.detach())
                self._checked.add(path)
            if not output.requires_grad:
                # the copy lets the model change its tensor in place, which it may not do to a leaf
                leaf = output.detach().requires_grad_()
                # its grad may be the very tensor that a sink keeps: another backward pass would add to it in place
                leaf.register_post_accumulate_grad_hook(_forget_gradient)  # type: ignore[no-untyped-call]
                output = leaf.clone()

            def at_backward(delta: Tensor) -> None:
                if self._sink is not None:
                    if value._version != version:
                        raise GradvarError(
                            f"{path}: the model changed this module's input in place after using it, so "
                            "its gradient is lost: leave it out of the targets"
                        )
                    self._fired.add(path)
                    self._sink(path, value, delta.detach())

            output.register_hook(at_backward)  # type: ignore[no-untyped-call]
            return output

        return at_forward


def _forget_gradient(leaf: Tensor) -> None:
    leaf.grad = None


def _check_linear(path: str, module: nn.Module, value: Tensor, output: Tensor) -> None:
    """Refuse a module whose output is not x W' + b: its weight's gradient would not be sum_t delta_t a_t'."""
    if isinstance(module, nn.Embedding) or not isinstance(module.weight, Tensor) or module.weight.is_meta:
        return
    if not _is_linear(module, value, output):
        raise GradvarError(
            f"{path} ({type(module).__name__}) does not compute x W' + b with its own weight (an adapter, a scale or "
            "another hook?), so its gradient cannot be measured: choose other targets"
        )


def _is_linear(module: nn.Module, value: Tensor, output: Tensor) -> bool:
    """Return whether the output is x W' + b, but for roundings, on the first two tokens."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    bias = module.bias
    matrix = (weight.T if isinstance(module, Conv1D) else weight).detach().double()
    if matrix.shape != (output.shape[-1], value.shape[-1]):
        return False  # a grouped projection
    rows = value.reshape(-1, value.shape[-1])[:2].double()
    seen = output.reshape(-1, output.shape[-1])[:2].double()
    shift = bias.detach().double() if isinstance(bias, Tensor) else torch.zeros(len(matrix), device=matrix.device)
    finite = seen.isfinite()
    gap = (seen - rows @ matrix.T - shift).abs()
    kinds = [output.dtype, weight.dtype]
    if torch.is_autocast_enabled(output.device.type):  # FalconLinear adds a float32 bias to a bfloat16 product
        kinds.append(torch.get_autocast_dtype(output.device.type))
    epsilon = max(torch.finfo(kind).eps for kind in kinds)
    if epsilon < torch.finfo(torch.float16).eps:
        scale = rows.abs() @ matrix.abs().T + shift.abs()
        return not bool((gap > 32 * epsilon * scale + torch.finfo(output.dtype).tiny)[finite].any())
    # so many roundings of half precision would hide anything: what they come to together is known better
    scale = (rows.square() @ matrix.square().T + shift.square()).sqrt()
    return not bool(gap[finite].norm() > 4 * epsilon * scale[finite].norm())


class ParameterTaps(Hooked):
    """Lets autograd make the gradients of parameters and hands them over, for the length of a `with` block.

    Args:
        parameters: By a name. Their `grad` and `requires_grad` are as before on leaving.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self._parameters = parameters
        self._before: list[tuple[nn.Parameter, bool, Tensor | None]] = []
        self._fired: set[str] = set()
        self._sink: Callable[[str, Tensor], None] | None = None

    def _put_on(self) -> None:
        for name, parameter in self._parameters.items():
            self._before.append((parameter, parameter.requires_grad, parameter.grad))
            parameter.grad = None
            parameter.requires_grad_(True)
            self._hooks.append(parameter.register_post_accumulate_grad_hook(self._hook(name)))  # type: ignore[no-untyped-call]

    def _take_off(self) -> None:
        super()._take_off()
        for parameter, trainable, gradient in self._before:
            parameter.requires_grad_(trainable)
            parameter.grad = gradient
        self._before.clear()
        self._sink = None

    def _hook(self, name: str) -> Callable[[Tensor], None]:
        def at_gradient(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            if self._sink is not None and gradient is not None:
                self._fired.add(name)
                self._sink(name, gradient)

        return at_gradient

    def listen(self, sink: Callable[[str, Tensor], None]) -> None:
        """Send the gradients that come from here on to the sink, by the parameter's name; there may be several."""
        self._sink = sink

    def silent(self) -> list[str]:
        """Return the names whose gradient never came: autograd found no use of them."""
        return [name for name in self._parameters if name not in self._fired]


def hooked(*modules: nn.Module) -> str:
    """Return a remark that names the modules' own forward hooks, empty where there are none."""
    names = [
        f"{getattr(hook, '__qualname__', type(hook).__name__)} on {type(module).__name__}"
        for module in modules
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
        if not (getattr(hook, "__module__", None) or "").startswith("gradvar.")
    ]
    return f" (it has a forward hook: {', '.join(names)}?)" if names else ""


def has_gradient_hooks(parameter: nn.Parameter) -> bool:
    """Return whether hooks of the user's wait for this parameter's gradient, such as an optimizer in backward."""
    return bool(parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None))
