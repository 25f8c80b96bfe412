"""Keep freed memory: glibc's malloc gives every large block back to the kernel, and a CPU run asks for it again.

By default each tensor above 32 MiB (at first: above 128 KiB) is a fresh mapping, so every step pays for zeroing its
pages once more: a copy into a new 64 MiB tensor runs at 3 GB/s instead of 22 (docs/kernels.md, "The allocator").
:func:`keep_freed_memory` raises the thresholds to their largest, so that freed blocks stay in the heap and are used
again, and asks torch to align large tensors to pages and advise the kernel to back them with huge ones; that also keeps
aligned blocks from splitting the heap. ``mallopt`` works at any time, unlike the variables MALLOC_MMAP_THRESHOLD_ and
MALLOC_TRIM_THRESHOLD_, which glibc reads once at start: nothing needs to be exported by a launcher.

Memory that was used once stays with the process: its resident size is that of its busiest step. A user who sets one of
those variables, or GLIBC_TUNABLES, decides alone.
"""

import ctypes
import os

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST = 2**31 - 1
"""``mallopt`` takes an int."""
USER_SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Set malloc up for training on a CPU; whether it was done (not under the user's own settings, nor without glibc)."""
    if any(name in os.environ for name in USER_SETTINGS):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads it at its first large allocation
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST)) and bool(mallopt(_M_TRIM_THRESHOLD, _LARGEST))
