"""The MoE layer under every layout: output and every gradient equal one rank's, in fp32 to 1e-5.

The control is one rank that computes each micro-batch in turn. Under test, data-parallel rank d computes micro-batch
d and tensor-parallel rank t its t-th sequence shard; gradients are then summed as Megatron would (experts over the
expert data-parallel group, the rest over data parallelism, and over tensor parallelism where marked
``sequence_parallel``).
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_omni.config.parallel import ParallelConfig
from megatron_omni.models.moe.balance import reduce_stats
from megatron_omni.models.moe.context import TokenContext, token_context
from tests.distributed.harness import Rank, run_ranks
from tests.unit.moe_problem import LAYER, build_layer, local_slice, micro_batch, settings, weights

LAYOUTS = {
    # name: (ranks, tensor parallel, expert parallel, expert tensor parallel)
    "EP2": (2, 1, 2, 1),
    "TP2 with sequence parallelism": (2, 2, 1, 1),
    "ETP2": (2, 2, 1, 2),
    "EP2 over a TP2 group": (2, 2, 2, 1),
    "TP2 x EP2, two data-parallel ranks": (4, 2, 2, 1),
    "EP2 x ETP2, two data-parallel ranks": (4, 2, 2, 2),
    "EP4 over TP2 x DP2": (4, 2, 4, 1),
}

CASES: dict[str, dict[str, Any]] = {
    "sampled, paper": {"moe": {}},
    "sampled, grin, capacity": {"moe": {"gradient_estimator": "grin", "capacity_factor": 0.6, "min_capacity": 4}},
    "release": {"moe": {"gradient_estimator": "grin", "routing_weight_mode": "release"}},
    "evaluation": {"moe": {}, "stochastic": False},
    "lengths differ over data parallelism": {"moe": {}, "sequences": [24, 12]},
    "all tokens to null": {"moe": {}, "marked": ["all", "all"]},
    "all tokens of one data-parallel rank to null": {"moe": {}, "marked": ["all", "none"]},
}


def problem(case: dict[str, Any], index: int) -> tuple[torch.Tensor, torch.Tensor, TokenContext]:
    """Micro-batch ``index`` of a case."""
    return micro_batch(
        index,
        sequence=case.get("sequences", [24, 24])[index],
        marked=case.get("marked", ["none", "none"])[index],
        stochastic=case.get("stochastic", True),
    )


def shard(x: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    return x.chunk(size, dim=0)[rank]


def shard_context(ctx: TokenContext, rank: int, size: int) -> TokenContext:
    names = ("sample_ids", "sample_positions", "modality", "has_label", "padding")
    return replace(ctx, **{name: shard(getattr(ctx, name), rank, size).clone() for name in names})


def control(case: dict[str, Any], dispatcher: str, micro_batches: int) -> dict[str, Any]:
    """One rank, micro-batch after micro-batch, gradients accumulated."""
    moe = settings(moe_token_dispatcher_type=dispatcher, **case["moe"])
    layer = build_layer(moe, weights(null_bias=60.0))
    results: dict[str, Any] = {"y": [], "dx": [], "tokens": 0.0, "selected": 0.0, "aux": 0.0}
    for index in range(micro_batches):
        hidden, gradient, ctx = problem(case, index)
        hidden.requires_grad_()
        with token_context(ctx):
            y, _ = layer(hidden)
        y.backward(gradient)
        results["y"].append(y.detach())
        results["dx"].append(hidden.grad)
        assert ctx.stats is not None
        results["selected"] = results["selected"] + ctx.stats.selected[LAYER]
        results["aux"] = results["aux"] + ctx.stats.aux_loss[LAYER]
    results["grads"] = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return results


def _rank(rank: Rank, parallel: dict[str, int], dispatcher: str) -> dict[str, float]:
    """Largest deviation from the control by case and tensor, seen from one rank."""
    pg = rank.initialize(ParallelConfig(**parallel))
    tp_rank, tp_size, dp_rank, dp_size = pg.tp.rank(), pg.tp.size(), pg.dp.rank(), pg.dp.size()
    worst: dict[str, float] = {}
    for name, case in CASES.items():
        moe = settings(moe_token_dispatcher_type=dispatcher, **case["moe"])
        layer = build_layer(moe, weights(null_bias=60.0), pg=pg)
        hidden, gradient, ctx = problem(case, dp_rank)
        hidden = shard(hidden, tp_rank, tp_size).clone().requires_grad_()
        ctx = shard_context(ctx, tp_rank, tp_size)
        with token_context(ctx):
            y, _ = layer(hidden)
        y.backward(shard(gradient, tp_rank, tp_size))
        expected = control(case, dispatcher, dp_size)

        def compare(what: str, got: torch.Tensor, want: torch.Tensor, name: str = name) -> None:
            assert got.shape == want.shape, (name, what, got.shape, want.shape)
            scale = max(1.0, want.abs().max().item())
            worst[f"{name}: {what}"] = ((got - want).abs().max().item() if got.numel() else 0.0) / scale

        compare("y", y.detach(), shard(expected["y"][dp_rank], tp_rank, tp_size))
        compare("dx", hidden.grad, shard(expected["dx"][dp_rank], tp_rank, tp_size))
        for key, parameter in layer.named_parameters():
            grad = parameter.grad.clone()
            if getattr(parameter, "allreduce", True):
                dist.all_reduce(grad, group=pg.dp)
                if parameter.sequence_parallel:
                    dist.all_reduce(grad, group=pg.tp)
            else:
                dist.all_reduce(grad, group=pg.expt_dp)
            compare(key, grad, local_slice(key, expected["grads"][key], layer))
        stats = reduce_stats(ctx.stats, layers=[LAYER], moe=moe, group=pg.tp, dp_group=pg.dp, pp_group=pg.pp)
        compare("selected", stats.selected[LAYER], expected["selected"])
        compare("aux loss", stats.aux_loss[LAYER], expected["aux"])
    return worst


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_one_rank(layout: str, dispatcher: str) -> None:
    ranks, tp, ep, etp = LAYOUTS[layout]
    parallel = {
        "tensor_model_parallel_size": tp,
        "expert_model_parallel_size": ep,
        "expert_tensor_parallel_size": etp,
    }
    for worst in run_ranks(_rank, ranks, parallel, dispatcher):
        assert len(worst) == 9 * len(CASES)
        assert {what: error for what, error in worst.items() if not error < 1e-5} == {}


def test_the_cases_exercise_what_they_name() -> None:
    """Capacity drops, null takes all, and the sampled case leaves the argmax: otherwise the equalities say little."""
    null = control(CASES["all tokens to null"], "alltoall", 2)
    assert null["selected"][:, :4].sum() == 0 and null["selected"][:, 4].sum() > 0
    assert bool((null["grads"]["experts.weight1"] == 0).all())
    dropped = control(CASES["sampled, grin, capacity"], "alltoall", 1)["selected"]
    free = control({"moe": {"gradient_estimator": "grin"}}, "alltoall", 1)["selected"]
    assert dropped[:, :4].sum() < free[:, :4].sum() and torch.equal(dropped[:, 4], free[:, 4])
    paper, plain = (
        control({"moe": {"gradient_estimator": estimator}}, "alltoall", 1)["y"][0] for estimator in ("paper", "none")
    )
    assert (paper - plain).abs().max() > 0.1
    one_null = control(CASES["all tokens of one data-parallel rank to null"], "alltoall", 1)
    assert one_null["selected"][:, :4].sum() == 0


def _entries(rank: Rank, parallel: dict[str, int]) -> list[tuple[Any, ...]]:
    """Every tensor that this rank would write for the routed experts."""
    pg = rank.initialize(ParallelConfig(**parallel))
    layer = build_layer(settings(), weights(), pg=pg)
    entries = layer.experts.sharded_state_dict("mlp.experts.")
    first = entries["mlp.experts.weight1"]
    halves = first.build()
    assert torch.equal(first.merge_fn([half.data for half in halves]), layer.experts.weight1)
    return [
        (t.key, t.global_shape, t.global_offset, t.replica_id, t.data.detach().clone())
        for t in (*halves, entries["mlp.experts.weight2"])
    ]


@pytest.mark.parametrize("layout", ["EP2", "ETP2", "EP2 x ETP2, two data-parallel ranks"])
def test_checkpoint_entries_tile_the_full_experts(layout: str) -> None:
    """The shards of all ranks, placed at their offsets, are one rank's weights; every element is written once."""
    ranks, tp, ep, etp = LAYOUTS[layout]
    parallel = {
        "tensor_model_parallel_size": tp,
        "expert_model_parallel_size": ep,
        "expert_tensor_parallel_size": etp,
    }
    full = {f"mlp.experts.experts.linear_fc{i}.weight": weights()[f"experts.weight{i}"] for i in (1, 2)}
    rebuilt = {key: torch.zeros_like(value) for key, value in full.items()}
    written = {key: torch.zeros_like(value) for key, value in full.items()}
    for entries in run_ranks(_entries, ranks, parallel):
        for key, shape, offset, replica_id, data in entries:
            assert shape == tuple(full[key].shape)
            if all(part == 0 for part in replica_id):
                place = tuple(slice(o, o + n) for o, n in zip(offset, data.shape, strict=True))
                rebuilt[key][place] = data
                written[key][place] += 1
    for key, value in full.items():
        assert torch.equal(rebuilt[key], value) and bool((written[key] == 1).all())
