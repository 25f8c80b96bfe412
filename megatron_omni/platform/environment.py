"""What is asked of the machine and set in its environment before torch is imported. No torch here.

CUDA and PyTorch read their variables when they are first used. Every start of a training (``cli/train.py``, whoever
launches it) and our torchrun set them; what is set already stays. Without a GPU nobody reads them.
"""

import os

MAX_CONNECTIONS = ("CUDA_DEVICE_MAX_CONNECTIONS", "1")
"""Kernels reach the device in the order in which they are launched: a message that was started before a product runs
beside it, instead of behind it. Megatron's overlap relies on that."""
ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
"""Memory grows in place: row counts of experts differ from step to step, and would leave fragments of fixed blocks."""
ALLOCATOR_ALIAS = "PYTORCH_ALLOC_CONF"
"""Its newer name, of which PyTorch takes one or the other."""


def set_cuda_defaults() -> None:
    """Set what is not set."""
    os.environ.setdefault(*MAX_CONNECTIONS)
    if ALLOCATOR_ALIAS not in os.environ:
        os.environ.setdefault(*ALLOCATOR)


def main_memory_bytes() -> int:
    """Main memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
