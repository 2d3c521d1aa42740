"""Gradients kept in the host's memory where the device has no room: copied there once, brought back for the Gram.

Copies run beside what is computed (`Lane`), in order with what makes and what uses them, so nothing waits for them on
the host: it must not read what was copied without waiting. They are asynchronous from and to page-locked memory alone.
To lock pages is slow (some 3 ms for 10 MB beside an H200), so memory is locked in large slabs, which torch's host
allocator keeps for the next pass and the next prompt.

Shape letters: N responses, T tokens, I inputs, O outputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gradvar.gradients.gram import FactorStore, GradientStore, add_product, multiply, piece
from gradvar.gradients.lane import Lane
from gradvar.gradients.plan import aligned_tokens

SLAB = 256 << 20
FILLED = 0.75
"""Part of the slabs that is filled, at least."""
_LEFT_OVER = 4
"""At most one part in so many of a slab is left over where a tensor did not fit into it."""
_ALIGNED = 64


class HostMemory:
    """Memory of the host for one pass; page-locked where a CUDA device copies to it.

    Args:
        slab_bytes: Memory that is asked for at one time, at least; 0 for each tensor its own. None chooses by `pinned`.
        pinned: Whether it is page-locked.
        budget: Bytes that may be taken in all, as planned; slabs grow no larger than what is left of it.
    """

    def __init__(self, slab_bytes: int | None = None, pinned: bool = False, budget: int | None = None) -> None:
        self.pinned = pinned
        self.taken = 0
        """Bytes asked for so far."""
        self._budget = budget
        self._lanes: dict[torch.device, Lane] = {}
        self._slab_bytes = (SLAB if self.pinned else 0) if slab_bytes is None else slab_bytes
        self._slab = torch.empty(0, dtype=torch.uint8)
        self._used = 0
        self._copies: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a tensor of the host without values."""
        size = math.prod(shape) * dtype.itemsize
        if self._slab_bytes == 0:
            return torch.empty(tuple(shape), dtype=dtype, pin_memory=self.pinned)
        if self._used + size > self._slab.numel():
            length = self._slab_length(size)
            self.taken += length
            self._slab = torch.empty(length, dtype=torch.uint8, pin_memory=self.pinned)
            self._used = 0
        start = self._used
        self._used += -(-size // _ALIGNED) * _ALIGNED
        return self._slab[start : start + size].view(dtype).view(tuple(shape))

    def _slab_length(self, size: int) -> int:
        """Return the bytes of a new slab: a power of two, which torch's host allocator makes of every size.

        Enough for several such tensors, so that at most a quarter is left over; less where the budget has no room.
        """
        least = 1 << (size - 1).bit_length()
        length = max(self._slab_bytes, 1 << (_LEFT_OVER * size - 1).bit_length())
        room = length if self._budget is None else self._budget - self.taken
        while length > max(room, least):
            length //= 2
        return max(length, least)

    def lane(self, device: torch.device) -> Lane:
        """Return the lane of a device; "cuda" is the current one."""
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        if device not in self._lanes:
            self._lanes[device] = Lane.of(device) if self.pinned else Lane(device)
        return self._lanes[device]

    def copy(self, value: Tensor, key: str = "a measured module") -> Tensor:
        """Return a copy on the host, whole once the device's lane has come to it; `key` names the target in errors."""
        return self.lane(value.device).send(value, self.empty(value.shape, value.dtype), key)

    def copy_once(self, value: Tensor, key: str = "a measured module") -> Tensor:
        """Return a copy as `copy` does, the same for one tensor until `forget`: q, k and v share their input.

        Another one where something was written to the tensor since.
        """
        name = (id(value), value._version)
        if name not in self._copies:
            self._copies[name] = (value, self.copy(value, key))
        return self._copies[name][1]

    def forget(self) -> None:
        """End a batch: let its tensors go."""
        self._copies.clear()


class HostFactorStore(FactorStore):
    """Keeps a and delta' on the host; each response's come back for every tile of the Gram: tiles should be tall."""

    def __init__(
        self, responses: int, rows: int, columns: int, dtype: torch.dtype, device: torch.device, host: HostMemory
    ) -> None:
        super().__init__(responses, rows, columns, dtype, device)
        self._host = host

    def _keep(self, response: int, a: Tensor, delta: Tensor) -> None:
        # transposed, so that the rows of a tile lie together
        rows = delta.new_empty((delta.shape[1], aligned_tokens(len(delta))))
        rows[:, : len(delta)] = delta.T
        self._factors[response].append((self._host.copy_once(a, self.key), self._host.copy(rows, self.key)))

    def _wanted(self, response: int, start: int, stop: int) -> list[Tensor]:
        return [part for a, rows in self._factors[response] for part in (rows[start:stop], a)]

    def ahead(self, response: int, start: int, stop: int) -> None:
        """Send for what `fill` will need, beside what is computed."""
        self._host.lane(self.device).fetch((response, start, stop), self._wanted(response, start, stop))

    def fill(self, response: int, start: int, stop: int, out: Tensor) -> None:
        """Write rows [start, stop) of a response's gradient to `out`."""
        lane, name = self._host.lane(self.device), (response, start, stop)
        parts = lane.take(name, self._wanted(response, start, stop))
        if not parts:
            out.zero_()
        for i in range(0, len(parts), 2):
            rows, a = parts[i : i + 2]
            (add_product if i else multiply)(rows[:, : len(a)], a, out)
        lane.give_back(name)


class HostMatrixStore(GradientStore):
    """Keeps the gradients themselves on the host; every byte comes back once."""

    def __init__(
        self, responses: int, rows: int, columns: int, dtype: torch.dtype, device: torch.device, host: HostMemory
    ) -> None:
        super().__init__(responses, rows, columns, dtype, device)
        self._host = host
        self._gradients = [host.empty((rows, columns), dtype) for _ in range(responses)]
        self._begun: set[int] = set()
        self._good = torch.ones(responses, dtype=torch.bool, device=self._wide)

    def _keep(self, response: int, a: Tensor, delta: Tensor) -> None:
        kept, height = self._gradients[response], max(1, piece(self.device) // self.columns)
        for start in range(0, self.rows, height):
            part = kept[start : start + height]
            made = torch.empty(part.shape, dtype=self.dtype, device=delta.device)
            multiply(delta[:, start : start + height].T, a, made)
            self._good[response] &= made.isfinite().all().to(self._wide)
            if response in self._begun:  # a module called twice
                self._host.lane(made.device).wait()
                part += made.cpu()
            else:
                self._host.lane(made.device).send(made, part)
        self._begun.add(response)

    def _is_finite(self, response: int) -> Tensor:
        return super()._is_finite(response) & self._good[response]

    def fill(self, response: int, start: int, stop: int, out: Tensor) -> None:
        """Write rows [start, stop) of a response's gradient to `out`."""
        if response in self._begun:
            self._host.lane(out.device).join()
            out.copy_(self._gradients[response][start:stop], non_blocking=True)
        else:
            out.zero_()
