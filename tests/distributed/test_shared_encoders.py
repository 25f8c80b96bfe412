"""Encoders over the tensor-parallel group: rows and gradients equal one rank's, and no rank's tower gets more than its share.

Micro-batches hold none, one or several tiles and chunks, seldom as many as ranks divide. Each is a step of its own; on two
data-parallel ranks two of them are, of which one may have no sound.
"""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_omni.batch import OmniBatch
from megatron_omni.config.optim import OptimConfig
from megatron_omni.config.parallel import ParallelConfig
from megatron_omni.config.run import Recipe
from megatron_omni.models.build import build_model
from megatron_omni.models.parts import apply_freeze
from megatron_omni.parallel import groups
from megatron_omni.parallel.gradients import partial_gradients
from megatron_omni.parallel.schedule import run_step
from megatron_omni.parallel.wrap import unwrap_model, wrap_model
from megatron_omni.positions import AudioSpan, ImageSpan, Span, TextSpan, VideoSpan
from tests.distributed.harness import Rank, run_ranks
from tests.distributed.test_omni_layouts import MODEL, batch_of

MODEL = replace(MODEL, num_query_groups=4)
ROWS: dict[str, list[list[Span]]] = {
    "mixed": [
        [TextSpan(2), ImageSpan(1, 2), TextSpan(2), AudioSpan(1), TextSpan(1)],
        [TextSpan(1), VideoSpan((0.0, 1.0)), AudioSpan(2)],
    ],
    "text": [[TextSpan(32)], [TextSpan(9)]],
    "one_tile": [[TextSpan(3), ImageSpan(1, 1), TextSpan(7)], [TextSpan(20)]],
    "one_chunk": [[TextSpan(6)], [TextSpan(4), AudioSpan(1), TextSpan(4)]],
    "sound": [[AudioSpan(2), TextSpan(6)], [TextSpan(4), AudioSpan(1), TextSpan(4)]],
}
TRUNK = ["attention", "experts", "shared_experts", "gate", "embeddings", "output", "norms"]
CASES: dict[str, tuple[int, dict[str, Any], list[str]]] = {
    "tp2": (2, {"tensor_model_parallel_size": 2}, []),
    "tp2_overlap": (2, {"tensor_model_parallel_size": 2, "overlap_grad_reduce": True, "bucket_size": 500}, []),
    "tp2_projectors": (2, {"tensor_model_parallel_size": 2}, ["vision", "audio", *TRUNK]),
    "tp4": (4, {"tensor_model_parallel_size": 4, "recompute": "full"}, []),
    "tp2_dp2": (4, {"tensor_model_parallel_size": 2, "bucket_size": 500}, []),
}
"""Ranks, layout, frozen parts."""
PAIRS = {"mixed": "text", "sound": "one_tile", "one_chunk": "one_chunk"}
"""What the second data-parallel rank gets beside the first's."""


class Towers:
    """Counts inputs of the towers' first layers, forward and backward."""

    def __init__(self, model: Any) -> None:
        self.seen: dict[str, list[int]] = {}
        for name, layers in (("tiles", model.vision.tower.encoder.layers), ("chunks", model.audio.tower.layers)):
            self._watch(name, layers[0])

    def _watch(self, name: str, layer: nn.Module) -> None:
        def count(way: str, tensor: Tensor) -> None:
            self.seen.setdefault(f"{name} {way}", []).append(len(tensor))

        layer.register_forward_pre_hook(lambda _, inputs: count("forward", inputs[0]))
        layer.register_full_backward_hook(lambda _, grads, outputs: count("backward", outputs[0]))

    def take(self) -> dict[str, list[int]]:
        seen, self.seen = self.seen, {}
        return seen


def look(rank: Rank, cases: list[str]) -> dict[str, Any]:
    return {name: look_at(replace(rank, store=dist.PrefixStore(name, rank.store)), name) for name in cases}


def look_at(rank: Rank, case: str) -> dict[str, Any]:
    """By micro-batch: embedded rows, inputs of the towers, and this rank's share of each gradient (first element, values)."""
    _, sizes, frozen = CASES.get(case, (1, {}, [] if case == "one" else ["vision", "audio", *TRUNK]))
    parallel = ParallelConfig(**sizes)
    pg = rank.initialize(parallel)
    recipe = Recipe(model=MODEL, parallel=parallel, optim=OptimConfig(precision="fp32"), freeze=frozen)
    built = build_model(recipe, pg)
    apply_freeze(built, frozen)
    model = wrap_model(built, recipe, pg)
    omni = unwrap_model(model)
    towers, results = Towers(omni), {}
    for name in ROWS if pg.dp.size() == 1 else PAIRS:
        batch = batch_of(PAIRS[name] if pg.dp.rank() else name, ROWS)
        with torch.no_grad():
            rows = omni._embedded(batch, omni._media(batch))
        evaluated = towers.take()
        model.zero_grad_buffer()

        def forward_step(batch: OmniBatch, model: Any) -> tuple[Tensor, Any]:
            losses = model(batch, step=7, stochastic=True, aux_loss_scale=0.01)
            return losses, lambda losses: (losses.sum() / 10, None)

        run_step(forward_step, [batch], model, pg=pg, recipe=recipe)
        summed = sum(len(part) for part in partial_gradients(model, pg))
        results[name] = {
            "rows": rows, "evaluated": evaluated, "trained": towers.take(), "grads": own_grads(model, pg), "summed": summed
        }  # fmt: skip
    groups.destroy()
    return results


def own_grads(model: Any, pg: Any) -> dict[str, tuple[int, Tensor]]:
    """Of what is whole on every tensor-parallel rank; on one rank of everything."""
    names = {p: n.removeprefix("module.") for n, p in model.named_parameters()}
    found, alone = {}, pg.tp.size() == 1
    for bucket in (bucket for buffer in model.buffers for bucket in buffer.buckets):
        share = len(bucket.grad_data) // pg.dp.size()
        for parameter, (start, end) in bucket.param_to_index.items():
            first, last = max(start, pg.dp.rank() * share), min(end, (pg.dp.rank() + 1) * share)
            if (alone or getattr(parameter, "sequence_parallel", False)) and first < last:
                found[names[parameter]] = first - start, bucket.grad_data[first:last].clone()
    return found


@cache
def results(world_size: int) -> list[dict[str, Any]]:
    names = ["one", "one_projectors"] if world_size == 1 else [n for n, case in CASES.items() if case[0] == world_size]
    return run_ranks(look, world_size, names)


def is_whole(name: str) -> bool:
    """On every tensor-parallel rank."""
    return name.startswith(("vision.", "audio.")) or any(part in name for part in ("norm", "router", "shared_experts"))


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, atol=1e-5 * float(want.abs().max()) + 1e-9, rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_rows_and_gradients_are_one_ranks(case: str) -> None:
    world_size, _, frozen = CASES[case]
    expected = results(1)[0]["one_projectors" if frozen else "one"]
    ranks = [rank[case] for rank in results(world_size)]
    dealt = PAIRS if case == "tp2_dp2" else {name: None for name in ROWS}
    for name, other in dealt.items():
        covered: dict[str, set[int]] = {}
        for index, rank in enumerate(ranks):
            mine = other if other is not None and index >= world_size // 2 else name
            close(rank[name]["rows"], expected[mine]["rows"])
            for parameter, (first, grad) in rank[name]["grads"].items():
                want = expected[name]["grads"][parameter][1]
                want = want if other is None else want + expected[other]["grads"][parameter][1]
                close(grad, want[first : first + len(grad)])
                covered.setdefault(parameter, set()).update(range(first, first + len(grad)))
        whole = {key: grad for key, (_, grad) in expected[name]["grads"].items() if is_whole(key)}
        assert {key: len(places) for key, places in covered.items()} == {key: len(grad) for key, grad in whole.items()}
        assert any(grad.any() for key, (_, grad) in expected["mixed"]["grads"].items() if key.startswith("vision."))


@pytest.mark.parametrize("case", CASES)
def test_a_tower_gets_its_share_of_the_inputs(case: str) -> None:
    world_size, sizes, frozen = CASES[case]
    tp, ranks = sizes["tensor_model_parallel_size"], [rank[case] for rank in results(world_size)]
    for index, rank in enumerate(ranks):
        for name, seen in rank.items():
            batch = batch_of(PAIRS[name] if case == "tp2_dp2" and index >= tp else name, ROWS)
            for medium, inputs in (("tiles", batch.pixel_values), ("chunks", batch.audio_features)):
                number = 0 if inputs is None else len(inputs)
                share = min(-(-number // tp), max(0, number - index % tp * -(-number // tp)))
                passes = {"forward": seen["evaluated"], "trained forward": seen["trained"], "backward": seen["trained"]}
                for way, counted in passes.items():
                    idle = sizes.get("overlap_grad_reduce", False) and counted is seen["trained"]
                    counts = counted.get(f"{medium} {way.split()[-1]}", [])
                    replayed = sizes.get("recompute") == "full" and way == "trained forward"
                    expected = [share or 1] if share or idle else []
                    if way == "backward" and frozen:
                        expected = []
                    assert counts == expected * (1 + replayed), (name, medium, way, index)


def test_a_rank_sums_its_own_share_of_the_gradients_alone() -> None:
    """With the distributed optimizer two data-parallel ranks sum half of them each; parameters are padded to 64 elements."""
    whole = sum(len(grad) for key, (_, grad) in results(1)[0]["one"]["mixed"]["grads"].items() if is_whole(key))
    alone = results(2)[0]["tp2"]["mixed"]["summed"]
    first, second = (results(4)[index]["tp2_dp2"]["mixed"]["summed"] for index in (0, 2))
    assert whole <= alone < 2 * whole and whole <= first + second < 1.1 * alone
    assert max(first, second) < 0.75 * alone
