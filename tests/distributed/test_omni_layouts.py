"""The whole model on several layouts: losses and encoder gradients of every layout equal one rank's.

One optimizer step of four micro-batches: everything mixed, text only, pictures only, sound only. Routers sample.
"""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_omni.batch import IGNORE_LABEL, Modality, OmniBatch
from megatron_omni.config.model import AudioConfig, ModelConfig, MoEConfig, VisionConfig
from megatron_omni.config.optim import OptimConfig
from megatron_omni.config.parallel import ParallelConfig
from megatron_omni.config.run import Recipe
from megatron_omni.models.build import build_model
from megatron_omni.models.parts import apply_freeze
from megatron_omni.parallel.schedule import run_step
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
from tests.attention import segments_of
from tests.distributed.harness import Rank, run_ranks

LENGTH = 32
AUX_LOSS_SCALE = 0.01
MODEL = ModelConfig(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=8,
    mrope_section=[2, 1, 1],
    vocab_size=60,
    make_vocab_size_divisible_by=8,
    moe=MoEConfig(moe_ffn_hidden_size=24, moe_shared_expert_intermediate_size=8, input_jitter=0.01),
    vision=VisionConfig(
        image_size=10, patch_size=2, hidden_size=16, ffn_hidden_size=24, num_layers=1, num_attention_heads=2,
        pooled_side=2,
    ),
    audio=AudioConfig(
        num_mel_bins=6, chunk_seconds=1.5, hidden_size=16, ffn_hidden_size=24, num_encoder_layers=1,
        num_decoder_layers=1, num_attention_heads=2, num_query_tokens=10, max_target_positions=10,
    ),
)  # fmt: skip

ROWS: dict[str, list[list[Span]]] = {
    "mixed": [
        [TextSpan(2), ImageSpan(1, 2), TextSpan(3), AudioSpan(1), TextSpan(5)],
        [TextSpan(1), VideoSpan((0.0, 1.0)), TextSpan(12)],
    ],
    "text": [[TextSpan(32)], [TextSpan(9)]],
    "pictures": [[TextSpan(3), ImageSpan(2, 1), TextSpan(7)], [ImageSpan(1, 1), TextSpan(20)]],
    "sound": [[AudioSpan(2), TextSpan(6)], [TextSpan(4), AudioSpan(1), TextSpan(4)]],
}


def batch_of(name: str, rows_of: dict[str, list[list[Span]]] = ROWS) -> OmniBatch:
    """Two padded rows; text is random and every third text token carries a label."""
    generator = torch.Generator().manual_seed(len(name))
    rule, rows = PositionRule.from_config(MODEL), rows_of[name]
    ids = torch.randint(0, MODEL.vocab_size, (len(rows), LENGTH), generator=generator)
    modality, segments = torch.zeros_like(ids), torch.full_like(ids, -1)
    positions = torch.zeros(3, *ids.shape, dtype=torch.int64)
    tiles = chunks = 0
    for row, spans in enumerate(rows):
        kinds: list[int] = []
        for span in spans:
            kind = {TextSpan: 0, ImageSpan: Modality.IMAGE, VideoSpan: Modality.VIDEO, AudioSpan: Modality.AUDIO}[
                type(span)
            ]
            kinds += [int(kind)] * span_length(span, rule)
            tiles += span_length(span, rule) // 4 if kind in (Modality.IMAGE, Modality.VIDEO) else 0
            chunks += span.num_chunks if isinstance(span, AudioSpan) else 0
        modality[row, : len(kinds)] = torch.tensor(kinds)
        segments[row, : len(kinds)] = 0
        positions[:, row, : len(kinds)] = position_ids(spans, rule)[0]
    grid = torch.arange(ids.numel()).view_as(ids)
    labelled = (grid % 3 == 0) & (modality == Modality.TEXT) & (segments == 0)
    samples = torch.arange(len(rows))[:, None] + 2 * list(rows_of).index(name)
    return OmniBatch.of(
        input_ids=ids,
        labels=torch.where(labelled, ids.roll(-1, 1), IGNORE_LABEL),
        position_ids=positions,
        segment_ids=segments,
        sample_ids=torch.where(segments == 0, samples, -1),
        sample_positions=torch.arange(LENGTH).expand_as(ids),
        modality=modality,
        source_ids=torch.zeros_like(ids),
        attention=segments_of(segments),
        pixel_values=torch.randn(tiles, 3, 10, 10, generator=generator) if tiles else None,
        audio_features=torch.randn(chunks, 6, 150, generator=generator) if chunks else None,
    )


def one_step(rank: Rank, parallel: ParallelConfig, freeze: list[str]) -> dict[str, Any]:
    """Loss of each of this rank's micro-batches, every encoder gradient, and the checkpoint keys that it holds."""
    pg = rank.initialize(parallel)
    optim = OptimConfig(precision="fp32", use_distributed_optimizer=False)
    recipe = Recipe(model=MODEL, parallel=parallel, optim=optim, freeze=freeze)
    built = build_model(recipe, pg)
    apply_freeze(built, freeze)
    model = wrap_model(built, recipe, pg)
    model.zero_grad_buffer()
    batches = {name: batch_of(name) for name in ROWS}
    num_labels = sum(batch.num_label_tokens for batch in batches.values())
    mine = list(batches)[pg.dp.rank() :: pg.dp.size()]

    def forward_step(batch: OmniBatch, model: Any) -> tuple[Tensor, Any]:
        losses = model(batch, step=7, stochastic=True, aux_loss_scale=AUX_LOSS_SCALE)
        return losses, lambda losses: (losses.sum() / num_labels, losses.sum().item())

    losses = run_step(forward_step, [batches[name] for name in mine], model, pg=pg, recipe=recipe)
    omni = unwrap_model(model)
    named = dict(omni.named_parameters())
    metadata = {"dp_cp_group": pg.dp_cp}
    return {
        "losses": dict(zip(mine, losses)) if omni.post_process else {},
        "grads": {n: p.main_grad.numpy() for n, p in named.items() if hasattr(p, "main_grad") and is_watched(n)},
        "first_stage": omni.pre_process,
        "keys": {value.key for value in omni.sharded_state_dict(metadata=metadata).values()},
    }


def is_watched(name: str) -> bool:
    return name.startswith(("vision.", "audio.")) or "final_norm" in name


@cache
def one_rank(freeze: tuple[str, ...] = ()) -> dict[str, Any]:
    return run_ranks(one_step, 1, ParallelConfig(), list(freeze))[0]


LAYOUTS = {
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "dp2": (2, {}),
    "ep2": (2, {"expert_model_parallel_size": 2}),
    "tp2_ep2": (2, {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2}),
    "tp2_pp2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
    "tp2_pp2_recompute": (
        4,
        {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "recompute": "full"},
    ),
    "cp2_ep2": (2, {"context_parallel_size": 2, "expert_model_parallel_size": 2}),
    "cp2_tp2": (4, {"context_parallel_size": 2, "tensor_model_parallel_size": 2}),
    "cp2_pp2_recompute": (
        4,
        {"context_parallel_size": 2, "pipeline_model_parallel_size": 2, "recompute": "full"},
    ),
    "dp2_overlap": (2, {"overlap_grad_reduce": True}),
}


@cache
def ranks_of(layout: str) -> list[dict[str, Any]]:
    world_size, sizes = LAYOUTS[layout]
    return run_ranks(one_step, world_size, ParallelConfig(**sizes), [])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_and_encoder_gradients_equal_one_rank(layout: str) -> None:
    expected, ranks = one_rank(), ranks_of(layout)
    losses = {name: value for rank in ranks for name, value in rank["losses"].items()}
    assert losses == pytest.approx(expected["losses"], rel=1e-5)
    seen: set[str] = set()
    for rank in ranks:
        for name, grad in rank["grads"].items():
            want = torch.from_numpy(expected["grads"][name])
            torch.testing.assert_close(torch.from_numpy(grad), want, atol=1e-6 * float(want.norm()) + 1e-9, rtol=1e-4)
            seen.add(name)
        encoders = {name for name in rank["grads"] if name.startswith(("vision.", "audio."))}
        assert bool(encoders) == rank["first_stage"]
    assert seen == set(expected["grads"])


def test_every_encoder_parameter_gets_a_gradient() -> None:
    grads = one_rank()["grads"]
    silent = [name for name, grad in grads.items() if not grad.any() and not name.endswith("k_proj.bias")]
    assert not silent and len(grads) > 60


@pytest.mark.parametrize("layout", ["tp2", "pp2", "tp2_pp2"])
def test_checkpoint_keys_do_not_depend_on_the_layout(layout: str) -> None:
    keys = set().union(*(rank["keys"] for rank in ranks_of(layout)))
    assert keys == one_rank()["keys"]
    assert {key.split(".")[0] for key in keys} == {"language", "vision", "audio"}


@pytest.mark.parametrize("layout", ["tp2", "ep2"])
def test_trained_projectors_below_a_frozen_trunk_equal_one_rank(layout: str) -> None:
    """Under EP 2 one rank's micro-batch has media where the other's has none: both must walk the same layers back."""
    world_size, sizes = LAYOUTS[layout]
    freeze = ("vision", "audio", "attention", "experts", "shared_experts", "gate", "embeddings", "output", "norms")
    expected = one_rank(freeze)
    assert expected["grads"] and all("projector" in name or "qformer" in name for name in expected["grads"])
    for rank in run_ranks(one_step, world_size, ParallelConfig(**sizes), list(freeze)):
        assert set(rank["grads"]) == set(expected["grads"])
        for name, grad in rank["grads"].items():
            want = torch.from_numpy(expected["grads"][name])
            torch.testing.assert_close(torch.from_numpy(grad), want, atol=1e-6 * float(want.norm()) + 1e-9, rtol=1e-4)
