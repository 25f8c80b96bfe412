"""A training step of a stage recipe on one rank: time, profile, waits of the host, memory against the plan.

    python -m benchmarks.gpu_check.step --out step.json [--steps 8]

The model is model.py's. After ``WARM_UP`` steps that nobody times, ``--steps`` are timed; one more is watched for the
places where the host waits for its device (platform/host_waits.py), and one more is profiled: kernels by their share, and
calls that stop the host until the device is done (``WAITS``) or copy to it (``TO_HOST``).

Memory: what is held between steps against ``static_bytes`` (exact by definition), the peak of a step against the plan's,
which expects the heaviest micro-batch (docs/parallelism.md). On a CPU only the plan's figures are there.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

WARM_UP = 3
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
"""Calls of the runtime that return when the device is done. ``cudaMemcpyAsync`` is no wait; copies to the host are counted
by what the device did (``TO_HOST``)."""
TO_HOST = "Memcpy DtoH"
KERNELS = 25
"""The longest, named in the report."""
GIB = 2**30


def main(arguments: list[str] | None = None) -> int:
    """Parse, train, write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON of the figures")
    parser.add_argument("--steps", type=int, default=8, help="timed steps (default 8)")
    options = parser.parse_args(arguments)
    from megatron_omni.platform.device import install

    install()
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        found = measure(Path(folder), steps=options.steps)
    options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({name: value for name, value in found.items() if name != "kernels"}))
    return 0


def measure(folder: Path, *, steps: int) -> dict[str, Any]:
    """Figures of ``steps`` steps."""
    import torch

    from benchmarks.gpu_check.model import RECIPE, make_job, parameters
    from megatron_omni.parallel.groups import destroy
    from megatron_omni.platform.device import accelerator_present, synchronize
    from megatron_omni.platform.host_waits import HostWaits
    from megatron_omni.tasks.supervised import SupervisedTask
    from megatron_omni.training.setup import setup

    job = make_job(folder)
    run = setup(job.recipe, SupervisedTask(job.recipe.data.sources))
    held = torch.cuda.memory_allocated() if accelerator_present() else None
    times, losses = [], []
    for number in range(1, WARM_UP + steps + 1):
        start = time.perf_counter()
        losses.append(one_step(run, number))
        synchronize()
        times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if accelerator_present() else None
    with HostWaits() as waits:
        one_step(run, WARM_UP + steps + 1)
    with torch.profiler.profile(activities=torch.profiler.supported_activities()) as profile:
        one_step(run, WARM_UP + steps + 2)
        synchronize()
    timed = times[WARM_UP:]
    found = {
        "recipe": RECIPE.name,
        "sizes": job.sizes,
        **parameters(run.model),
        "tokens": job.recipe.data.seq_length * job.recipe.data.global_batch_size,
        "step_s": {"median": statistics.median(timed), "least": min(timed), "most": max(timed), "first": times[0]},
        "tokens_s": job.recipe.data.seq_length * job.recipe.data.global_batch_size / statistics.median(timed),
        "losses": [float(loss) for loss in losses],
        "memory": memory(job.recipe, held=held, peak=peak),
        "host_waits": waits.counts.total(),
        "host_waits_by_site": dict(waits.counts.most_common()),
        **profiled(profile),
    }
    destroy()
    if not all(loss == loss and loss < float("inf") for loss in found["losses"]):
        raise FloatingPointError(f"losses of the steps: {found['losses']}")
    return found


def one_step(run: Any, number: int) -> Any:
    """Read, forwards and backwards, update; the loss a label token, on its device."""
    from megatron_omni.parallel.schedule import run_step
    from megatron_omni.training.loop import aux_loss_scale
    from megatron_omni.training.optimizer import update
    from megatron_omni.training.step_data import next_batches
    from megatron_omni.training.task import StepInfo

    batches, totals = next_batches(run, run.loader)
    info = StepInfo(
        step=number,
        training=True,
        divisor=totals["labels"],
        aux_loss_scale=aux_loss_scale(run, number),
        stats=None,
    )
    run.model.zero_grad_buffer()
    run.optimizer.zero_grad()
    reports = run_step(partial(run.task.forward_step, info=info), batches, run.model, pg=run.pg, recipe=run.recipe)
    update(run.optimizer, run.scheduler, clip_grad=run.recipe.optim.clip_grad)
    return sum(report[0][0] for report in reports) / max(1, totals["labels"])


def memory(recipe: Any, *, held: int | None, peak: int | None) -> dict[str, float | None]:
    """GiB: what the plan says and what was there."""
    from megatron_omni.estimate.hardware import GPUS
    from megatron_omni.estimate.plan import make_plan

    plan = make_plan(recipe, world_size=1, gpu=GPUS["H200-141GB"])
    (stage,) = plan.stages
    return {
        "planned_between_steps_gib": stage.held.total / GIB,
        "held_before_the_first_step_gib": None if held is None else held / GIB,
        "planned_peak_gib": stage.total / GIB,
        "peak_gib": None if peak is None else peak / GIB,
    }


def profiled(profile: Any) -> dict[str, Any]:
    """The longest kernels of a profiled step (on a CPU: operations), and the calls that wait."""
    from megatron_omni.platform.device import accelerator_present

    on_device = accelerator_present()
    calls: Counter[str] = Counter()
    spent: dict[str, list[float]] = {}
    for event in profile.events():
        if event.name in WAITS or event.name.startswith(TO_HOST):
            calls[event.name] += 1
        if event.is_user_annotation:  # a range around others
            continue
        if event.device_type.name == "CUDA" if on_device else event.cpu_parent is None:
            entry = spent.setdefault(event.name, [0, 0.0])
            entry[0] += 1
            entry[1] += event.time_range.elapsed_us()
    total = sum(us for _, us in spent.values()) or 1.0
    longest = sorted(spent.items(), key=lambda item: -item[1][1])[:KERNELS]
    return {
        "waiting_calls": dict(calls.most_common()),
        "kernel_launches": sum(int(n) for n, _ in spent.values()),
        "device_ms": total / 1e3,
        "kernels": [{"name": n, "calls": int(c), "ms": us / 1e3, "share": us / total} for n, (c, us) in longest],
    }


if __name__ == "__main__":
    raise SystemExit(main())
