"""Layouts in bf16, in which a run may differ by rounding but not by more: sampled routing and auxiliary loss on.

A bf16 run of one rank strays from the fp32 run of one rank. A layout sums in another order, so it strays to another side. At
every step it must lie within twice the distance that one rank's bf16 run reaches over the 20 steps; its distance at the very
step is no measure, since it passes through zero. Measured: at most 0.83 of that distance in the loss, 1.08 in the gradient
norm. With one rank's gradients left out: at least 11 times in the loss from step 2 on, 61 times in the gradient norm.
"""

from pathlib import Path
from typing import Any

import pytest

from megatron_omni.training.setup import Run
from tests.distributed.tiny_run import EP, OVERLAP, PP, TP, make_corpus, run_tiny, tiny_recipe

STEPS = 20
Distances = dict[str, list[float]]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def fp32(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    recipe = tiny_recipe(corpus, tmp_path_factory.mktemp("fp32"), train_iters=STEPS)
    return run_tiny(recipe, 1)


@pytest.fixture(scope="module")
def reach(corpus: Path, tmp_path_factory: pytest.TempPathFactory, fp32: list[dict[str, float]]) -> dict[str, float]:
    """How far one rank's bf16 run gets from fp32."""
    strayed = distances(bf16_run(corpus, tmp_path_factory.mktemp("bf16"), 1), fp32)
    return {name: max(values) for name, values in strayed.items()}


def bf16_run(corpus: Path, run_dir: Path, world_size: int, before: Any = None, **layout: Any) -> list[dict[str, float]]:
    recipe = tiny_recipe(corpus, run_dir, train_iters=STEPS, optim__precision="bf16", **layout)
    return run_tiny(recipe, world_size, before)


def distances(run: list[dict[str, float]], fp32: list[dict[str, float]]) -> Distances:
    """Relative, step by step."""
    assert [record["step"] for record in run] == list(range(1, STEPS + 1))
    return {
        name: [abs(mine[name] / theirs[name] - 1) for mine, theirs in zip(run, fp32, strict=True)]
        for name in ("lm loss", "grad-norm")
    }


def too_far(strayed: Distances, reach: dict[str, float]) -> list[str]:
    return [
        f"step {step}: {name} {distance:.2e} from fp32, one rank's bf16 at most {reach[name]:.2e}"
        for name, values in strayed.items()
        for step, distance in enumerate(values, start=1)
        if distance > 2 * reach[name]
    ]


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        pytest.param(2, OVERLAP, id="dp2-overlap"),
        pytest.param(2, PP | {"parallel__recompute": "full"}, id="pp2-recompute"),
        pytest.param(2, TP | EP, id="tp2-ep2"),
        pytest.param(4, TP | PP | EP, id="tp2-pp2-ep2"),
    ],
)
def test_a_layout_strays_no_further_than_rounding(
    corpus: Path, tmp_path: Path, fp32: Any, reach: dict[str, float], world_size: int, layout: dict[str, Any]
) -> None:
    assert reach["lm loss"] < 0.05, "bf16 itself is far away: it bounds nothing"
    assert not too_far(distances(bf16_run(corpus, tmp_path, world_size, **layout), fp32), reach)


def test_a_gradient_that_is_left_out_is_seen(corpus: Path, tmp_path: Path, fp32: Any, reach: dict[str, float]) -> None:
    """The bound is no rubber band: one rank's gradients do not reach the reduction, in every step."""
    seen = too_far(distances(bf16_run(corpus, tmp_path, 2, leave_out_one_rank), fp32), reach)
    for name, first in (("lm loss", 2), ("grad-norm", 1)):  # the first loss is of the first weights
        assert [line for line in seen if f": {name} " in line and int(line[5 : line.index(":")]) == first]


def leave_out_one_rank(run: Run) -> None:
    reduce = run.model.finish_grad_sync

    def reduce_without(*args: Any, **kwargs: Any) -> None:
        if run.place.dp_rank == 1:
            for buffer in run.model.buffers + run.model.expert_parallel_buffers:
                buffer.grad_data.zero_()
        reduce(*args, **kwargs)

    run.model.finish_grad_sync = reduce_without
