"""What the process holds of the host's memory, and blocks that the C allocator gives back when room is short.

glibc keeps freed blocks for later, between gradients that stay: beside a peak of 261 MiB it held 120 MiB more. Giving
them back costs their pages being faulted in again, about a tenth of the time where it is done at every step; so it is
done only where the budget would be passed.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_STATM = Path("/proc/self/statm")


def resident_bytes() -> int | None:
    """Return the memory this process has to itself (no mapped files), in bytes; None where the system does not say."""
    with suppress(OSError, ValueError):
        _, resident, shared, *_ = map(int, _STATM.read_text(encoding="ascii").split())
        return (resident - shared) * os.sysconf("SC_PAGE_SIZE")
    return None


def settled_bytes() -> int | None:
    """Return `resident_bytes` once freed blocks are given back.

    A measurement that counted the last one's as there before would grow by so much more, prompt after prompt.
    """
    trim = _trim()
    if trim is not None:
        trim(0)
    return resident_bytes()


class Resident:
    """Keeps what the process grows by within a budget as far as freed blocks are at fault.

    Args:
        start: What `settled_bytes` said before.
        budget: What it may grow by.
    """

    def __init__(self, start: int | None, budget: int) -> None:
        self._start = start
        self._budget = budget

    def make_room(self, needed: int) -> None:
        """Give freed blocks back if as many bytes more would pass the budget; nothing where that is unknown."""
        now = resident_bytes()
        if now is None or self._start is None or now - self._start + needed <= self._budget:
            return
        trim = _trim()
        if trim is not None:
            trim(0)


def _trim() -> Callable[[int], int] | None:
    """Return glibc's malloc_trim, None with another C library."""
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # TypeError: Windows has no library without a name
        return None
    return found
