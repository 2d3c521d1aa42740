"""Gradients kept in the host's memory where the device has no room: copied there once, brought back for the Gram.

Copies run on the current stream, in order with what makes and what uses them, so nothing waits for them on the host:
it must not read what was copied without waiting. They are asynchronous from and to page-locked memory alone. To lock
pages is slow (of the order of a millisecond for 10 MB; to be measured on a GPU), so memory is locked in large slabs,
which torch's host allocator keeps for the next pass and the next prompt.

Shape letters: N responses, T tokens, I inputs, O outputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gradvar.gradients.gram import FactorStore, GradientStore, add_product, multiply, piece

SLAB = 256 << 20
FILLED = 0.75
"""Part of the slabs that is filled, at least."""
_ALIGNED = 64


class HostMemory:
    """Memory of the host for one pass; page-locked where a CUDA device copies to it.

    Args:
        slab_bytes: Memory that is asked for at one time, at least; 0 for each tensor its own. None chooses by `pinned`.
        pinned: Whether it is page-locked; None where there is a CUDA device.
    """

    def __init__(self, slab_bytes: int | None = None, pinned: bool | None = None) -> None:
        self.pinned = torch.cuda.is_available() if pinned is None else pinned
        self._slab_bytes = (SLAB if self.pinned else 0) if slab_bytes is None else slab_bytes
        self._slab = torch.empty(0, dtype=torch.uint8)
        self._used = 0
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a tensor of the host without values."""
        size = math.prod(shape) * dtype.itemsize
        if self._slab_bytes == 0:
            return torch.empty(tuple(shape), dtype=dtype, pin_memory=self.pinned)
        if self._used + size > self._slab.numel():
            # a power of two, as torch's host allocator makes of every size; at most a quarter of it is left over
            length = max(self._slab_bytes, 1 << (4 * size - 1).bit_length())
            self._slab = torch.empty(length, dtype=torch.uint8, pin_memory=self.pinned)
            self._used = 0
        start = self._used
        self._used += -(-size // _ALIGNED) * _ALIGNED
        return self._slab[start : start + size].view(dtype).view(tuple(shape))

    def copy(self, value: Tensor) -> Tensor:
        """Return a copy on the host, whole once the current stream has come to it."""
        return self.empty(value.shape, value.dtype).copy_(value, non_blocking=self.pinned)

    def copy_once(self, value: Tensor) -> Tensor:
        """Return a copy as `copy` does, the same for one tensor until `forget`: q, k and v share their input."""
        if id(value) not in self._copies:
            self._copies[id(value)] = (value, self.copy(value))
        return self._copies[id(value)][1]

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
        self._factors[response].append((self._host.copy_once(a), self._host.copy(delta.T.contiguous())))

    def fill(self, response: int, start: int, stop: int, out: Tensor) -> None:
        """Write rows [start, stop) of a response's gradient to `out`."""
        if not self._factors[response]:
            out.zero_()
        for i, (a, rows) in enumerate(self._factors[response]):
            left = rows[start:stop].to(out.device, non_blocking=True)
            right = a.to(out.device, non_blocking=True)
            if i == 0:
                multiply(left, right, out)
            else:
                add_product(left, right, out)


class HostMatrixStore(GradientStore):
    """Keeps the gradients themselves on the host; every byte comes back once."""

    def __init__(
        self, responses: int, rows: int, columns: int, dtype: torch.dtype, device: torch.device, host: HostMemory
    ) -> None:
        super().__init__(responses, rows, columns, dtype, device)
        self._pinned = host.pinned
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
                part += made.cpu()  # waits, for the copies before it too
            else:
                part.copy_(made, non_blocking=self._pinned)
        self._begun.add(response)

    def _is_finite(self, response: int) -> Tensor:
        return super()._is_finite(response) & self._good[response]

    def fill(self, response: int, start: int, stop: int, out: Tensor) -> None:
        """Write rows [start, stop) of a response's gradient to `out`."""
        if response in self._begun:
            out.copy_(self._gradients[response][start:stop], non_blocking=True)
        else:
            out.zero_()
