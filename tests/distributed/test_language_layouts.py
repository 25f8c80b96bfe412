"""The trunk trains alike on every layout: same weights at the start, same losses over 7 AdamW steps as one rank.

Dense and with experts, whose routing is drawn: draws are keyed by token, so a layout changes nothing but rounding.
"""

from functools import cache, partial

import pytest
import torch
import torch.distributed as dist
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

from megatron_omni.batch import IGNORE_LABEL, OmniBatch
from megatron_omni.config.model import ModelConfig, MoEConfig
from megatron_omni.config.optim import OptimConfig
from megatron_omni.config.parallel import ParallelConfig
from megatron_omni.config.run import Recipe
from megatron_omni.models.build import build_language_model
from megatron_omni.models.language import LanguageModel
from megatron_omni.models.omni import token_facts
from megatron_omni.parallel import groups
from megatron_omni.parallel.schedule import run_step
from megatron_omni.parallel.wrap import wrap_model
from megatron_omni.segments import packed
from tests.distributed.harness import Rank, run_ranks

STEPS, MICRO_BATCHES, ROWS, VOCAB = 7, 4, 2, 250


def _recipe(
    *, tied: bool = False, precision: str = "fp32", recompute: str = "none", moe: bool = False, **sizes: int
) -> Recipe:
    experts = MoEConfig(num_shared_experts=1, moe_ffn_hidden_size=24, moe_shared_expert_intermediate_size=8)
    model = ModelConfig(
        num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2, kv_channels=16,
        vocab_size=VOCAB, make_vocab_size_divisible_by=64, mrope_section=[2, 3, 3], moe=experts if moe else None,
        vision=None, audio=None, untie_embeddings_and_output_weights=not tied, init_method_std=0.1,
    )  # fmt: skip
    parallel = ParallelConfig(recompute=recompute, **sizes)
    return Recipe(model=model, parallel=parallel, optim=OptimConfig(precision=precision))


def _batch(step: int, index: int) -> OmniBatch:
    """Micro-batch ``index`` of a step; lengths differ, labels are the next tokens of half the row."""
    size = 8 * (1 + index % 2)
    generator = torch.Generator().manual_seed(100 * (step % 3) + index)
    ids = torch.randint(0, VOCAB, (ROWS, size + 1), generator=generator)
    labels = ids[:, 1:].clone()
    labels[:, : size // 2] = IGNORE_LABEL
    positions = torch.arange(size).expand(ROWS, size)
    zeros = torch.zeros(ROWS, size, dtype=torch.long)
    return OmniBatch.of(
        input_ids=ids[:, :-1], labels=labels, position_ids=positions.expand(3, ROWS, size), segment_ids=zeros,
        sample_ids=zeros + torch.arange(ROWS)[:, None] + ROWS * index, sample_positions=positions, modality=zeros,
        source_ids=zeros, attention=packed([[size]] * ROWS, size),
    )  # fmt: skip


def _forward_step(batch, model, *, num_labels, step):
    ctx = token_facts(batch, seed=1, step=step, stochastic=True, aux_loss_scale=0.01, stats=None)
    losses = model(
        input_ids=batch.input_ids, position_ids=batch.position_ids, attention=batch.attention, ctx=ctx,
        labels=batch.labels, label_places=batch.label_places,
    )  # fmt: skip

    def loss_function(losses):
        loss = losses.sum() / num_labels
        return loss, loss.detach()

    return losses, loss_function


def _train(rank: Rank | None, recipe: Recipe, steps: int = STEPS) -> tuple[list[float], list[float]]:
    """Loss and gradient norm of each step, over all micro-batches of all ranks."""
    pg = groups.initialize(recipe.parallel) if rank is None else rank.initialize(recipe.parallel)
    layout = groups.place_in(pg)
    model = wrap_model(build_language_model(recipe, pg), recipe, pg)
    config = OptimizerConfig(
        optimizer="adam", lr=0.01, weight_decay=0.01, clip_grad=1.0, bf16=recipe.optim.precision == "bf16",
        params_dtype=model.config.pipeline_dtype, use_distributed_optimizer=recipe.optim.use_distributed_optimizer,
    )  # fmt: skip
    optimizer = get_megatron_optimizer(config, [model], pg_collection=pg, use_gloo_process_groups=False)
    losses, norms = [], []
    for step in range(steps):
        batches = [_batch(step, i) for i in range(MICRO_BATCHES)]
        num_labels = sum(b.num_label_tokens for b in batches)
        model.zero_grad_buffer()
        optimizer.zero_grad()
        reports = run_step(
            partial(_forward_step, num_labels=num_labels, step=step),
            batches[layout.dp_rank :: layout.dp_size],
            model,
            pg=pg,
            recipe=recipe,
        )
        total = torch.stack(reports).sum() if layout.is_last_stage else torch.zeros(())
        dist.all_reduce(total)
        losses.append(total.item() / layout.tp_size)
        updated, norm, _ = optimizer.step()
        norms.append(norm)
        assert updated
    if rank is None:
        groups.destroy()
    return losses, norms


@cache
def _one_rank(tied: bool = False, moe: bool = False) -> tuple[list[float], list[float]]:
    return _train(None, _recipe(tied=tied, moe=moe))


LAYOUTS = {
    "TP2": {"tensor_model_parallel_size": 2},
    "PP2": {"pipeline_model_parallel_size": 2},
    "TP2xPP2": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
    "DP2": {},
}
MOE_LAYOUTS = {
    "EP2": {"expert_model_parallel_size": 2},
    "TP2xEP2": {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2},
    "PP2xEP2": {"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2},
    "DP2-overlap": {"overlap_grad_reduce": True, "overlap_param_gather": True},
    "TP2xETP2": {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 2},
}
RANKS = {
    "TP2": 2,
    "PP2": 2,
    "TP2xPP2": 4,
    "DP2": 2,
    "EP2": 2,
    "TP2xEP2": 2,
    "PP2xEP2": 4,
    "TP2xETP2": 2,
    "DP2-overlap": 2,
}


def _assert_equal_training(recipe: Recipe, num_ranks: int, expected: tuple[list[float], list[float]]) -> None:
    losses, norms = expected
    assert losses[-1] < 0.8 * losses[0], "the reference does not learn, so equality would prove little"
    assert max(norms) > 1.0, "nothing is clipped, so a wrong norm would not show"
    for their_losses, their_norms in run_ranks(_train, num_ranks, recipe):
        assert their_losses == pytest.approx(losses, rel=1e-4)
        assert their_norms == pytest.approx(norms, rel=1e-3)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_equals_one_rank(layout: str, tied: bool) -> None:
    _assert_equal_training(_recipe(tied=tied, **LAYOUTS[layout]), RANKS[layout], _one_rank(tied=tied))


@pytest.mark.parametrize("layout", MOE_LAYOUTS)
def test_training_with_experts_equals_one_rank(layout: str) -> None:
    _assert_equal_training(_recipe(moe=True, **MOE_LAYOUTS[layout]), RANKS[layout], _one_rank(moe=True))


@pytest.mark.parametrize(
    ("recompute", "sizes"),
    [("moe", MOE_LAYOUTS["PP2xEP2"]), ("full", MOE_LAYOUTS["PP2xEP2"]), ("full", LAYOUTS["TP2xPP2"])],
    ids=["moe-PP2xEP2", "full-PP2xEP2", "full-TP2xPP2"],
)
def test_recompute_with_micro_batches_in_flight_equals_one_rank(recompute: str, sizes: dict[str, int]) -> None:
    """A replayed layer must see the tokens of its own micro-batch, not of the one computed last."""
    losses, norms = _one_rank(moe=True)
    for their_losses, their_norms in run_ranks(_train, 4, _recipe(moe=True, recompute=recompute, **sizes), 5):
        assert their_losses == pytest.approx(losses[:5], rel=1e-4)
        assert their_norms == pytest.approx(norms[:5], rel=1e-3)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_loss_in_chunks_of_rows_trains_alike(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rows of logits at a time on one rank and on two; the vocabulary's gradient is the sum over chunks."""
    whole = _one_rank(tied=tied)
    monkeypatch.setattr(LanguageModel, "logits_chunk", 3 * 256)
    losses, norms = _train(None, _recipe(tied=tied))
    assert losses == pytest.approx(whole[0], rel=1e-6)
    assert norms == pytest.approx(whole[1], rel=1e-5)
    assert losses != whole[0], "no chunk was made"
    _assert_equal_training(_recipe(tied=tied, **LAYOUTS["TP2"]), 2, whole)


def test_bf16_follows_fp32() -> None:
    """bf16 keeps 8 bits: losses agree to a percent while the model learns."""
    losses, _ = run_ranks(_train, 2, _recipe(precision="bf16", **LAYOUTS["TP2"]))[0]
    assert losses == pytest.approx(_one_rank()[0], rel=0.02)
    assert losses != pytest.approx(_one_rank()[0], rel=1e-5), "computed in fp32?"


def test_first_gradient_of_every_parameter_equals_one_rank() -> None:
    """Beyond losses: embedding, norm, bias and projection gradients after reduction, gathered over the tensor ranks."""
    expected = run_ranks(_gradients, 1, _recipe())[0]
    shards = run_ranks(_gradients, 2, _recipe(**LAYOUTS["TP2"]))
    assert set(expected) == set(shards[0])
    for name, (_, _, value) in expected.items():
        dim, stride, _ = shards[0][name]
        parts = [shard[name][2] for shard in shards]
        if dim is None:
            assert torch.equal(parts[0], parts[1]), f"{name} differs between tensor-parallel ranks"
            whole = parts[0]
        else:
            blocks = zip(*(part.chunk(stride, dim) for part in parts), strict=True)
            whole = torch.cat([torch.cat(block, dim) for block in blocks], dim)
        torch.testing.assert_close(whole, value, rtol=1e-4, atol=1e-5 * value.abs().max().item(), msg=name)


def _gradients(rank: Rank, recipe: Recipe):
    pg = rank.initialize(recipe.parallel)
    model = wrap_model(build_language_model(recipe, pg), recipe, pg)
    batches = [_batch(0, i) for i in range(MICRO_BATCHES)]
    model.zero_grad_buffer()
    run_step(partial(_forward_step, num_labels=10, step=0), batches, model, pg=pg, recipe=recipe)
    return {
        name: (
            p.partition_dim if getattr(p, "tensor_model_parallel", False) else None,
            getattr(p, "partition_stride", 1),
            p.main_grad.clone(),
        )
        for name, p in model.module.named_parameters()
    }
