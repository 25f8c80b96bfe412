"""The host waits for its device where these tables say, and nowhere else: in a step of the training loop, Megatron included.

On a CPU every tensor of the model counts as a device's (platform/host_waits.py).
"""

from pathlib import Path
from typing import Any

import pytest

from megatron_omni.config.run import Recipe
from megatron_omni.platform.host_waits import HostWaits
from megatron_omni.training import loop
from megatron_omni.training.logger import RunLogger
from megatron_omni.training.loop import train
from tests.distributed.harness import Rank, run_ranks
from tests.distributed.tiny_run import EP, PP, TP, make_corpus, prepare, tiny_recipe

DISPATCH = "megatron_omni.models.moe.dispatcher:AllToAllDispatcher._dispatch"
HEADER = "megatron_omni.parallel.sharing:_share_numbers"
SUMS = "megatron_omni.parallel.sharing:_summed"
NORM = "megatron.core.optimizer.clip_grads:get_grad_norm_fp32"
PLAIN, LOGGED, STEPS = 2, 3, 3
"""A step that is not logged, and one that is, whose forwards and backwards also count the experts that tokens use."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def watched(rank: Rank, recipe: Recipe, allowed: dict[str, int]) -> list[HostWaits]:
    """Train; the waits of the whole of step ``PLAIN`` and of the forwards and backwards of step ``LOGGED``."""
    run, (whole, schedule) = prepare(rank, recipe), (HostWaits(allowed), HostWaits(allowed))
    begin, end, run_step = RunLogger.begin_step, RunLogger.end_step, loop.run_step

    def begin_step(self: RunLogger, step: int) -> None:
        begin(self, step)
        if step == PLAIN:
            whole.__enter__()

    def end_step(self: RunLogger, **settings: Any) -> None:
        if run.state.step == PLAIN:
            whole.__exit__()
        end(self, **settings)

    def guarded_step(*args: Any, **settings: Any) -> Any:
        if run.state.step != LOGGED:
            return run_step(*args, **settings)
        with schedule:
            return run_step(*args, **settings)

    RunLogger.begin_step, RunLogger.end_step, loop.run_step = begin_step, end_step, guarded_step  # type: ignore[method-assign]
    assert train(run) == 0
    return [whole, schedule]


BF16 = {"optim__precision": "bf16"}
ALL_GATHER = {"model__moe__moe_token_dispatcher_type": "allgather"}
LAYOUTS = {
    "one rank": (1, {}, {}),
    # Two data ranks also agree on stalled headers: the sources have no index.
    "ep2": (2, EP, {SUMS: 2}),
    "ep2, gathered": (2, EP | ALL_GATHER, {SUMS: 2}),
    "tp2": (2, TP | BF16, {SUMS: 1, HEADER: 1}),
    "pp2": (2, PP | BF16, {SUMS: 1, HEADER: 1}),
}


@pytest.mark.parametrize(("layout", "packing"), [*((layout, True) for layout in LAYOUTS), ("pp2", False)])
def test_a_step_waits_once_for_each_moe_layer_and_pass_and_three_times_besides(
    layout: str, packing: bool, corpus: Path, tmp_path: Path
) -> None:
    world, changes, per_step = LAYOUTS[layout]
    recipe = tiny_recipe(
        corpus,
        tmp_path,
        **changes,
        parallel__recompute="full",
        data__packing=packing,
        train_iters=STEPS,
        log__interval=STEPS,
    )
    layers = recipe.model.num_layers // recipe.parallel.pipeline_model_parallel_size
    ranks_of_a_batch = recipe.parallel.tensor_model_parallel_size * recipe.parallel.pipeline_model_parallel_size
    micro_batches = recipe.data.global_batch_size // (recipe.data.micro_batch_size * world // ranks_of_a_batch)
    dispatch = DISPATCH.replace("AllToAll", "AllGather") if "gathered" in layout else DISPATCH
    in_layers = {dispatch: layers * micro_batches * 2}  # forward and replay; the backward knows the forward's sizes
    per_step = per_step | {NORM: 1}
    assert sum(per_step.values()) <= 3
    for whole, schedule in run_ranks(watched, world, recipe, in_layers | per_step):
        assert dict(whole.counts) == in_layers | per_step
        assert dict(schedule.counts) == in_layers
