"""Copies the busy parts of the heap at once, in a fork that is about to write all over them.

A fork shares its parent's memory and copies each page of 4 KiB when it first writes to it, which
costs 2.5 us a page: on a large network more than everything else that a fork costs. Where forks
have been seen to write to most of 2 MiB, the kernel is asked to copy these as one huge page
(MADV_COLLAPSE, Linux 6.1), and the simulation then also runs faster on them. Nothing depends on
it: a kernel that cannot or will not leaves the pages as they are.
"""

from __future__ import annotations

import ctypes
import os
from array import array
from collections.abc import Sequence
from mmap import PAGESIZE

MADV_POPULATE_WRITE, MADV_COLLAPSE = 23, 25
HUGE_BYTES = 2 << 20
PAGEMAP = "/proc/self/pagemap"
ENTRY_BYTES = 8
"""What it says of one page."""
WRITTEN = 1 << 63 | 1 << 56
"""In an entry: in memory, and no other process has it."""

Stretch = tuple[int, int]
"""From one address to another."""

_madvise = ctypes.CDLL(None).madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def busy() -> list[Stretch]:
    """Where this fork has written to more than half of 2 MiB since it began; nowhere, if that
    cannot be seen: sandboxes hide it."""
    found: list[Stretch] = []
    start, end = _heap()
    try:
        pagemap = os.open(PAGEMAP, os.O_RDONLY)
    except OSError:
        return found
    first = -(-start // HUGE_BYTES) * HUGE_BYTES
    for here in range(first, end - HUGE_BYTES + 1, HUGE_BYTES):
        length, offset = (size // PAGESIZE * ENTRY_BYTES for size in (HUGE_BYTES, here))
        pages = array("Q", os.pread(pagemap, length, offset))
        if 2 * sum(page & WRITTEN == WRITTEN for page in pages) > len(pages):
            adjoins = found and found[-1][1] == here
            found.append((found.pop()[0] if adjoins else here, here + HUGE_BYTES))
    os.close(pagemap)
    return found


def copy(stretches: Sequence[Stretch]) -> None:
    """Copy them now, in a fork that has only begun."""
    for start, end in stretches:
        # What its parent has as one huge page is taken apart first, or it would stay shared.
        for here in range(start, end, HUGE_BYTES):
            _madvise(here, PAGESIZE, MADV_POPULATE_WRITE)
        _madvise(start, end - start, MADV_COLLAPSE)


def _heap() -> Stretch:
    with open("/proc/self/maps", encoding="utf-8") as maps:
        parts = [line.split(maxsplit=1)[0] for line in maps if line.endswith("[heap]\n")]
    bounds = [int(bound, 16) for part in parts for bound in part.split("-")] or [0]
    return bounds[0], bounds[-1]
