"""What the process holds of the host's memory, and blocks that the C allocator gives back when room is short.

glibc keeps freed blocks for later, between gradients that stay: beside a peak of 261 MiB it held 120 MiB more. Giving
them back costs their pages being faulted in again, about a tenth of the time where it is done at every step; so it is
done only where the budget would be passed.

Holes between blocks that stay cannot be given back: on Qwen2's shape they took half as much again as what was alive (85
and 128 MiB, 1,500 tokens; 216 and 312 MiB, 4,000 tokens). Where the budget has no room for that, every large block gets
pages of its own. The threshold alone does not see to it: glibc looks for a hole among freed blocks first, and a hole
once used again keeps its pages (Mamba 2, 602 tokens: 216 MiB where 85 were alive). So the holes that are there are
taken, without being touched, until the end (89 MiB).
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import ClassVar

_STATM = Path("/proc/self/statm")
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""glibc's numbers of the settings (malloc.h)."""
_APART = ((_TRIM_THRESHOLD, 1 << 20), (_MMAP_THRESHOLD, 1 << 18))
_USUAL = ((_TRIM_THRESHOLD, 64 << 20), (_MMAP_THRESHOLD, 32 << 20))
"""Where glibc's own adapting ends once a block of 32 MiB was freed (DEFAULT_MMAP_THRESHOLD_MAX, and twice that); what
it was before cannot be asked."""
_HOLE = (1 << 18) - 64
"""The largest request below the threshold, whatever the allocator adds to it."""
_holders = 0


class _Mallinfo2(ctypes.Structure):
    """What glibc's mallinfo2 returns (mallinfo(3))."""

    _fields_: ClassVar = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    ]  # fmt: skip


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


@contextmanager
def blocks_apart(wanted: bool) -> Iterator[None]:
    """Let glibc give every block from 256 KiB up pages of its own, which are free once the block is.

    Nothing where it is not wanted, with another C library, or where the environment sets the threshold.
    """
    global _holders
    setter = _mallopt() if wanted else None
    if setter is None:
        yield
        return
    _holders += 1
    for number, value in _APART:
        setter(number, value)
    try:
        with _holes_taken():
            yield
    finally:
        _holders -= 1
        if _holders == 0:
            for number, value in _USUAL:
                setter(number, value)


@contextmanager
def _holes_taken() -> Iterator[None]:
    """Take the holes among freed blocks that a block of 256 KiB would be put in, their pages given back before.

    One page of each is touched, by the allocator. Nothing where glibc is older than 2.33, nor in another thread than
    the main one: its blocks come from elsewhere than where the break would show that no hole is left.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    try:
        library = ctypes.CDLL(None)
        library.mallinfo2.restype = _Mallinfo2
        library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
        library.free.argtypes = (ctypes.c_void_p,)
        library.sbrk.restype, library.sbrk.argtypes = ctypes.c_void_p, (ctypes.c_ssize_t,)
    except (OSError, AttributeError, TypeError):
        yield
        return
    library.malloc_trim(0)
    end = library.sbrk(0)
    taken = []
    for _ in range(library.mallinfo2().fordblks // _HOLE):
        taken.append(library.malloc(_HOLE))
        if library.sbrk(0) != end:  # no hole was left: the heap grew for this one
            break
    try:
        yield
    finally:
        for block in taken:
            library.free(block)


def _mallopt() -> Callable[[int, int], int] | None:
    """Return glibc's mallopt, None with another C library or where the user has set what it would set."""
    if "MALLOC_MMAP_THRESHOLD_" in os.environ or "mmap_threshold" in os.environ.get("GLIBC_TUNABLES", ""):
        return None
    try:
        found: Callable[[int, int], int] = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return None
    return found if _trim() is not None else None


def _trim() -> Callable[[int], int] | None:
    """Return glibc's malloc_trim, None with another C library."""
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # TypeError: Windows has no library without a name
        return None
    return found
