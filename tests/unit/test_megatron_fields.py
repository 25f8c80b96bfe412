"""``model.megatron``: every field that it takes is seen to act, every other is refused with what acts instead."""

import dataclasses
import re
from typing import Any

import pytest
import torch
from megatron.core.fusions import fused_bias_dropout
from megatron.core.transformer import TransformerConfig, mlp

from megatron_omni.config.load import all_fields, recipe_from_dict
from megatron_omni.config.megatron_fields import ACTING, INSTEAD, OURS, refusal, transformer_config_fields
from megatron_omni.config.run import Recipe
from megatron_omni.config.validate import validate
from megatron_omni.models.build import build_language_model
from megatron_omni.parallel import groups
from tests.distributed import test_language_layouts as tiny
from tests.distributed.harness import Rank, run_ranks


def recipe_with(*, moe: bool = False, pipeline: int = 1, **fields: Any) -> Recipe:
    recipe = tiny._recipe(moe=moe, pipeline_model_parallel_size=pipeline)
    recipe.model.megatron = fields
    return recipe


def loss_of(recipe: Recipe) -> float:
    """Of a dense model on one micro-batch, in training mode."""
    pg = groups.initialize(recipe.parallel)
    try:
        model, batch = build_language_model(recipe, pg), tiny._batch(0, 0)
        return tiny._forward_step(batch, model, num_labels=8, step=0)[0].sum().item()
    finally:
        groups.destroy()


def test_softmax_scale_acts() -> None:
    assert abs(loss_of(recipe_with(softmax_scale=4.0)) - loss_of(recipe_with())) > 1e-3


@pytest.mark.parametrize(
    ("field", "module", "function"),
    [
        ("bias_activation_fusion", mlp, "bias_swiglu_impl"),
        ("bias_dropout_fusion", fused_bias_dropout, "bias_dropout_add_fused_train"),
    ],
)
def test_fusions_act(field: str, module: Any, function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron's fused function is called with the field, is not without it, and computes the same."""
    calls, original = [], getattr(module, function)
    monkeypatch.setattr(module, function, lambda *args: calls.append(1) or original(*args))
    plain = loss_of(recipe_with(**{field: False}))
    assert not calls
    assert loss_of(recipe_with(**{field: True})) == pytest.approx(plain, rel=1e-6)
    assert calls


def test_gradient_accumulation_fusion_needs_its_kernel() -> None:
    with pytest.raises(ValueError, match=r"model\.megatron\.gradient_accumulation_fusion=True needs .*Apex"):
        loss_of(recipe_with(gradient_accumulation_fusion=True))


def _calls(rank: Rank, recipe: Recipe) -> tuple[int, int]:
    """Batched messages and device synchronisations of one training step."""
    counts = {"batch": 0, "synchronize": 0}

    def counted(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    torch.distributed.batch_isend_irecv = counted("batch", torch.distributed.batch_isend_irecv)
    torch.cuda.synchronize = counted("synchronize", torch.cuda.synchronize)
    tiny._train(rank, recipe, 1)
    return counts["batch"], counts["synchronize"]


def test_messages_between_stages_go_as_asked() -> None:
    batched = run_ranks(_calls, 2, recipe_with(pipeline=2))[0]
    waiting = run_ranks(_calls, 2, recipe_with(pipeline=2, batch_p2p_sync=True))[0]
    single = run_ranks(_calls, 2, recipe_with(pipeline=2, batch_p2p_comm=False))[0]
    assert batched[0] == waiting[0] > single[0] == 0, "no shape is sent ahead in a batch of its own"
    assert waiting[1] - batched[1] == waiting[0], "batch_p2p_sync=True: a synchronisation after every batch"


def test_every_field_that_may_be_set_is_tested_above() -> None:
    assert set(ACTING) == {
        "softmax_scale", "bias_activation_fusion", "bias_dropout_fusion", "gradient_accumulation_fusion", "batch_p2p_comm",
        "batch_p2p_sync",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("fp8", "hybrid", "low-precision context.*optim.precision"),
        ("fp4", "e2m1", "low-precision context.*optim.precision"),
        ("enable_cuda_graph", True, "another number of rows"),
        ("cuda_graph_impl", "local", "another number of rows"),
        ("external_cuda_graph", True, "another number of rows"),
        ("context_parallel_size", 2, "set parallel.context_parallel_size"),
        ("cp_comm_type", "p2p", "this project's own core attention"),
        ("virtual_pipeline_model_parallel_size", 2, "parallel.pipeline_model_parallel_size"),
        ("recompute_granularity", "selective", "parallel.recompute"),
        ("recompute_modules", ["core_attn"], "parallel.recompute"),
        ("moe_router_fusion", True, "model.moe"),
        ("moe_shared_expert_overlap", True, "model.moe"),
        ("cpu_offloading", True, "parallel.fine_grained_activation_offloading"),
        ("mtp_num_layers", 1, "multi-token prediction"),
        ("layernorm_zero_centered_gamma", True, "model.layernorm_epsilon"),
        ("attention_softmax_in_fp32", False, "core attention"),
        ("window_size", [64, 0], "core attention"),
        ("tp_comm_overlap", True, "communication buffers"),
        ("cross_entropy_loss_fusion", True, "the loss is this project's own"),
        ("activation_func_clamp_value", 7.0, "SwiGLU"),
        ("tensor_model_parallel_size", 2, "set parallel.tensor_model_parallel_size"),
        ("test_mode", True, "those that act are softmax_scale, "),
        ("fp9", 1, "has no such field; did you mean 'fp"),
    ],
)
def test_a_field_without_effect_is_refused_with_what_acts_instead(field: str, value: Any, told: str) -> None:
    with pytest.raises(ValueError, match=rf"model\.megatron\.{field}={re.escape(repr(value))}: .*{told}"):
        validate(recipe_from_dict({"model": {"megatron": {field: value}}}), check_files=False)


def test_a_field_is_refused_where_nothing_reads_it() -> None:
    assert "model.moe sets experts" in str(refusal("bias_activation_fusion", recipe_with(moe=True)))
    assert "of which there is one" in str(refusal("batch_p2p_sync", recipe_with()))
    assert refusal("batch_p2p_sync", recipe_with(pipeline=2)) is None


def test_the_lists_are_of_the_installed_version() -> None:
    """No entry is stale, every field of this Megatron has its answer, and no pattern catches one that acts."""
    known = {field.name for field in dataclasses.fields(TransformerConfig)}
    assert transformer_config_fields() == known
    assert set(OURS) | set(ACTING) <= known
    for pattern, _ in INSTEAD:
        assert any(re.match(pattern, name) for name in known), pattern
    own = {name.rpartition(".")[2] for name in all_fields()}
    refused = {name for name in known if refusal(name, recipe_with(pipeline=2))}
    assert known - refused == set(ACTING)
    assert not own & set(ACTING)
