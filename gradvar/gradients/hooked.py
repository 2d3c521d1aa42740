"""Hooks for the length of a `with` block, taken off again whatever happens, also while they are put on."""

from __future__ import annotations

import abc
from types import TracebackType
from typing import Self

from torch.utils.hooks import RemovableHandle


class Hooked(abc.ABC):
    """Base of what hooks modules or parameters."""

    def __init__(self) -> None:
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        try:
            self._put_on()
        except BaseException:
            self._take_off()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._take_off()

    @abc.abstractmethod
    def _put_on(self) -> None:
        """Register hooks, each in `_hooks`."""

    def _take_off(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
