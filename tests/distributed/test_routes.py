"""Routes recorded by one forward and replayed by later ones, on every layout: the same bytes, losses and gradients.

Between the two every gate moves so far that many tokens would take other experts. A replaying router must take the recorded
ones all the same, in the forward and where recomputation repeats it.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from torch import Tensor

from megatron_omni.batch import OmniBatch
from megatron_omni.models.build import build_language_model
from megatron_omni.models.moe.context import TokenContext
from megatron_omni.models.moe.router import OmniRouter
from megatron_omni.models.moe.routes import RouteRecord, bytes_of, unpacked, width_of
from megatron_omni.models.omni import token_facts
from megatron_omni.parallel.groups import place_in
from megatron_omni.parallel.schedule import run_step
from megatron_omni.parallel.wrap import wrap_model
from tests.distributed.harness import Rank, run_ranks
from tests.distributed.test_language_layouts import MICRO_BATCHES, _batch, _recipe

STEPS = 2


def forward_step(batch: OmniBatch, model: Any, *, num_labels: int, records: list[RouteRecord] | None) -> Any:
    """As a task's; where ``records`` are wanted, this micro-batch's is added."""
    record = None if records is None else RouteRecord()
    if records is not None and record is not None:
        records.append(record)
    ctx = token_facts(batch, seed=1, step=1, stochastic=False, aux_loss_scale=0.0, stats=None, record=record)
    losses = model(
        input_ids=batch.input_ids, position_ids=batch.position_ids, attention=batch.attention, ctx=ctx,
        labels=batch.labels, label_places=batch.label_places,
    )  # fmt: skip

    def loss_function(losses: Tensor) -> tuple[Tensor, Tensor]:
        loss = losses.sum() / num_labels
        return loss, loss.detach()

    return losses, loss_function


def recorded(batches: Sequence[OmniBatch], model: Any, *, pg: Any, recipe: Any) -> list[Tensor]:
    """[B, S, L n] of each micro-batch, from a forward without gradients."""
    records: list[RouteRecord] = []
    run_step(
        partial(forward_step, num_labels=1, records=records), batches, model, pg=pg, recipe=recipe, forward_only=True
    )
    return [record.grid(batch, recipe.model, pg) for record, batch in zip(records, batches, strict=True)]


def watch(model: Any) -> list[tuple[int, bool]]:
    """Has every router say of each call how many of its tokens would have been routed otherwise, and whether they were
    routed as was given."""
    said: list[tuple[int, bool]] = []

    def look(router: OmniRouter, inputs: tuple[Tensor], keywords: dict[str, TokenContext], output: Any) -> None:
        ctx, index = keywords["ctx"], router._layer_index
        if ctx.routes is not None:
            real = ~ctx.padding
            width = bytes_of(router.num_slots)
            given, has = unpacked(ctx.routes[real, index * width : (index + 1) * width], router.num_slots)
            z = router.gate(inputs[0], ctx=ctx).detach()[real]
            own = router.topp_route(z, router.rule_without_noise).mask
            same = bool(has.all()) and torch.equal(given, output.routing.mask[real])
            said.append((int((own != given).any(1).sum()), same))

    for module in model.modules():
        if isinstance(module, OmniRouter):
            module.register_forward_hook(look, with_kwargs=True)
    return said


def replayed(rank: Rank, recipe: Any) -> dict[str, Any]:
    pg = rank.initialize(recipe.parallel)
    place = place_in(pg)
    model = wrap_model(build_language_model(recipe, pg), recipe, pg)
    config = OptimizerConfig(
        optimizer="adam", lr=0.01, weight_decay=0.01, clip_grad=1.0, params_dtype=model.config.pipeline_dtype,
        use_distributed_optimizer=recipe.optim.use_distributed_optimizer,
    )  # fmt: skip
    optimizer = get_megatron_optimizer(config, [model], pg_collection=pg, use_gloo_process_groups=False)
    batches = [_batch(0, i) for i in range(MICRO_BATCHES)]
    num_labels = sum(b.num_label_tokens for b in batches)
    mine = batches[place.dp_rank :: place.dp_size]
    routes = recorded(mine, model, pg=pg, recipe=recipe)
    said = watch(model)
    for module in model.modules():
        if isinstance(module, OmniRouter):
            generator = torch.Generator().manual_seed(module.layer_number)
            module.weight.data += 0.3 * torch.randn(module.weight.shape, generator=generator)
    result: dict[str, Any] = {"routes": [r.tolist() for r in routes], "losses": [], "norms": []}
    for _ in range(STEPS):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        given = [replace(batch, routes=r) for batch, r in zip(mine, routes)]
        reports = run_step(
            partial(forward_step, num_labels=num_labels, records=None), given, model, pg=pg, recipe=recipe
        )
        total = torch.stack(reports).sum() if place.is_last_stage else torch.zeros(())
        dist.all_reduce(total)
        result["losses"].append(total.item() / place.tp_size)
        result["norms"].append(optimizer.step()[1])
    result["said"] = said
    result["mine"] = list(range(MICRO_BATCHES))[place.dp_rank :: place.dp_size]
    return result


def recipe_of(experts: int = 4, **sizes: Any) -> Any:
    recipe = _recipe(moe=True, **sizes)
    recipe.model.moe.num_routed_experts = experts
    return recipe


@cache
def one_rank(experts: int = 4) -> dict[str, Any]:
    (result,) = run_ranks(replayed, 1, recipe_of(experts))
    return result


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "recomputed": (1, {"recompute": "full"}),
    "TP2 with sequence parallelism": (2, {"tensor_model_parallel_size": 2}),
    "PP2, mixtures recomputed": (2, {"pipeline_model_parallel_size": 2, "recompute": "moe"}),
    "EP2": (2, {"expert_model_parallel_size": 2}),
    "PP2, two bytes a token and layer": (2, {"pipeline_model_parallel_size": 2, "experts": 9}),
    "TP2xPP2, recomputed": (
        4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "recompute": "full"},
    ),
}  # fmt: skip


def test_one_rank_replays_what_it_recorded() -> None:
    result = one_rank()
    flips = sum(count for count, _ in result["said"])
    assert len(result["said"]) == STEPS * MICRO_BATCHES * 2, "two layers, no recomputation"
    assert flips > 20, "the gates did not move far enough to show anything"
    assert all(same for _, same in result["said"])
    assert min(result["norms"]) > 0 and result["losses"][0] != result["losses"][1]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_record_and_replay_alike(layout: str) -> None:
    world_size, sizes = LAYOUTS[layout]
    expected = one_rank(sizes.get("experts", 4))
    assert len(expected["routes"][0][0][0]) == (4 if "experts" in sizes else 2)
    calls = 2 if sizes.get("recompute", "none") != "none" else 1
    stages = sizes.get("pipeline_model_parallel_size", 1)
    for result in run_ranks(replayed, world_size, recipe_of(**sizes)):
        assert result["routes"] == [expected["routes"][i] for i in result["mine"]], "bytes of all layers on all ranks"
        assert len(result["said"]) == STEPS * len(result["mine"]) * calls * 2 // stages
        assert all(same for _, same in result["said"])
        assert result["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert result["norms"] == pytest.approx(expected["norms"], rel=1e-4)


def test_a_byte_a_token_and_layer() -> None:
    """Also at 28 layers: 28 bytes a token."""
    recipe = _recipe(moe=True)
    assert len(one_rank()["routes"][0][0][0]) == recipe.model.num_layers == width_of(recipe.model)
    assert width_of(replace(recipe.model, num_layers=28)) == 28
