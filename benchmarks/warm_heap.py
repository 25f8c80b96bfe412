"""The allocator's settings of every benchmark of kernels, without torch: glibc reads them once, when a process starts.

With them freed memory stays with the process and large tensors lie on huge pages, as in training (docs/kernels.md);
without, first touches of fresh pages are what is measured.
"""

import os
import sys

WARM_HEAP = {
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
    "THP_MEM_ALLOC_ENABLE": "1",
}


def with_warm_heap() -> None:
    """Start this program again with the settings, unless it has them."""
    if any(os.environ.get(name) != value for name, value in WARM_HEAP.items()):
        environment = {**os.environ, **WARM_HEAP, "KINETO_LOG_LEVEL": "99"}
        os.execve(sys.executable, sys.orig_argv, environment)
