"""Modules without initial weights, where a checkpoint is loaded next."""

from typing import Any

from torch.overrides import TorchFunctionMode


class NothingDrawn(TorchFunctionMode):
    """Modules that are built inside keep what their memory holds instead of the random values of their constructors.

    Memory that nobody writes to costs nothing on the CPU; loading then writes it once.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _DRAWS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


_DRAWS = {"normal_", "uniform_", "kaiming_uniform_", "xavier_uniform_", "trunc_normal_"}
"""Names, since transformers puts functions of its own in the place of torch's."""
