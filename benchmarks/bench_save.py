"""What saving and resuming cost: how long training stops, main memory on top of the run's own, bytes read.

    python -m benchmarks.bench_save RECIPE [key=value ...] [--saves N] [--json FILE]
    torchrun --nproc-per-node 2 -m benchmarks.bench_save RECIPE ...

A synchronous save stops training for all of it. A background save stops it for its start (copying) and, some steps
later, for its end (metadata, manifest, rename); both are measured, what a thread does beside training is not. One save
of each kind comes first and is not counted: memory is taken from the system then. Medians of wall times, and of the
processor time of the training thread, which neighbours on the machine disturb less; the files are flushed to the disk of
``run_dir`` in either case.

Memory is the growth of the resident set of a rank, at its peak: of the saves over what the run had before the first; of a
resume, in a process of its own, over what it had before it read. ``--json`` writes a list with one table for each rank:
``save_peak_bytes``, ``stall_seconds`` (of the kind that ``checkpoint.async_save`` says), ``load_peak_bytes``,
``bytes_read`` (by verifying and loading), ``normals_drawn`` (normal values drawn until the resumed run is ready).
"""

import argparse
import gc
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

AT_ONCE, BACKGROUND = "at once", "in the background"


def main(arguments: list[str] | None = None) -> int:
    """Parse, run, print what rank 0 found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--saves", type=int, default=4)
    parser.add_argument("--json", metavar="FILE", help="write the figures of every rank to FILE")
    options = parser.parse_intermixed_args(arguments)
    from megatron_omni.config.load import load_recipe
    from megatron_omni.config.validate import validate
    from megatron_omni.platform.device import install

    rank, world_size = int(os.environ.get("RANK") or 0), int(os.environ.get("WORLD_SIZE") or 1)
    recipe = load_recipe(options.recipe, [*options.overrides, "checkpoint.keep=1"])
    validate(recipe, world_size=world_size)
    install()
    import megatron_omni.training.setup  # noqa: F401  (once, before the processes part)

    place = rank, world_size
    saved, ranks = _in_a_process(_measure_saves, recipe, place, options.saves)
    loaded = _in_a_process(_measure_load, recipe, place)
    if rank == 0:
        shutil.rmtree(Path(recipe.run_dir) / "checkpoints", ignore_errors=True)
        if options.json is not None:
            figures = [one | other for one, other in zip(ranks, loaded, strict=True)]
            Path(options.json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        print(saved)
        for figure in loaded:
            print(", ".join(f"{name} {value / 1e6:.1f} M" for name, value in figure.items()))
    return 0


def _in_a_process(measure: Callable[..., Any], *arguments: Any) -> Any:
    """``measure(*arguments)`` in a fork of this process: no memory that an earlier measurement took is there to be used."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: (sender.send(measure(*arguments)), os._exit(0)))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise SystemExit(1) from None  # its error is on the terminal


def _start(recipe: Any, place: tuple[int, int], phase: str) -> Any:
    """The run of ``recipe`` on this rank."""
    import torch.distributed as dist

    from megatron_omni.parallel.groups import initialize
    from megatron_omni.tasks.supervised import SupervisedTask
    from megatron_omni.training.setup import setup

    pg, (rank, world_size) = None, place
    if world_size > 1:
        Path(recipe.run_dir).mkdir(parents=True, exist_ok=True)
        # The launcher's own store would keep the keys of the first phase for the second; the name is this launch's.
        name = f".bench_{phase}_{os.environ.get('MASTER_PORT')}_{os.environ.get('TORCHELASTIC_RUN_ID')}"
        store = dist.FileStore(str(Path(recipe.run_dir) / name), world_size)
        pg = initialize(recipe.parallel, store=store, rank=rank, world_size=world_size)
    return setup(recipe, SupervisedTask(recipe.data.sources), pg=pg)


def _everyone(value: Any) -> list[Any]:
    import torch.distributed as dist

    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _measure_saves(recipe: Any, place: tuple[int, int], num_saves: int) -> tuple[str, list[dict[str, Any]]]:
    """Text for the terminal and every rank's figures; leaves the last checkpoint."""
    from megatron_omni.platform.device import synchronize
    from megatron_omni.training.setup import begin_save

    try:
        from megatron_omni.checkpoint.memory import SaveMemory
    except ImportError:  # before 2026-11-29
        from megatron_omni.checkpoint.gathering import GatheredState as SaveMemory

    run, memory = _start(recipe, place, "save"), SaveMemory()
    gc.collect()
    gc.freeze()  # as a run does
    stalls: dict[str, list[float]] = {AT_ONCE: [], BACKGROUND: []}
    processor: dict[str, list[float]] = {kind: [] for kind in stalls}
    peaks, parts, before = {kind: 0 for kind in stalls}, [], resident_bytes()
    for number in range(num_saves + 1):
        for kind, times in stalls.items():
            background = kind == BACKGROUND
            run.state.step += 1
            synchronize()
            reset_peak()
            # The alternating sum leaves out what lies between the second and the third reading: no training waits there.
            start, busy = time.perf_counter(), time.thread_time()
            pending = begin_save(run, background=background, memory=memory if background else None)
            started, busy = time.perf_counter(), time.thread_time() - busy
            while not pending.written:
                time.sleep(0.01)
            resumed, busy = time.perf_counter(), time.thread_time() - busy
            directory = pending.finish()
            ended, busy = time.perf_counter(), time.thread_time() - busy
            peaks[kind] = max(peaks[kind], peak_bytes() - before)
            if number > 0:
                times.append(ended - resumed + started - start)
                processor[kind].append(busy)
                if background:
                    parts.append((started - start, ended - resumed, resumed - started))
    at_once, background_stall = (statistics.median(times) for times in stalls.values())
    start_s, finish_s, between_s = (statistics.median(column) for column in zip(*parts))
    busy_at_once, busy_in_background = (statistics.median(times) for times in processor.values())
    size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    text = (
        f"{size / 1e9:.2f} GB; at once: {at_once:.3f} s ({size / at_once / 1e9:.2f} GB/s, {busy_at_once:.3f} s of "
        f"processor, {peaks[AT_ONCE] / 1e6:.0f} MB)\n"
        f"in the background: {background_stall:.3f} s of stall = {background_stall / at_once:.1%} "
        f"(start {start_s:.3f} s, end {finish_s:.3f} s, {busy_in_background:.3f} s of processor; files took "
        f"{between_s:.3f} s beside training; {peaks[BACKGROUND] / 1e6:.0f} MB)"
    )
    kind = BACKGROUND if recipe.checkpoint.async_save else AT_ONCE
    figures = _everyone({"save_peak_bytes": peaks[kind], "stall_seconds": statistics.median(stalls[kind])})
    return text, figures


def _measure_load(recipe: Any, place: tuple[int, int]) -> list[dict[str, Any]]:
    """Every rank's figures of a resume."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from megatron_omni.training import setup as setup_module

    figures: dict[str, Any] = {"load_peak_bytes": 0, "bytes_read": 0, "normals_drawn": 0}

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if func.overloadpacket.__name__ in ("normal", "normal_", "normal_functional", "randn"):
                figures["normals_drawn"] += result.numel()
            return result

    def measured(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **settings: Any) -> Any:
            reset_peak()
            before, read = resident_bytes(), bytes_read()
            result = function(*args, **settings)
            figures["bytes_read"] += bytes_read() - read
            figures["load_peak_bytes"] = max(figures["load_peak_bytes"], peak_bytes() - before)
            return result

        return call

    setup_module.find_checkpoint = measured(setup_module.find_checkpoint)
    setup_module.resume = measured(setup_module.resume)
    recipe.load = "auto"
    with Counting():
        _start(recipe, place, "load")
    return _everyone(figures)


def resident_bytes() -> int:
    """Resident set of this process now."""
    return _status("VmRSS")


def peak_bytes() -> int:
    """Its highest since :func:`reset_peak`."""
    return _status("VmHWM")


def reset_peak() -> None:
    """Count the peak anew."""
    Path("/proc/self/clear_refs").write_text("5")


def bytes_read() -> int:
    """By this process, from files and caches alike."""
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


def _status(name: str) -> int:
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) * 1024


if __name__ == "__main__":
    sys.exit(main())
