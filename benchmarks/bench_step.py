"""CPU time and memory of training steps of a recipe on one rank, data loading not counted.

    python -m benchmarks.bench_step RECIPE [key=value ...] [--steps N]

Thread CPU time, so that neighbours on the machine do not count; medians after three steps of warming up. The
allocator is the run's own (platform/allocator.py); to see what it brings, take it away with glibc's defaults:
``MALLOC_MMAP_THRESHOLD_=131072 python -m benchmarks.bench_step ...``.
"""

import argparse
import resource
import statistics
import sys
import time
from functools import partial

WARM_UP_STEPS = 3


def main(arguments: list[str] | None = None) -> int:
    """Parse, run, print one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_intermixed_args(arguments)
    from megatron_omni.config.load import load_recipe
    from megatron_omni.config.validate import validate
    from megatron_omni.platform.device import install

    recipe = load_recipe(options.recipe, options.overrides)
    validate(recipe)
    install()
    import torch

    from megatron_omni.parallel.groups import destroy
    from megatron_omni.parallel.schedule import run_step
    from megatron_omni.tasks.supervised import SupervisedTask
    from megatron_omni.training.loop import aux_loss_scale
    from megatron_omni.training.optimizer import update
    from megatron_omni.training.setup import setup
    from megatron_omni.training.step_data import next_batches
    from megatron_omni.training.task import StepInfo

    torch.set_num_threads(1)
    run = setup(recipe, SupervisedTask(recipe.data.sources))
    times, faults = [], []
    for step in range(1, WARM_UP_STEPS + options.steps + 1):
        batches, totals = next_batches(run, run.loader)
        start, before = time.thread_time(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        info = StepInfo(
            step=step,
            training=True,
            divisor=totals["labels"],
            aux_loss_scale=aux_loss_scale(run, step),
            stats=None,
        )
        run.model.zero_grad_buffer()
        run.optimizer.zero_grad()
        run_step(partial(run.task.forward_step, info=info), batches, run.model, pg=run.pg, recipe=recipe)
        update(run.optimizer, run.scheduler, clip_grad=recipe.optim.clip_grad)
        times.append(time.thread_time() - start)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    destroy()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{statistics.median(times[WARM_UP_STEPS:]) * 1e3:.1f} ms a step (thread CPU time), "
        f"{statistics.median(faults[WARM_UP_STEPS:]):.0f} page faults a step, peak resident {peak:.0f} MiB"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
