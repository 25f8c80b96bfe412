"""Where the host waits for the device: every wait by call site, with its count; a guard for what may not wait.

A device works behind the host, which hands it one kernel after the other. An operation whose result the host must know
(a number, or the size of a tensor that depends on values) makes it stop until the device has caught up, and then the
device stops until the host has handed it something again.

    with HostWaits() as waits: ...                        # count: waits.counts
    with HostWaits(allowed={"module:function": 2}): ...   # raise HostWaited at any other wait, and at the third here

A wait belongs to the innermost function of this package or of megatron-core on the stack, outside of ``platform/``; one
in a backward pass without Python code of ours, to the function that started it.

With an accelerator torch itself says when it waits (``torch.cuda.set_sync_debug_mode``). On a CPU nothing waits; there
the operations that would are recognised, as if every tensor were a device's: values read by Python, and sizes that
depend on values. Modules of two kinds are left out by name, ``HOST_CODE``: those that work in host memory on every
machine, and those that exist for CPUs alone. Not seen there: copies from and to pageable host memory. Explicit
synchronisation counts on both. One thread is watched, that which enters, and the backward passes that it starts.
"""

import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_omni.platform.device import accelerator_present

HOST_CODE = ("megatron_omni.data.", "megatron_omni.batch.", "megatron_omni.positions.", "megatron_omni.platform.cpu.")
"""Modules whose own waits do not count on a CPU: the reader and what it makes, in host memory; what stands there for a
device."""
_OURS = ("megatron_omni.", "megatron.core.")
_READS = ("tolist", "cpu", "numpy", "__array__")
"""Methods of a tensor that give its values to Python without an operation that dispatch sees on a CPU."""
_SIZED_BY_VALUES = {
    "_local_scalar_dense", "allclose", "bincount", "equal", "masked_scatter_backward", "masked_select", "nonzero",
    "unique_consecutive", "unique_dim", "_unique2",
}  # fmt: skip
"""Operations (``aten``) that return a value, or a tensor whose size depends on values."""
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


class HostWaited(RuntimeError):
    """A wait that is not allowed."""


class HostWaits:
    """Counts the waits of the code inside ``with``; with ``allowed`` the first one too many raises :class:`HostWaited`."""

    def __init__(self, allowed: Mapping[str, int] | None = None) -> None:
        self.counts: Counter[str] = Counter()
        """Waits by ``module:function``."""
        self.operations: Counter[tuple[str, str]] = Counter()
        """The same by (``module:function``, operation)."""
        self._allowed, self._inside = allowed, ExitStack()

    def __enter__(self) -> Self:
        self._thread = threading.get_ident()
        for holder in (torch.cuda, torch.cuda.Event):
            self._inside.enter_context(_watched(holder, "synchronize", self._noted))
        if accelerator_present():
            self._inside.enter_context(_torch_says(self._noted))
        else:
            if torch.cuda.Stream is not torch.cuda.Event:  # platform/cpu.py has one class for both
                self._inside.enter_context(_watched(torch.cuda.Stream, "synchronize", self._noted))
            for name in _READS:
                self._inside.enter_context(_watched(Tensor, name, self._noted))
            self._inside.enter_context(_Recognised(self._noted))
        return self

    def __exit__(self, *exception: Any) -> None:
        self._inside.close()

    def _noted(self, operation: str) -> None:
        if threading.get_ident() != self._thread and not accelerator_present():
            return  # a thread of the reader; backward passes run in other threads on an accelerator only
        site = _call_site()
        if site is None:
            return
        self.counts[site] += 1
        self.operations[site, operation] += 1
        if self._allowed is not None and self.counts[site] > self._allowed.get(site, 0):
            raise HostWaited(
                f"{site} waits for the device ({operation}), for time {self.counts[site]} of "
                f"{self._allowed.get(site, 0)} allowed"
            )


def _call_site() -> str | None:
    """``module:function`` of the wait that is being noted; None in ``HOST_CODE`` on a CPU."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if not accelerator_present() and f"{module}.".startswith(HOST_CODE):
            return None
        if module.startswith(_OURS) and not module.startswith("megatron_omni.platform."):
            return f"{module}:{frame.f_code.co_qualname}"
        frame = frame.f_back
    return "elsewhere"


@contextmanager
def _watched(holder: Any, name: str, noted: Callable[[str], None]) -> Iterator[None]:
    """``holder.name`` says when it is called."""
    own = name in vars(holder)
    original = getattr(holder, name, None)

    def call(*args: Any, **kwargs: Any) -> Any:
        noted(f"{holder.__name__.removeprefix('torch.')}.{name}")
        return None if original is None else original(*args, **kwargs)

    setattr(holder, name, call)
    try:
        yield
    finally:
        if own:
            setattr(holder, name, original)
        else:
            delattr(holder, name)


@contextmanager
def _torch_says(noted: Callable[[str], None]) -> Iterator[None]:
    """Notes torch's warnings of synchronising operations."""
    with warnings.catch_warnings():
        show = warnings.showwarning
        warnings.simplefilter("always")

        def shown(message: Any, *args: Any, **kwargs: Any) -> None:
            if "synchronizing CUDA operation" in str(message):
                noted("cuda")
            else:
                show(message, *args, **kwargs)

        warnings.showwarning = shown
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(mode)


class _Recognised(TorchDispatchMode):
    """Notes the operations that would wait if their tensors were a device's, forward and backward."""

    def __init__(self, noted: Callable[[str], None]) -> None:
        super().__init__()
        self._noted = noted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        if _waits(name, args, kwargs):
            self._noted(name)
        return func(*args, **kwargs)


def _waits(name: str, args: Any, kwargs: Mapping[str, Any]) -> bool:
    if name in _INDEXING:
        masks = [index for index in args[1] if index is not None and index.dtype in (torch.bool, torch.uint8)]
        # x[mask] = number is a fill. So is the backward of it.
        filled = name != "index" and len(masks) == 1 and args[2].numel() == 1 and True not in args[3:4]
        return bool(masks) and not filled
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    if name == "build_permutation":  # ours (csrc/bindings_cuda.cpp)
        return len(args) < 2 or args[1] is None
    return name in _SIZED_BY_VALUES
