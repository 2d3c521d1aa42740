"""The last layer's MLP on the predicting tokens alone: what it would make of others, nothing reads.

An MLP takes each token by itself, and above it only the states that predict response tokens count. Behind a prompt of
100 tokens, responses of 20 to 100 leave five tokens in eight out. Which module does take each token by itself is seen
in the witness: on a part of what it saw there it must give that part of what it gave; and in the pass on the first row,
the longest, which must come out as it does whole. That nothing else reads the states left out is seen in the pass too,
where the witness's last hidden states must come out the same.

Shape letters: B sequences of a batch, T their padded length, R predicting positions, D hidden width.
"""

from __future__ import annotations

from collections.abc import Collection
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gradvar.gradients.batches import UnalignedTokensError
from gradvar.gradients.targets import is_linear

_ROUNDINGS = 64
"""Of the dtype, relative to the largest entry: products of other heights sum in another order."""


class PartsWatch:
    """Notes what a layer's parts take and give, for the length of a `with` block.

    Args:
        layer: A decoder layer.
        measured: Modules that are measured: a part that holds one is to see all tokens.
    """

    def __init__(self, layer: nn.Module, measured: Collection[nn.Module]) -> None:
        self._measured = set(measured)
        self._parts = [part for part in layer.children() if any(map(is_linear, part.modules()))]
        self._seen: list[tuple[nn.Module, tuple[Tensor, Tensor] | None]] = []
        """Calls in turn."""
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        for part in self._parts:
            self._hooks.append(part.register_forward_hook(self._note, with_kwargs=True, prepend=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        pair = (*args, output)
        plain = len(pair) == 2 and not kwargs and all(isinstance(x, Tensor) and x.ndim == 3 for x in pair)
        self._seen.append((module, (args[0].detach(), output.detach()) if plain else None))

    def tokenwise(self, start: int) -> nn.Module | None:
        """Return the part with matrices that ran last, where it takes each token by itself and holds nothing measured.

        It ran once, from one (1, T, D) to another, and gives the same for the tokens from `start` on without the rest.
        """
        part, seen = self._seen[-1] if self._seen else (None, None)
        if part is None or seen is None or [module for module, _ in self._seen].count(part) > 1:
            return None
        value, output = seen
        fits = value.shape[:2] == output.shape[:2] and self._measured.isdisjoint(part.modules())
        return part if fits and _same(part, value[:, start:], output[:, start:]) else None


def _same(part: nn.Module, value: Tensor, expected: Tensor) -> bool:
    """Return whether the module gives what is expected; hooks of the user's are around it."""
    with torch.no_grad():
        output = part.forward(value)
    return isinstance(output, Tensor) and output.shape == expected.shape and _close(output, expected)


def _close(output: Tensor, expected: Tensor) -> bool:
    """Return whether both are the same to rounding; what is not finite is found elsewhere."""
    if not bool(expected.isfinite().all()):
        return True
    limit = _ROUNDINGS * torch.finfo(expected.dtype).eps * float(expected.abs().max())
    return float((output - expected).abs().max()) <= limit


class Narrowed:
    """Runs a module on some positions alone, for the length of a `with` block; elsewhere it gives 0.

    Args:
        module: It takes each token by itself; None narrows nothing.
    """

    def __init__(self, module: nn.Module | None) -> None:
        self._module = module
        self._hooks: list[RemovableHandle] = []
        self._where = torch.empty(0, dtype=torch.long)
        self._first = torch.empty(0)
        self._shape: tuple[int, ...] = ()
        self._inside = False
        self._checked = False

    def __enter__(self) -> Self:
        if self._module is not None:
            # hooks of the user's see all positions, before and after
            self._hooks = [
                self._module.register_forward_pre_hook(self._narrow),
                self._module.register_forward_hook(self._widen, prepend=True),
            ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def listen(self, where: Tensor, shape: tuple[int, ...]) -> None:
        """Start a batch of that shape (B, T): its flat positions (R,) are run from here on."""
        self._where, self._shape = where, shape

    def _narrow(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        value = args[0] if len(args) == 1 else None
        self._inside = isinstance(value, Tensor) and tuple(value.shape[:-1]) == self._shape
        if value is None or not self._inside:
            return None
        if not self._checked:
            self._first = value[:1].detach()
        return (value.flatten(0, 1).index_select(0, self._where.to(value.device))[None],)

    def _widen(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if not self._inside:
            return None
        if not self._checked:
            self._check(module, output.detach())
        rows = output.new_zeros((self._shape[0] * self._shape[1], output.shape[-1]))
        return rows.index_copy(0, self._where.to(output.device), output[0]).view(*self._shape, -1)

    def _check(self, module: nn.Module, output: Tensor) -> None:
        where = self._where[self._where < self._shape[1]].to(output.device)
        with torch.no_grad():
            whole = module.forward(self._first)
        if not _close(output[0, : len(where)], whole[0].index_select(0, where)):
            raise UnalignedTokensError("the last layer's MLP makes other values of a token without those before it")
        self._checked, self._first = True, torch.empty(0)
