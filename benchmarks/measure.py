"""How anything here is measured: a clock that other programs do not disturb where one exists, peak memory, and what
this machine can do at best.

Clock: thread CPU time on one CPU thread (unmoved by neighbours), wall time on several, wall time around a
synchronisation on an accelerator. Ceilings are taken in the same run as the measurements they judge: the copy rate of
buffers far beyond the caches, and the best rate of any matrix product at hand.
"""

import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

FRESH_PAGES, ATTEMPTS = 16, 8
COPY_BYTES = 256 << 20
GEMM_SIZE = {"cpu": 1536, "cuda": 8192}


def clock_name(device: torch.device, threads: int) -> str:
    """What :func:`seconds` measures."""
    if device.type != "cpu":
        return "wall time between synchronisations"
    return "thread CPU time" if threads == 1 else "wall time"


def synchronize(device: torch.device) -> None:
    """Wait for the accelerator; nothing on a CPU."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def seconds(run: Callable[[], Any], *, device: torch.device, threads: int) -> tuple[float, Any]:
    """Duration and result of one call."""
    clock = time.thread_time if device.type == "cpu" and threads == 1 else time.perf_counter
    synchronize(device)
    start = clock()
    result = run()
    synchronize(device)
    return clock() - start, result


def on_warm_heap[T](sample: Callable[[], T], *, device: torch.device) -> T:
    """On a CPU the first of its repetitions that took hardly any fresh pages from the system, or the last.

    Freed memory stays with the process (warm_heap.py), but now and then an allocation still finds no room in it, and its
    first touches cost more than many an op. The sample must not return tensors: they would take the room of the next.
    """
    for _ in range(ATTEMPTS):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        result = sample()
        if device.type != "cpu" or resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before <= FRESH_PAGES:
            break
    return result


def peak_bytes(run: Callable[[], Any], *, device: torch.device) -> int:
    """Most bytes of tensors alive at once that ``run`` allocated, its result included.

    On a CPU from the records of torch's allocator: scratch that a library allocates itself is not in them.
    """
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)
        before = torch.accelerator.memory_allocated(device)
        run()
        return int(torch.accelerator.max_memory_allocated(device)) - int(before)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        kept = run()
    level = peak = 0
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            level += event.nbytes()
            peak = max(peak, level)
    del kept
    return peak


def copy_ceiling(*, device: torch.device, threads: int, repeats: int = 5) -> float:
    """Bytes read plus written per second by a copy between buffers of ``COPY_BYTES`` each."""
    source = torch.ones(COPY_BYTES // 4, device=device)
    target = torch.zeros_like(source)
    target.copy_(source)
    times = [seconds(lambda: target.copy_(source), device=device, threads=threads)[0] for _ in range(repeats)]
    return 2 * COPY_BYTES / statistics.median(times)


def gemm_ceiling(
    dtype: torch.dtype,
    *,
    device: torch.device,
    threads: int,
    others: list[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] | None = None,
    repeats: int = 5,
) -> float:
    """FLOP/s of the fastest square product in ``dtype``: torch.mm at each precision setting, and ``others``."""
    size = GEMM_SIZE.get(device.type, GEMM_SIZE["cpu"])
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator).to(device, dtype) for _ in range(2))
    best = 0.0
    before = torch.get_float32_matmul_precision()
    for precision in ("highest", "medium") if dtype == torch.float32 else ("highest",):
        torch.set_float32_matmul_precision(precision)
        for product in [torch.mm] if precision != "highest" else [torch.mm, *(others or [])]:
            product(a, b)
            times = [
                seconds(lambda p=product: p(a, b), device=device, threads=threads)[0]  # type: ignore[misc]
                for _ in range(repeats)
            ]
            best = max(best, 2 * size**3 / statistics.median(times))
    torch.set_float32_matmul_precision(before)
    return best
