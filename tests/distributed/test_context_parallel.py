"""Context parallelism on two ranks of one replica: a packed row whose samples, picture, sound and clip lie across the cuts.

Losses, statistics and the gradient of every parameter equal one rank's, the auxiliary loss is above 0, a rank computes at
most its part of the tokens; what would be wrong if keys were not gathered, labels were shifted at the cut or draws were
keyed by the place on the rank is seen; and what autograd keeps is half.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.bench_context_parallel import measured
from megatron_omni.batch import IGNORE_LABEL, Modality, OmniBatch
from megatron_omni.config.optim import OptimConfig
from megatron_omni.config.parallel import ParallelConfig
from megatron_omni.config.run import Recipe
from megatron_omni.data.collate import collate
from megatron_omni.data.sample import Sample
from megatron_omni.generation.load import open_checkpoint
from megatron_omni.models import attention, context_parallel
from megatron_omni.models.build import build_model
from megatron_omni.models.moe.context import RoutingStats
from megatron_omni.models.moe.layer import OmniMoELayer
from megatron_omni.parallel.schedule import run_step
from megatron_omni.parallel.sharing import share_step
from megatron_omni.parallel.wrap import unwrap_model, wrap_model
from megatron_omni.positions import (
    AudioSpan,
    ImageSpan,
    PositionRule,
    Span,
    TextSpan,
    VideoSpan,
    position_ids,
    span_length,
)
from tests.distributed.harness import Rank, run_ranks
from tests.distributed.test_omni_layouts import MODEL as TINY_OMNI

CP2 = ParallelConfig(context_parallel_size=2)
MODEL = replace(TINY_OMNI, init_method_std=0.3)
"""Attention then weighs keys unevenly: a wrong one shows."""
SAMPLES: list[list[Span]] = [
    [TextSpan(14), ImageSpan(1, 1), TextSpan(9), AudioSpan(1), TextSpan(3)],
    [TextSpan(4), VideoSpan((0.0, 1.0)), TextSpan(5)],
]
"""40 and 17 tokens, then padding, in a row of 60: the cuts are at 15 (in the picture), 30 (in the sound) and 45 (in the
clip); the second sample begins at 40."""
LENGTH, AUX_LOSS_SCALE = 60, 0.1


def sample_of(spans: list[Span], generator: torch.Generator) -> Sample:
    """Every token but the last is learned."""
    rule = PositionRule.from_config(MODEL)
    kind_of = {TextSpan: Modality.TEXT, ImageSpan: Modality.IMAGE, VideoSpan: Modality.VIDEO, AudioSpan: Modality.AUDIO}
    kinds = torch.tensor([int(kind_of[type(span)]) for span in spans for _ in range(span_length(span, rule))])
    ids = torch.randint(0, MODEL.vocab_size, kinds.shape, generator=generator)
    tiles = int(((kinds == Modality.IMAGE) | (kinds == Modality.VIDEO)).sum()) // 4
    chunks = int((kinds == Modality.AUDIO).sum()) // 10
    positions, following = position_ids(spans, rule)
    return Sample(
        input_ids=ids, labels=torch.cat([ids[1:], ids.new_full((1,), IGNORE_LABEL)]), position_ids=positions,
        next_position=following, modality=kinds,
        tiles=torch.randn(tiles, 3, 10, 10, generator=generator) if tiles else None,
        chunks=torch.randn(chunks, 6, 150, generator=generator) if chunks else None,
    )  # fmt: skip


def batch() -> OmniBatch:
    generator = torch.Generator().manual_seed(3)
    samples = [sample_of(spans, generator) for spans in SAMPLES]
    return collate(samples, pad_id=0, row_of=[0, 0], sample_ids=[5, 9], multiple_of=4)


def test_everything_lies_across_a_cut() -> None:
    row = batch()
    assert row.input_ids.shape == (1, LENGTH) and row.num_tokens < LENGTH
    for cut, kind in ((15, Modality.IMAGE), (30, Modality.AUDIO), (45, Modality.VIDEO)):
        assert row.modality[0, cut - 1] == row.modality[0, cut] == kind
        assert row.labels[0, cut - 1] == row.input_ids[0, cut] and row.segment_ids[0, cut - 1] >= 0
    assert sorted(set(row.segment_ids[0].tolist())) == [-1, 0, 1] and row.segment_ids[0, 44] == 1


def one_step(rank: Rank, parallel: ParallelConfig) -> dict[str, Any]:
    """Losses, auxiliary loss, gradients and tokens of the layers; then the losses with each thing done wrongly."""
    pg = rank.initialize(parallel)
    recipe = Recipe(
        model=MODEL, parallel=parallel, optim=OptimConfig(precision="fp32", use_distributed_optimizer=False)
    )
    model = wrap_model(build_model(recipe, pg), recipe, pg)
    own = [batch()] if rank.index == 0 else None
    tokens, stats = set[int](), RoutingStats()
    for module in model.modules():
        if isinstance(module, OmniMoELayer):
            module.register_forward_pre_hook(
                lambda _, inputs, named: tokens.add((inputs[0] if inputs else named["hidden_states"]).shape[0]),
                with_kwargs=True,
            )

    def forward_step(batch: OmniBatch, model: Any) -> tuple[Tensor, Any]:
        losses = model(batch, step=7, stochastic=True, aux_loss_scale=AUX_LOSS_SCALE, stats=stats)
        return losses, lambda losses: (losses.sum() / 50, losses.detach().clone())

    def losses(forward_only: bool) -> Tensor:
        data = share_step(own, num_micro_batches=1, pg=pg, device=torch.device("cpu"))
        assert data is not None
        return run_step(forward_step, data, model, pg=pg, recipe=recipe, forward_only=forward_only)[0]

    model.zero_grad_buffer()
    found: dict[str, Any] = {"losses": losses(False).numpy(), "dp": pg.dp.size(), "tokens": max(tokens)}
    named = unwrap_model(model).named_parameters()
    found["grads"] = {name: p.main_grad.numpy().copy() for name, p in named if p.requires_grad}
    found["aux"] = [float(value) for value in stats.aux_loss.values()]
    found["wrong"] = {}
    for name, change in MUTANTS.items():
        undo = change()
        found["wrong"][name] = losses(True).numpy()
        undo()
    return found


def no_keys_of_others() -> Callable[[], None]:
    """A rank's own keys stand for those of the others."""
    right = attention.gathered_keys
    attention.gathered_keys = lambda x, group: context_parallel.in_order(torch.cat([x, x]), 2)
    return lambda: setattr(attention, "gathered_keys", right)


def _changed_part(change: Callable[[OmniBatch], dict[str, Tensor]]) -> Callable[[], Callable[[], None]]:
    def apply() -> Callable[[], None]:
        right = context_parallel.SequenceCut.part

        def part(self: Any, batch: OmniBatch) -> OmniBatch:
            own = right(self, batch)
            return replace(own, **change(own))

        context_parallel.SequenceCut.part = part  # type: ignore[method-assign]
        return lambda: setattr(context_parallel.SequenceCut, "part", right)

    return apply


MUTANTS: dict[str, Callable[[], Callable[[], None]]] = {
    "keys not gathered": no_keys_of_others,
    "labels shifted at the cut": _changed_part(
        lambda own: {"labels": torch.where(own.labels == IGNORE_LABEL, own.labels, own.input_ids.roll(-1, 1))}
    ),
    "draws keyed by local position": _changed_part(
        lambda own: {"sample_positions": torch.arange(own.input_ids.shape[1]).expand_as(own.input_ids)}
    ),
}


@cache
def ranks_of(ranks: int) -> list[dict[str, Any]]:
    return run_ranks(one_step, ranks, ParallelConfig(context_parallel_size=ranks))


def test_losses_and_every_gradient_equal_one_ranks() -> None:
    (expected,) = ranks_of(1)
    assert all(value > 0 for value in expected["aux"]) and len(expected["aux"]) == MODEL.num_layers
    assert (expected["losses"] > 0).sum() > 50
    for found in ranks_of(2):
        assert found["losses"] == pytest.approx(expected["losses"], rel=2e-5, abs=1e-6), "of whole rows, on every rank"
        assert found["aux"] == pytest.approx(expected["aux"], rel=1e-5)
        assert set(found["grads"]) == set(expected["grads"])
        for name, grad in found["grads"].items():
            if name.endswith("k_proj.bias"):
                continue  # a key's bias moves no softmax: its gradient is rounding
            want = torch.from_numpy(expected["grads"][name])
            atol = 1e-5 * float(want.norm()) + 1e-8
            torch.testing.assert_close(
                torch.from_numpy(grad), want, atol=atol, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_a_rank_computes_its_part_of_the_tokens() -> None:
    for found in ranks_of(2):
        assert found["dp"] == 1
        assert found["tokens"] <= (batch().num_tokens + 2 * 2) / 2 < LENGTH


@pytest.mark.parametrize("name", MUTANTS)
def test_what_is_wrong_is_seen(name: str) -> None:
    """On one rank nothing of it changes anything: each is a mistake of the cut alone."""
    (alone,), pair = ranks_of(1), ranks_of(2)
    assert alone["wrong"][name] == pytest.approx(alone["losses"], rel=1e-6)
    for found in pair:
        assert abs(found["wrong"][name] - alone["losses"]).max() > 1e-2


def test_commands_that_answer_do_not_cut() -> None:
    with pytest.raises(
        ValueError, match=r"parallel\.context_parallel_size=2: answers grow token by token.* set it to 1"
    ):
        open_checkpoint(Path("none"), overrides=["parallel.context_parallel_size=2"])


def kept(rank: Rank, parallel: ParallelConfig) -> dict[str, float]:
    return measured(rank.initialize(parallel), parallel, length=1024, blocks=1)


def test_autograd_keeps_half() -> None:
    """It keeps whole keys and values, but not what they were gathered from. Of 16,384 tokens:
    benchmarks/results/context_parallel_xeon_202611.md."""
    (alone,) = run_ranks(kept, 1, ParallelConfig())
    for found in run_ranks(kept, 2, replace(CP2)):
        assert found["tokens"] == 512
        assert 0.4 * alone["kept"] < found["kept"] < 0.6 * alone["kept"]
