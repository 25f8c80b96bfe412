"""Megatron-Core 0.19 on CPU and gloo: one table of patches, each with its reason.

Megatron-Core hard-codes CUDA in four ways: device queries (``torch.cuda.current_device()``), device literals
(``torch.zeros(..., device="cuda")``), type names (``param.type() == "torch.cuda.FloatTensor"``) and streams. A row
names the attribute, what takes its place and why. Device literals are redirected by giving the modules that use them a
view of ``torch`` whose factories map ``cuda`` to ``cpu``; nothing intercepts ordinary tensor operations, so the shim
costs nothing in the hot path. A row whose target does not exist raises: a stale patch must fail loudly when the pin
moves. The optimizer's rows are in ``adam.py``: an accelerator may need them, too.
"""

import contextlib
import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from megatron_omni.platform import adam
from megatron_omni.platform.patch import Patch

_CPU = torch.device("cpu")


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    """``factory`` with any CUDA ``device`` argument replaced by the CPU."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = _CPU
        return factory(*args, **kwargs)

    return call


class _TorchOnCpu(ModuleType):
    """A view of ``torch`` for modules that write ``device="cuda"`` in factory calls."""

    def __init__(self) -> None:
        super().__init__("torch")
        for name in ("tensor", "zeros", "ones", "empty", "full", "arange", "zeros_like", "ones_like", "empty_like"):
            setattr(self, name, _on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


class _NoStream:
    """Stands for CUDA streams and events: everything is already done in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):
            raise AttributeError(name)
        return _returns(None)

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return (0, 0)


def _returns(value: Any) -> Callable[..., Any]:
    """A new function that ignores its arguments; one object a row, since torch's tracing rules refuse a shared one."""
    return lambda *args, **kwargs: value


def _returns_self() -> Callable[..., Any]:
    return lambda self, *args, **kwargs: self


@contextlib.contextmanager
def _no_stream_context(*args: Any, **kwargs: Any) -> Iterator[None]:
    yield


_tensor_type = torch.Tensor.type


def _type_named_as_cuda(self: Tensor, *args: Any, **kwargs: Any) -> Any:
    """``Tensor.type()`` for Megatron's optimizer, which compares it with ``torch.cuda.FloatTensor`` and the like."""
    result = _tensor_type(self, *args, **kwargs)
    if not args and not kwargs and sys._getframe(1).f_globals.get("__name__", "").startswith("megatron.core.optimizer"):
        return result.replace("torch.", "torch.cuda.", 1)
    return result


def _cpu_rng_state(*args: Any, **kwargs: Any) -> Tensor:
    return torch.get_rng_state()


def _set_cpu_rng_state(state: Tensor, *args: Any, **kwargs: Any) -> None:
    torch.set_rng_state(state)


def _seed_cpu(seed: int) -> None:
    torch.random.default_generator.manual_seed(seed)


def _l2_norm(chunk_size: int, flag: Tensor, tensor_lists: list[list[Tensor]], *args: Any) -> tuple[Tensor, None]:
    """fp32 norm of all tensors of the first list as one vector, [1], with Transformer Engine's signature."""
    norms = torch._foreach_norm(tensor_lists[0], 2, dtype=torch.float32)
    return torch.linalg.vector_norm(torch.stack(norms)).reshape(1), None


def _scale_into(chunk_size: int, flag: Tensor, tensor_lists: list[list[Tensor]], scale: float) -> None:
    """Write the first list times ``scale`` into the second."""
    source, target = tensor_lists
    if source is not target:
        torch._foreach_copy_(target, source)
    torch._foreach_mul_(target, scale)


_TORCH_VIEW = _TorchOnCpu()
_LITERALS = "device='cuda' in factory calls"

# Applied before megatron.core is imported.
TORCH_PATCHES: tuple[Patch, ...] = (
    Patch("torch.cuda:current_device", _returns(_CPU), "passed as device= all over Megatron"),
    Patch("torch.cuda:set_device", _returns(None), "called when groups are created"),
    Patch("torch.cuda:synchronize", _returns(None), "called after p2p communication and barriers"),
    Patch("torch.cuda:empty_cache", _returns(None), "called when buffers are freed"),
    Patch("torch.cuda:memory_allocated", _returns(0), "memory statistics"),
    Patch("torch.cuda:max_memory_allocated", _returns(0), "memory statistics"),
    Patch("torch.cuda:memory_reserved", _returns(0), "memory statistics"),
    Patch("torch.cuda:is_current_stream_capturing", _returns(False), "asked before host synchronisation"),
    Patch("torch.cuda:Stream", _NoStream, "side streams are created unconditionally"),
    Patch("torch.cuda:Event", _NoStream, "events on side streams"),
    Patch("torch.cuda:stream", _no_stream_context, "side streams are entered unconditionally"),
    Patch("torch.cuda:current_stream", _NoStream, "grad sync waits on the current stream"),
    Patch("torch.cuda:get_rng_state", _cpu_rng_state, "RNG tracker and checkpointed RNG state"),
    Patch("torch.cuda:set_rng_state", _set_cpu_rng_state, "RNG tracker and checkpointed RNG state"),
    Patch("torch.cuda:manual_seed", _seed_cpu, "RNG tracker seeds its streams with it"),
    Patch("torch:Tensor.cuda", _returns_self(), "weights and received tensors are moved with .cuda()"),
    Patch("torch.nn:Module.cuda", _returns_self(), "models are moved with .cuda()"),
    Patch("torch:Tensor.record_stream", _returns(None), "side streams"),
    Patch("torch:Tensor.type", _type_named_as_cuda, "optimizers compare type names with torch.cuda.*"),
)

# Applied once megatron.core is imported.
MEGATRON_PATCHES: tuple[Patch, ...] = (
    Patch("megatron.core.pipeline_parallel.schedules:torch", _TORCH_VIEW, _LITERALS),
    Patch("megatron.core.optimizer.optimizer:torch", _TORCH_VIEW, _LITERALS),
    Patch("megatron.core.optimizer.clip_grads:torch", _TORCH_VIEW, _LITERALS),
    Patch("megatron.core.optimizer.clip_grads:l2_norm_impl", _l2_norm, "a device='cuda' literal, and a loop in Python"),
    Patch("megatron.core.optimizer.clip_grads:multi_tensor_scale_impl", _scale_into, "a loop in Python"),
    Patch("megatron.core.optimizer.grad_scaler:torch", _TORCH_VIEW, _LITERALS),
    Patch("megatron.core.optimizer.layer_wise_optimizer:torch", _TORCH_VIEW, _LITERALS),
    Patch("megatron.core.distributed.param_and_grad_buffer:torch", _TORCH_VIEW, _LITERALS),
    Patch("megatron.core.transformer.utils:torch", _TORCH_VIEW, _LITERALS),
    Patch("megatron.core.dist_checkpointing.mapping:torch", _TORCH_VIEW, _LITERALS),
    Patch("megatron.core.dist_checkpointing.exchange_utils:torch", _TORCH_VIEW, _LITERALS),
    Patch("megatron.core.dist_checkpointing.strategies.state_dict_saver:torch", _TORCH_VIEW, _LITERALS),
    Patch("megatron.core.tensor_parallel.random:_get_cuda_rng_state", _cpu_rng_state, "RNG tracker"),
    Patch("megatron.core.tensor_parallel.random:_set_cuda_rng_state", _set_cpu_rng_state, "RNG tracker"),
)

_installed = False


def install() -> None:
    """Apply the table, once. ``megatron.core`` must not have been imported before."""
    global _installed
    if _installed:
        return
    if "megatron.core" in sys.modules:
        raise RuntimeError(
            "platform.install() must run before megatron.core is imported; call it first in the entry point"
        )
    for patch in TORCH_PATCHES:
        patch.apply()
    _import_megatron_without_compilation()
    for patch in MEGATRON_PATCHES + adam.PATCHES:  # Transformer Engine's and Apex's Adam run on CUDA only
        patch.apply()
    _installed = True


def _import_megatron_without_compilation() -> None:
    """Import ``megatron.core`` with ``torch.compile`` switched off.

    Its ``jit_fuser`` would compile small functions at first use.
    """
    compile_function = torch.compile
    torch.compile = lambda model=None, **kwargs: model if model is not None else (lambda f: f)  # type: ignore[assignment]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "... is not installed", six times
            jit = importlib.import_module("megatron.core.jit")
            importlib.import_module("megatron.core.models.backends")
    finally:
        torch.compile = compile_function
    jit.disable_jit_fuser()
