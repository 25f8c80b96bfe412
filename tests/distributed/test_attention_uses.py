"""The whole model with every use of attention by lengths, on several layouts: losses, gradients and cached decoding.

One step of four micro-batches: packed samples, two prompts with responses, prefixes that see each other, and one sample
that fills its row. What they must equal is one rank whose attention is the masked formula in float64.
"""

import re
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_omni.batch import IGNORE_LABEL, Modality, OmniBatch
from megatron_omni.config.optim import OptimConfig
from megatron_omni.config.parallel import ParallelConfig
from megatron_omni.config.run import Recipe
from megatron_omni.data.collate import collate
from megatron_omni.data.sample import Sample
from megatron_omni.generation.cache import KVCache
from megatron_omni.generation.extents import Extent
from megatron_omni.generation.scheduler import Chunk
from megatron_omni.models import attention
from megatron_omni.models.attention import kv_cache
from megatron_omni.models.build import build_model
from megatron_omni.parallel.schedule import run_step
from megatron_omni.parallel.wrap import unwrap_model, wrap_model
from megatron_omni.segments import AttentionSegments, Segment, prefix, shared_prompt
from tests.attention import reference
from tests.distributed.harness import Rank, run_ranks
from tests.distributed.test_omni_layouts import MODEL as TINY_OMNI

LENGTH = 32
MODEL = replace(TINY_OMNI, init_method_std=0.3, audio=None)
"""Attention then weighs keys unevenly: a wrong one shows."""
USES: dict[str, list[list[tuple[int, tuple[Segment, ...] | None]]]] = {
    "packed": [[(9, None), (6, None), (14, None)], [(1, None), (20, None)]],
    "shared prompt": [
        [(26, shared_prompt(8, [7, 1, 10]))],
        [(12, shared_prompt(6, [4, 2])), (9, shared_prompt(6, [3]))],
    ],
    "prefix": [[(14, prefix(6, 8)), (18, prefix(1, 17))], [(11, prefix(10, 1))]],
    "one sample": [[(32, None)], [(32, None)]],
}
"""Rows of samples: tokens, and who sees whom."""
CACHED = [[(0, 0, 5), (1, 5, 9), (2, 14, 1)], [(1, 0, 3), (0, 3, 1), (2, 4, 4)], [(2, 0, 1), (0, 1, 2)], [(1, 0, 1)]]
"""Forwards of one ragged row: (slot, first token in the row, tokens)."""


def batch_of(name: str) -> OmniBatch:
    """Samples with a picture where they have room for one, the second half of each learned."""
    generator = torch.Generator().manual_seed(len(name))
    samples, row_of = [], []
    for row, lengths in enumerate(USES[name]):
        for length, segments in lengths:
            ids = torch.randint(0, MODEL.vocab_size, (length,), generator=generator)
            modality, pictures = torch.zeros_like(ids), length >= 9
            modality[1:5] = Modality.IMAGE if pictures else Modality.TEXT
            labels = ids.roll(-1)
            labels[: length // 2] = IGNORE_LABEL
            samples.append(
                Sample(
                    input_ids=ids, labels=labels, position_ids=torch.arange(length).expand(3, -1), next_position=length,
                    modality=modality, chunks=None, attention=segments,
                    tiles=torch.randn(1, 3, 10, 10, generator=generator) if pictures else None,
                )
            )  # fmt: skip
            row_of.append(row)
    first = 10 * list(USES).index(name)
    return collate(samples, pad_id=0, row_of=row_of, sample_ids=range(first, first + len(samples)), multiple_of=LENGTH)


def formula(query: Tensor, key: Tensor, value: Tensor, segments: AttentionSegments, **_: Any) -> Tensor:
    """The reference in float64 where the model computes in fp32."""
    inputs = (x.double() for x in (query, key, value))
    return reference(*inputs, segments, query.shape[-1] ** -0.5).to(query.dtype)


def one_step(rank: Rank, parallel: ParallelConfig, by_formula: bool) -> dict[str, Any]:
    """Losses of each of this rank's micro-batches, gradients, and logits with and without a cache."""
    if by_formula:
        attention.segment_attention = formula
    pg = rank.initialize(parallel)
    optim = OptimConfig(precision="fp32", use_distributed_optimizer=False)
    recipe = Recipe(model=MODEL, parallel=parallel, optim=optim)
    model = wrap_model(build_model(recipe, pg), recipe, pg)
    omni = unwrap_model(model)
    model.zero_grad_buffer()
    mine = list(USES)[pg.dp.rank() :: pg.dp.size()]

    def loss_step(batch: OmniBatch, model: Any) -> tuple[Tensor, Any]:
        losses = model(batch, step=7, stochastic=True, aux_loss_scale=0.01)
        return losses, lambda losses: (losses.sum() / 100, losses.detach().clone())

    losses = run_step(loss_step, [batch_of(name) for name in mine], model, pg=pg, recipe=recipe)
    earlier = pg.pp.rank() * len(omni.language.decoder.layers)
    grads = {
        global_name(name, earlier): p.main_grad.numpy().copy()
        for name, p in omni.named_parameters()
        if is_watched(name)
    }

    def logits_step(batch: OmniBatch, model: Any) -> tuple[Tensor, Any]:
        logits = model(batch, step=0, stochastic=False, compute_loss=False)
        return logits, lambda logits: (logits.sum(), logits.detach().clone())

    def logits(batch: OmniBatch) -> Tensor | None:
        with torch.no_grad():
            found = run_step(logits_step, [batch], model, pg=pg, recipe=recipe, forward_only=True)
        return found[0] if omni.post_process else None

    model.eval()
    found: dict[str, Any] = {"losses": {}, "grads": grads}
    slots = [torch.randint(0, 60, (13,), generator=torch.Generator().manual_seed(slot)) for slot in range(3)]
    whole = logits(row_of_tokens([(ids, 0) for ids in slots]))
    cache, lengths, pieces = KVCache(3 * 32), [0, 0, 0], []
    for new in CACHED:
        chunks = [Chunk(slot, lengths[slot], n, Extent(32 * slot, 32), False) for slot, _, n in new]
        places = torch.cat([torch.arange(c.start, c.start + c.length) + c.extent.offset for c in chunks])
        cache.begin(chunks, places)
        with kv_cache(cache):
            parts = [(slots[c.answer][c.start : c.start + c.length], c.start) for c in chunks]
            pieces.append((new, logits(row_of_tokens(parts))))
        for slot, _, n in new:
            lengths[slot] += n
    if omni.post_process:
        found["losses"] = {name: loss.numpy() for name, loss in zip(mine, losses)}
        assert whole is not None
        joined = {
            slot: torch.cat([x[0, s : s + n] for new, x in pieces for i, s, n in new if i == slot]) for slot in range(3)
        }
        found["cached"] = {slot: x.numpy() for slot, x in joined.items()}
        found["whole"] = {slot: whole[0, 13 * slot : 13 * slot + len(x)].numpy() for slot, x in joined.items()}
    return found


def is_watched(name: str) -> bool:
    """Whole on every rank; a key's bias moves no softmax, so its gradient is rounding."""
    return ("vision." in name or "norm" in name) and not name.endswith("k_proj.bias")


def global_name(name: str, earlier: int) -> str:
    """A stage counts its own layers: with those of ``earlier`` stages."""
    return re.sub(r"(?<=language\.decoder\.layers\.)\d+", lambda found: str(int(found[0]) + earlier), name)


def row_of_tokens(parts: list[tuple[Tensor, int]]) -> OmniBatch:
    """A row of one sample after the other, (ids, position of the first), padded to a multiple of 4."""
    samples = [
        Sample(
            input_ids=ids, labels=torch.full_like(ids, IGNORE_LABEL), next_position=first + len(ids), tiles=None,
            chunks=None, position_ids=torch.arange(first, first + len(ids)).expand(3, -1), modality=ids * 0,
        )
        for ids, first in parts
    ]  # fmt: skip
    return collate(samples, pad_id=0, row_of=[0] * len(parts), multiple_of=4)


LAYOUTS = {
    "one": (1, {}),
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "ep2": (2, {"expert_model_parallel_size": 2}),
    "cp2_tp2_recompute": (4, {"context_parallel_size": 2, "tensor_model_parallel_size": 2, "recompute": "full"}),
    "tp2_pp2_recompute": (
        4,
        {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "recompute": "full"},
    ),
}


@cache
def by_formula() -> dict[str, Any]:
    return run_ranks(one_step, 1, ParallelConfig(), True)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_use_equals_the_masked_formula(layout: str) -> None:
    expected = by_formula()
    world_size, sizes = LAYOUTS[layout]
    ranks = run_ranks(one_step, world_size, ParallelConfig(**sizes), False)
    losses = {name: value for rank in ranks for name, value in rank["losses"].items()}
    assert set(losses) == set(USES)
    for name, values in losses.items():
        want = expected["losses"][name]
        assert (want > 0).sum() > 10
        assert values == pytest.approx(want, rel=2e-5, abs=1e-5), name
    seen: set[str] = set()
    for rank in ranks:
        for name, grad in rank["grads"].items():
            want = expected["grads"][name]
            scale = float(abs(want).max())
            # A bias of keys moves all scores of a query alike: its gradient is rounding.
            assert grad == pytest.approx(want, rel=1e-3, abs=2e-5 * scale + 1e-7), name
            seen.add(name)
        for slot, cached in rank.get("cached", {}).items():
            assert len(cached) == sum(n for new in CACHED for i, _, n in new if i == slot) >= 6
            assert cached == pytest.approx(rank["whole"][slot], rel=1e-4, abs=1e-4)
            assert cached == pytest.approx(expected["whole"][slot], rel=1e-4, abs=1e-4)
    assert seen == set(expected["grads"]) and len(seen) > 20


def test_the_uses_differ() -> None:
    """Were prompts shared by nobody, or prefixes causal, losses would be others."""
    plain = {name: [[(length, None) for length, _ in row] for row in rows] for name, rows in USES.items()}
    kept = dict(USES)
    try:
        USES.update(plain)
        other = run_ranks(one_step, 1, ParallelConfig(), False)[0]["losses"]
    finally:
        USES.update(kept)
    moved = {name: abs(other[name] - by_formula()["losses"][name]).max() > 0.1 for name in USES}
    assert moved == {"packed": False, "shared prompt": True, "prefix": True, "one sample": False}
