"""Weights of a mixture of experts that no Linear holds: experts fused in one tensor, routers that multiply by hand.

A token reaches some experts only, in an order of the model's own, so a batch's tokens cannot be sorted by response.
Autograd's own gradient of the parameter is exact whatever the implementation (eager, grouped, batched): it is taken
with each response alone.

Shape letters: E experts, O outputs, I inputs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import Tensor, nn

_ROUTER = re.compile(r"gate|router|shared_expert_gate|wg")
_ONE_EXPERT = re.compile(r"(^|\.)experts\.\d+(\.|$)")


@dataclass(frozen=True, kw_only=True)
class Direct:
    """A weight whose gradient autograd gives whole, and its bias.

    As a matrix of output rows, that of a fused tensor has the experts' matrices one above the other, (E O, I).
    """

    weight: str
    """Name of the parameter in its module."""
    bias: str | None
    """Name of the bias beside it."""
    transposed: bool
    """Whether a fused tensor is (E, I, O), not (E, O, I)."""
    experts: int
    """E of a fused tensor; 1 for a matrix."""

    def rows(self, weight: Tensor) -> Tensor:
        """Return the weight or its gradient as output rows, (E O, I)."""
        if weight.ndim == 3:
            return (weight.transpose(1, 2) if self.transposed else weight).flatten(0, 1)
        return weight

    def shape(self, module: nn.Module) -> tuple[int, int]:
        """Return (output rows, inputs) of the weight in its module."""
        sizes = tuple(module._parameters[self.weight].shape)  # type: ignore[union-attr]
        if len(sizes) == 3:
            count, first, second = sizes
            return (count * second, first) if self.transposed else (count * first, second)
        return (sizes[0], sizes[1])


def is_one_expert(path: str) -> bool:
    """Return whether the path is that of one expert's own module, which tokens may never reach."""
    return _ONE_EXPERT.search(path) is not None


def find_direct(path: str, module: nn.Module) -> list[Direct]:
    """Return the weights of a module that belong to a mixture of experts and are no Linear's."""
    words = f"{path.rpartition('.')[2]} {type(module).__name__}".lower()
    mixture = "expert" in words or "router" in words or _ROUTER.fullmatch(path.rpartition(".")[2]) is not None
    own = dict(module.named_parameters(recurse=False))
    found = []
    for name, weight in own.items():
        if weight.ndim not in (2, 3) or "bias" in name or not (mixture or "expert" in name.lower()):
            continue
        bias = "bias" if name == "weight" else f"{name}_bias"
        transposed = getattr(module, "is_transposed", False) is True
        if weight.ndim == 3 and bias in own:
            # the side on which the bias lies is the outputs'; both sides fit where they are equal
            last, middle = own[bias].shape[-1] == weight.shape[2], own[bias].shape[-1] == weight.shape[1]
            transposed = last and (transposed or not middle)
        found.append(
            Direct(
                weight=name,
                bias=bias if bias in own else None,
                transposed=weight.ndim == 3 and transposed,
                experts=weight.shape[0] if weight.ndim == 3 else 1,
            )
        )
    return found
