"""How long saving stops training: at once against in the background (checkpoint.async_save), on one rank.

    python -m benchmarks.bench_save RECIPE [key=value ...] [--saves N]

A synchronous save stops training for all of it. A background save stops it for its start (gathering, copying) and, some
steps later, for its end (metadata, manifest, rename); both are measured, what a thread does beside training is not. One
save of each kind comes first and is not counted: memory is taken from the system then. Medians of wall times, and of the
processor time of the training thread, which neighbours on the machine disturb less; the files are flushed to the disk of
``run_dir`` in either case.
"""

import argparse
import gc
import shutil
import statistics
import sys
import time


def main(arguments: list[str] | None = None) -> int:
    """Parse, run, print a line for each kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--saves", type=int, default=4)
    options = parser.parse_intermixed_args(arguments)
    from megatron_omni.config.load import load_recipe
    from megatron_omni.config.validate import validate
    from megatron_omni.platform.device import install, synchronize

    recipe = load_recipe(options.recipe, [*options.overrides, "checkpoint.keep=1"])
    validate(recipe)
    install()
    from megatron_omni.checkpoint.gathering import GatheredState
    from megatron_omni.parallel.groups import destroy
    from megatron_omni.tasks.supervised import SupervisedTask
    from megatron_omni.training.setup import begin_save, setup

    run = setup(recipe, SupervisedTask(recipe.data.sources))
    memory = GatheredState()
    gc.collect()
    gc.freeze()  # as a run does
    stalls: dict[str, list[float]] = {"at once": [], "in the background": []}
    processor: dict[str, list[float]] = {kind: [] for kind in stalls}
    parts = []
    for number in range(options.saves + 1):
        for kind, times in stalls.items():
            background = kind == "in the background"
            run.state.step += 1
            synchronize()
            # The alternating sum leaves out what lies between the second and the third reading: no training waits there.
            start, busy = time.perf_counter(), time.thread_time()
            pending = begin_save(run, background=background, memory=memory)
            started, busy = time.perf_counter(), time.thread_time() - busy
            while not pending.written:
                time.sleep(0.01)
            resumed, busy = time.perf_counter(), time.thread_time() - busy
            directory = pending.finish()
            ended, busy = time.perf_counter(), time.thread_time() - busy
            if number > 0:
                times.append(ended - resumed + started - start)
                processor[kind].append(busy)
                if background:
                    parts.append((started - start, ended - resumed, resumed - started))
    size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    shutil.rmtree(run.checkpoints, ignore_errors=True)  # a thread may still be deleting what the last save retired
    destroy()
    at_once, background_stall = (statistics.median(times) for times in stalls.values())
    start_s, finish_s, between_s = (statistics.median(column) for column in zip(*parts))
    busy_at_once, busy_in_background = (statistics.median(times) for times in processor.values())
    print(
        f"{size / 1e9:.2f} GB; at once: {at_once:.3f} s ({size / at_once / 1e9:.2f} GB/s, {busy_at_once:.3f} s of processor)"
    )
    print(
        f"in the background: {background_stall:.3f} s of stall = {background_stall / at_once:.1%} "
        f"(start {start_s:.3f} s, end {finish_s:.3f} s, {busy_in_background:.3f} s of processor; files took "
        f"{between_s:.3f} s beside training)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
