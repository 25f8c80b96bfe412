"""The compiled kernels: loads ``_kernels.so`` (and ``_kernels_cuda.so`` where it was built) once, at import.

``op(name)`` is the operator ``torch.ops.megatron_omni.<name>`` for the ops files to call. Without the shared object, or
with one built for another torch, the package still imports and its references work; an op then raises with what to do.

On a CPU the ops run on one of several engines, kernels compiled for one instruction set each: the fastest that the
processor has, or the one that OMNI_CPU_KERNELS names. csrc/cpu/isa.h chooses; ``cpu_engine`` and ``use_cpu_engine`` are
its Python side.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

_FOLDER = Path(__file__).parent
_REBUILD = "build the kernels with `pip install -e .` (or `make ext` in a checkout)"


def _load(file: str) -> str | None:
    """Load a shared object; None when it is loaded, else why not."""
    path = _FOLDER / file
    if not path.exists():
        return f"{path} is missing: {_REBUILD}"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path} does not load with torch {torch.__version__}: {_REBUILD} ({error})"
    return None


CPU_ERROR = _load("_kernels.so")
"""None, or why the CPU kernels (and with them every op) are not there."""
CUDA_ERROR = _load("_kernels_cuda.so") if CPU_ERROR is None else CPU_ERROR
"""None, or why the CUDA kernels are not there."""


def missing(name: str) -> str | None:
    """Why ``megatron_omni::name`` is not there, or None."""
    if CPU_ERROR is None and not hasattr(torch.ops.megatron_omni, name):
        return f"{_FOLDER / '_kernels.so'} is from older sources: {_REBUILD}"
    return CPU_ERROR


def op(name: str) -> Callable[..., Any]:
    """The operator ``megatron_omni::name``, or a function that raises RuntimeError where kernels are not built."""
    why = missing(name)
    if why is None:
        return getattr(torch.ops.megatron_omni, name).default

    def raising(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(f"megatron_omni::{name} is not available: {why}")

    return raising


def register_fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: the function gives shapes and dtypes of ``megatron_omni::name`` to torch.compile; the schema is C++."""
    if missing(name) is None:
        return torch.library.register_fake(f"megatron_omni::{name}")
    return lambda function: function


MEASURED_ENGINES = ("avx512", "avx2")
"""Those that were timed against torch's products: ``model.moe.kernels=omni`` takes no other one unless it is named."""


def cpu_engine() -> str:
    """The engine that CPU ops run on: "avx512", "avx2", "neon" or "portable" (plain C++).

    ValueError where OMNI_CPU_KERNELS names one that this processor cannot run, or that does not exist.
    """
    name: str = op("cpu_engine")()
    return name


def cpu_engines() -> list[str]:
    """All engines that this processor can run, fastest first."""
    names: str = op("cpu_engines")()
    return names.split(", ")


def cpu_engine_is_forced() -> bool:
    """Whether OMNI_CPU_KERNELS or :func:`use_cpu_engine` named the engine."""
    forced: bool = op("cpu_engine_is_forced")()
    return forced


@contextlib.contextmanager
def use_cpu_engine(name: str) -> Iterator[None]:
    """CPU ops inside run on this engine, in every thread; ValueError where the processor cannot run it."""
    before = cpu_engine() if cpu_engine_is_forced() else ""
    op("set_cpu_engine")(name)
    try:
        yield
    finally:
        op("set_cpu_engine")(before)
