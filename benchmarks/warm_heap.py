"""The allocator's settings of every benchmark of kernels, without torch: glibc reads them once, when a process starts.

With them freed memory stays with the process and large tensors lie on huge pages, as in training (docs/kernels.md);
without, first touches of fresh pages are what is measured. Whoever forces our AVX2 engine on a processor with AVX-512
gets torch's own switches set alike, so that both sides have the same instructions.
"""

import os
import sys

WARM_HEAP = {
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
    "THP_MEM_ALLOC_ENABLE": "1",
}
AVX2_ONLY = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
"""torch's own switches."""


def shared_environment() -> dict[str, str]:
    """What the environment of a benchmark has to hold."""
    return {**WARM_HEAP, **(AVX2_ONLY if os.environ.get("OMNI_CPU_KERNELS") == "avx2" else {})}


def with_warm_heap() -> None:
    """Start this program again with the settings, unless it has them."""
    if any(os.environ.get(name) != value for name, value in shared_environment().items()):
        environment = {**os.environ, **shared_environment(), "KINETO_LOG_LEVEL": "99"}
        os.execve(sys.executable, sys.orig_argv, environment)
