"""Runs whose bits repeat: what PyTorch and the libraries below it must be told.

PyTorch takes kernels that give the same bits every time, or raises where an operation has none. The others are told by
their environment, which they read when they are first used: cuBLAS a workspace of fixed size, NCCL an algorithm that
sums in a fixed order, Transformer Engine and flash attention a backward without atomic additions. Values and those that
are accepted instead are megatron-core's (megatron/training/determinism.py in its wheel).
"""

import os

import torch

VARIABLES: dict[str, tuple[str, ...]] = {
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    "NCCL_ALGO": ("Ring", "CollnetDirect", "CollnetChain"),
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",),
    "FLASH_ATTENTION_DETERMINISTIC": ("1",),
}
"""Environment variable -> what it may be; the first where it is not set."""


def make_deterministic() -> None:
    """Set all of it for this process, before its first matrix product and its first process group.

    ValueError for a variable that the environment sets to something else.
    """
    for name, accepted in VARIABLES.items():
        value = os.environ.setdefault(name, accepted[0])
        if value not in accepted:
            raise ValueError(
                f"deterministic_mode=true: the environment has {name}={value!r}, with which bits do not repeat; unset it "
                f"or set it to {' or '.join(accepted)}"
            )
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False  # it times kernels and takes the fastest, not always the same one
