"""Copies between a device and page-locked memory of the host, beside what is computed.

A stream of its own for both directions: what comes back was sent on it before, so the two are in order. A copy out
waits for what makes its source, and the source's memory is not used again before it is done (`record_stream`); the host
waits where more than a few are on their way, or sources would pile up. What writes to a source meanwhile (a model with
a buffer of its own, autograd adding to a gradient that nobody else holds) is in no order with its copy: the source is
held until the host has seen the copy done, and must then be as it was. What comes back lands in one of two buffers: one
is filled while the other is used. On the CPU, where there is nothing to be beside, copies are made at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gradvar.gradients.gram import check_unchanged

IN_FLIGHT = 2
"""Copies to the host on their way at one time, and buffers of what comes back."""
_ALIGNED = 256


@dataclass(frozen=True, eq=False)
class _Sent:
    """A copy to the host on its way."""

    key: str
    """The target's, for errors."""
    source: Tensor
    version: int
    """The source's as the copy was begun."""
    done: Any
    """Event behind it."""


@dataclass(eq=False)
class _Buffer:
    """Device memory that what comes back lands in."""

    name: Hashable = None
    """What is in it."""
    memory: Tensor | None = None
    parts: list[Tensor] = field(default_factory=list)
    ready: Any = None
    """Event behind the copies to it."""
    used: Any = None
    """Event behind what used it last."""


class Lane:
    """Copies of one device.

    Args:
        device: Where tensors come from and go back to.
        side: The stream of the copies; None makes every copy at once, in order with everything else.
        cuda: `torch.cuda`, or what stands in for its `stream` and `current_stream`.
    """

    def __init__(self, device: torch.device, side: Any = None, cuda: Any = torch.cuda) -> None:
        self._device = device
        self._side = side
        self._cuda = cuda
        self._sent: deque[_Sent] = deque()
        self._buffers = deque(_Buffer() for _ in range(IN_FLIGHT))

    @classmethod
    def of(cls, device: torch.device) -> Lane:
        """Return the lane of a device: with a stream of its own on CUDA."""
        return cls(device, torch.cuda.Stream(device) if device.type == "cuda" else None)  # type: ignore[no-untyped-call]

    def send(self, source: Tensor, target: Tensor, key: str = "a measured module") -> Tensor:
        """Copy to the host's `target` and return it: whole once the stream has come to it (`wait`).

        Args:
            source: What is copied.
            target: Memory of the host.
            key: Names the target in the error.

        Raises:
            GradvarError: An earlier source was written to before its copy was seen done.
        """
        if self._side is None:
            return target.copy_(source)
        self._see_done(IN_FLIGHT - 1)
        version = source._version
        self._side.wait_stream(self._now())
        with self._cuda.stream(self._side):
            target.copy_(source, non_blocking=True)
        source.record_stream(self._side)
        self._sent.append(_Sent(key, source, version, self._side.record_event()))
        return target

    def _see_done(self, left: int) -> None:
        """Wait until no more than `left` copies to the host are on their way; their sources must be as they were."""
        while len(self._sent) > left:
            sent = self._sent.popleft()
            sent.done.synchronize()
            check_unchanged(sent.key, sent.source, sent.version)

    def fetch(self, name: Hashable, values: Sequence[Tensor]) -> None:
        """Begin to bring the host's values, for `take` by the same name; the oldest buffer is used again.

        Raises:
            GradvarError: As in `send`.
        """
        if self._side is None or self._find(name) is not None:
            return
        self._see_done(0)
        buffer = self._buffers[0]
        self._buffers.rotate(-1)
        size = sum(-(-value.nbytes // _ALIGNED) * _ALIGNED for value in values)
        if buffer.memory is None or buffer.memory.numel() < size:
            buffer.memory = torch.empty(size, dtype=torch.uint8, device=self._device)
            buffer.memory.record_stream(self._side)
            self._side.wait_stream(self._now())  # who had this memory before may still be at it
        elif buffer.used is not None:
            self._side.wait_event(buffer.used)
        buffer.name, buffer.parts, start = name, [], 0
        with self._cuda.stream(self._side):
            for value in values:
                part = buffer.memory[start : start + value.nbytes].view(value.dtype).view(value.shape)
                buffer.parts.append(part.copy_(value, non_blocking=True))
                start += -(-value.nbytes // _ALIGNED) * _ALIGNED
        buffer.ready = self._side.record_event()

    def take(self, name: Hashable, values: Sequence[Tensor]) -> list[Tensor]:
        """Return the values on the device, fetched before or now; to be given back."""
        if self._side is None:
            return [value.to(self._device) for value in values]
        self.fetch(name, values)
        buffer = self._find(name)
        if buffer is None:
            raise RuntimeError("a buffer was lost")
        self._now().wait_event(buffer.ready)
        return buffer.parts

    def give_back(self, name: Hashable) -> None:
        """Let the buffer be filled anew once what was begun up to now is done with it."""
        buffer = self._find(name)
        if buffer is not None:
            buffer.used = self._now().record_event()
            buffer.name = None

    def join(self) -> None:
        """Let what is computed from now on come after all copies begun so far."""
        if self._side is not None:
            self._now().wait_stream(self._side)

    def wait(self) -> None:
        """Wait on the host until all copies are done."""
        if self._side is not None:
            self._side.synchronize()

    def _now(self) -> Any:
        return self._cuda.current_stream(self._device)

    def _find(self, name: Hashable) -> _Buffer | None:
        return next((buffer for buffer in self._buffers if buffer.name == name and name is not None), None)
