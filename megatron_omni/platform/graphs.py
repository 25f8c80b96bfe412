"""A computation of fixed shapes, recorded once as a CUDA graph and replayed: one launch where there were thousands.

What is recorded reads and writes the same memory at every replay. So its inputs lie in tensors that the caller fills before
each call, it never waits for the device, and no size in it depends on a value.
"""

from collections.abc import Callable

import torch

WARM_UPS = 2
"""Calls before recording: libraries choose algorithms and make workspaces, which cannot be recorded."""


def recorded[T](compute: Callable[[], T]) -> tuple[T, Callable[[], None]]:
    """What ``compute`` returns, tensors of one place, and a function that computes it anew from the inputs as they are then.

    ``compute`` is called first, with the inputs as they are now, so it may be called several times with the same effect.
    Needs a CUDA device.
    """
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(WARM_UPS):
            compute()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = compute()
    return output, graph.replay
