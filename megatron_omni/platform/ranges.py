"""Names for what a process does, for the tools that watch it: a range of NVTX (Nsight Systems) where there is an
accelerator, and one of torch's profiler everywhere. Both cost microseconds when nobody watches.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.profiler import record_function

from megatron_omni.platform.device import accelerator_present


@contextmanager
def named(name: str) -> Iterator[None]:
    """Call what happens inside the block ``name``. Blocks may lie inside each other."""
    with record_function(name):
        if not accelerator_present():
            yield
            return
        torch.cuda.nvtx.range_push(name)
        try:
            yield
        finally:
            torch.cuda.nvtx.range_pop()
