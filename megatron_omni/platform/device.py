"""Which hardware this process runs on, and the one-time preparation of Megatron-Core for it.

Only ``platform/`` names ``torch.cuda`` or a collective backend. Every entry point calls :func:`install` before anything
imports ``megatron.core``: Megatron-Core is written for CUDA, and on a machine without an accelerator the table of
``platform/cpu.py`` redirects the few things it hard-codes. Where no library brings an Adam that Megatron can use,
``platform/adam.py`` does.
"""

import importlib.util
import logging
import os
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_omni.platform.environment import main_memory_bytes


@cache
def accelerator_present() -> bool:
    """Whether a CUDA device can be used."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """The device of this process: the CUDA device of its local rank, else the CPU."""
    if not accelerator_present():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def backend() -> str:
    """The collective backend: ``nccl`` with an accelerator, else ``gloo``."""
    return "nccl" if accelerator_present() else "gloo"


def select_device() -> torch.device:
    """Make :func:`device` the current device of this process and return it."""
    chosen = device()
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    return chosen


def memory_bytes() -> float:
    """Memory of this process's device: a GPU's, or on a CPU the share of the main memory of one rank of this node."""
    if accelerator_present():
        return torch.cuda.get_device_properties(device()).total_memory
    return main_memory_bytes() / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def gradient_accumulation_kernel() -> bool:
    """Whether Apex's kernel is there that adds weight gradients to an fp32 buffer as it computes them."""
    return accelerator_present() and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


def synchronize() -> None:
    """Wait until the device of this process has done what it was given."""
    if accelerator_present():
        torch.cuda.synchronize()


def pinned(tensor: Tensor) -> Tensor:
    """``tensor`` in memory that a CUDA device copies from by itself; without one as it is."""
    return tensor.pin_memory() if accelerator_present() else tensor


@cache
def _side_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


def beside_computation() -> AbstractContextManager[Any]:
    """Copies and messages started inside run beside what the device computes."""
    return torch.cuda.stream(_side_stream()) if accelerator_present() else nullcontext()


def join_computation(*tensors: Tensor) -> None:
    """What is computed from here on may use ``tensors``, which were made :func:`beside_computation`."""
    if accelerator_present():
        stream = torch.cuda.current_stream()
        stream.wait_stream(_side_stream())
        for tensor in tensors:
            tensor.record_stream(stream)


def to_host(tensor: Tensor) -> Callable[[], list[Any]]:
    """Set ``tensor`` on its way to the host. What is returned waits for it alone, and gives it as ``tolist`` does."""
    if not accelerator_present():
        return tensor.tolist
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    copy.copy_(tensor, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()

    def wait() -> list[Any]:
        arrived.synchronize()
        return copy.tolist()

    return wait


class Stopwatch:
    """How long the device takes for what it is given between the beginning and :meth:`stop`; nothing waits for it."""

    def __init__(self) -> None:
        self._events: list[torch.cuda.Event] = []
        self._start, self._seconds = time.perf_counter(), 0.0
        self._mark()

    def _mark(self) -> None:
        if accelerator_present():
            self._events.append(torch.cuda.Event(enable_timing=True))
            self._events[-1].record()

    def stop(self) -> None:
        """The last of the work has been given."""
        self._seconds = time.perf_counter() - self._start
        self._mark()

    def seconds(self) -> float | None:
        """None while the device has not come so far."""
        if not self._events:
            return self._seconds
        begin, end = self._events
        return begin.elapsed_time(end) / 1e3 if end.query() else None


class Gpu(NamedTuple):
    """What :func:`probe_gpus` found of one device."""

    name: str
    free_bytes: int
    total_bytes: int
    computes: bool
    """A bf16 product of random matrices is finite."""


def probe_gpus() -> list[Gpu]:
    """Every CUDA device that this process sees; each computes a small product."""
    found = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        x = torch.randn(2048, 2048, device=f"cuda:{index}", dtype=torch.bfloat16)
        found.append(Gpu(torch.cuda.get_device_name(index), free, total, bool(torch.isfinite(x @ x).all())))
    return found


def install() -> None:
    """Make Megatron-Core importable and runnable on this machine; on a CPU, let malloc keep what a run frees.

    Call it before importing ``megatron.core``; twice is fine.
    """
    hide_upstream_notes()
    if accelerator_present():
        from megatron_omni.platform import adam

        adam.install_where_missing()
        return
    from megatron_omni.platform import allocator, cpu

    allocator.keep_freed_memory()
    cpu.install()


def hide_upstream_notes() -> None:
    """Drop what torch says on every start and nobody can act on.

    A machine with a CUDA toolkit and no GPU is a normal one here; and Megatron reads checkpoints with ``no_dist`` on
    purpose, each rank its own part.
    """
    logging.getLogger("torch.utils.cpp_extension").addFilter(_is_no_note_on_cuda)
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def _is_no_note_on_cuda(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("No CUDA runtime is found")
