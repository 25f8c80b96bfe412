"""Where the memory of a GPU goes: a record of its allocations with their stacks. A CPU has no such record."""

from pathlib import Path

import torch

from megatron_omni.platform.device import accelerator_present


def possible() -> bool:
    """Whether there is a device whose allocations can be recorded."""
    return accelerator_present()


def start() -> None:
    """Record every allocation from here on, at most the last 200,000 of them."""
    torch.cuda.memory._record_memory_history(max_entries=200_000)


def write(path: Path) -> None:
    """Write what was recorded, for https://docs.pytorch.org/memory_viz, and stop recording."""
    torch.cuda.memory._dump_snapshot(str(path))
    torch.cuda.memory._record_memory_history(enabled=None)
