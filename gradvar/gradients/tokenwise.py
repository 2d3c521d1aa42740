"""The last layer's MLP on the predicting tokens alone: what it would make of others, nothing reads.

An MLP takes each token by itself, and above it only the states that predict response tokens count. Behind a prompt of
100 tokens, responses of 20 to 100 leave five tokens in eight out. Which module does take each token by itself is seen
in the witness: of a part of what it saw there it must make what it made of it; and in the pass on the first row, the
longest, which must come out as it does whole. The part is run in reverse, so that no token has the neighbours that it
had, even where all predict. That nothing else reads the states left out is seen in the pass, where the witness's last
hidden states must come out the same; and nothing behind the module is measured, whose input they would be part of.
Where one does not hold, the pass runs again with all tokens.

Shape letters: B sequences of a batch, T their padded length, R predicting positions, D hidden width.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from gradvar.errors import GradvarError
from gradvar.gradients.batches import ChangedInBatchError
from gradvar.gradients.hooked import Hooked
from gradvar.gradients.targets import is_linear

_ROUNDINGS = 64
"""Of the dtype, relative to the largest entry: products of other heights sum in another order."""
_wrong: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Modules whose other tokens turned out to be read: never narrowed again."""


class NotTokenwiseError(GradvarError):
    """The module that ran on some tokens alone should have run on all."""


class PartsWatch(Hooked):
    """Notes what a layer's parts take and give, for the length of a `with` block.

    Args:
        layer: A decoder layer.
        measured: Modules that are measured, those of the head left out: a part that holds one, or that runs before one,
            is to see all tokens. So is one with hooks of the user's on it or in it.
    """

    def __init__(self, layer: nn.Module, measured: Collection[nn.Module]) -> None:
        super().__init__()
        self._measured = set(measured)
        self._parts = [part for part in layer.children() if any(map(is_linear, part.modules()))]
        self._seen: list[tuple[nn.Module, tuple[Tensor, Tensor] | None]] = []
        """Calls of parts in turn."""
        self._behind = False
        """Whether something measured ran since the last of them."""
        self._users = {part for part in self._parts if any(map(_has_hooks, part.modules()))}

    def _put_on(self) -> None:
        for part in self._parts:
            self._hooks.append(part.register_forward_hook(self._note, with_kwargs=True, prepend=True))
        for module in self._measured:
            self._hooks.append(module.register_forward_hook(self._note_measured))

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        pair = (*args, output)
        plain = len(pair) == 2 and not kwargs and all(isinstance(x, Tensor) and x.ndim == 3 for x in pair)
        self._seen.append((module, (args[0].detach(), output.detach()) if plain else None))
        self._behind = False

    def _note_measured(self, *call: object) -> None:
        self._behind = True

    def tokenwise(self, start: int) -> nn.Module | None:
        """Return the part with matrices that ran last, if it takes each token by itself and nothing measured needs it.

        It ran once, from one (1, T, D) to another, and gives the same for the tokens from `start` on in reverse and
        without the rest.
        """
        part, seen = self._seen[-1] if self._seen else (None, None)
        if part is None or seen is None or [module for module, _ in self._seen].count(part) > 1:
            return None
        value, output = seen
        fits = value.shape[:2] == output.shape[:2] and value.shape[1] > 1  # one token has no other to look at
        needed = self._behind or part in self._users or not self._measured.isdisjoint(part.modules())
        if not fits or needed or part in _wrong or not bool(output.isfinite().all()):
            return None
        return part if _close(_plain(part, value[:, start:].flip(1)), output[:, start:].flip(1)) else None


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _plain(part: nn.Module, value: Tensor) -> Any:
    """Return what the module makes of it, without the watch's own hooks."""
    with torch.no_grad():
        return part.forward(value)


def _close(output: Any, expected: Tensor) -> bool:
    """Return whether both are the same to rounding."""
    if not isinstance(output, Tensor) or output.shape != expected.shape:
        return False
    limit = _ROUNDINGS * torch.finfo(expected.dtype).eps * float(expected.abs().max())
    return float((output - expected).abs().max()) <= limit


class Narrowed(Hooked):
    """Runs a module on some positions alone, in reverse, for the length of a `with` block; elsewhere it gives 0.

    A ChangedInBatchError inside may be its doing: where it ran, a NotTokenwiseError takes that one's place.

    Args:
        module: It takes each token by itself; None narrows nothing.
    """

    def __init__(self, module: nn.Module | None) -> None:
        super().__init__()
        self._module = module
        self._where = torch.empty(0, dtype=torch.long)
        self._expected: Tensor | None = None
        """(R', D) what the first row's predicting tokens come out as in the whole row, until they are looked at."""
        self._shape: tuple[int, ...] = ()
        self._inside = False
        self._checked = False

    def _put_on(self) -> None:
        if self._module is not None:
            self._hooks.append(self._module.register_forward_pre_hook(self._narrow, with_kwargs=True))
            self._hooks.append(self._module.register_forward_hook(self._widen, prepend=True))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        if self._module is not None and isinstance(error, ChangedInBatchError):
            raise self._refused() from error

    def listen(self, where: Tensor, shape: tuple[int, ...]) -> None:
        """Start a batch of that shape (B, T): its flat positions (R,) are run from here on."""
        self._where, self._shape = where.flip(0), shape

    def _narrow(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        value = args[0] if len(args) == 1 and not kwargs else None
        self._inside = isinstance(value, Tensor) and tuple(value.shape[:-1]) == self._shape
        if value is None or not self._inside:
            return None
        where = self._where.to(value.device)
        if not self._checked:  # before the rest: what it takes is free again then
            whole = _plain(module, value[:1].detach())
            self._expected = whole[0].index_select(0, where[where < self._shape[1]])
        return (value.flatten(0, 1).index_select(0, where)[None],), kwargs

    def _widen(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if not self._inside:
            return None
        if self._expected is not None:
            # what is not finite is found elsewhere, or (behind the trunk) run again
            self._checked = bool(self._expected.isfinite().all())
            if self._checked and not _close(output[0].detach()[-len(self._expected) :], self._expected):
                raise self._refused()
            self._expected = None
        rows = output.new_zeros((self._shape[0] * self._shape[1], output.shape[-1]))
        return rows.index_copy(0, self._where.to(output.device), output[0]).view(*self._shape, -1)

    def _refused(self) -> NotTokenwiseError:
        if self._module is not None:
            _wrong.add(self._module)
        return NotTokenwiseError(f"{type(self._module).__name__} does not take each token by itself")
