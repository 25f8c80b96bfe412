"""Which fields of Megatron-Core's ``TransformerConfig`` ``model.megatron`` may set: those that are known to act.

Of some 350 fields most are read by parts of Megatron that this project replaces (its layer loop, core attention, MoE layer,
loss, initialisation, training loop): set, they would be accepted and do nothing. So a field is refused unless it is listed
in ``ACTING``, each of which a test sees act (tests/unit/test_megatron_fields.py), and the refusal says what acts instead.

The names are read from megatron-core's source, since importing it would import torch. Importing nothing also means that they
are those of the installed version.
"""

import ast
import functools
import importlib.util
import re
from difflib import get_close_matches
from pathlib import Path

from megatron_omni.config.load import all_fields
from megatron_omni.config.run import Recipe

SOURCES = {
    "transformer/transformer_config.py": "TransformerConfig",
    "model_parallel_config.py": "ModelParallelConfig",
}

OURS = {
    "bf16": "optim.precision",
    "fp16": "optim.precision",
    "params_dtype": "optim.precision",
    "pipeline_dtype": "optim.precision",
    "autocast_dtype": "optim.precision",
    "num_moe_experts": "model.moe.num_routed_experts",
    "moe_router_topk": "model.moe.top_k",
    "moe_router_load_balancing_type": "model.moe.moe_aux_loss_coeff",
    "sequence_parallel": "parallel.tensor_model_parallel_size",
    "context_parallel_size": "parallel.context_parallel_size",
    "virtual_pipeline_model_parallel_size": "parallel.pipeline_model_parallel_size",
    "recompute_granularity": "parallel.recompute",
    "variable_seq_lengths": "data.packing",
    "calculate_per_token_loss": "the loss, a mean over label tokens",
    "perform_initialization": "model.init_method_std",
    "normalization": "the architecture",
    "add_bias_linear": "the architecture",
    "gated_linear_unit": "the architecture",
    "activation_func": "the architecture",
}
"""Fields of Megatron under other names than ours -> what decides them."""


ACTING = {
    "softmax_scale": "attention",
    "bias_activation_fusion": "the dense feed-forward part",
    "bias_dropout_fusion": "residual sums",
    "gradient_accumulation_fusion": "linear layers",
    "batch_p2p_comm": "messages between pipeline stages",
    "batch_p2p_sync": "messages between pipeline stages",
}
"""Fields that ``model.megatron`` may set -> what reads them."""

INSTEAD = (
    (
        r"fp[48]|tp_only_amax|first_last_layers_bf16|num_layers_at_\w+_in_bf16|use_kitchen|kitchen_|quant_recipe",
        "the layer loop of this project never enters Megatron's low-precision context, so everything would be computed as "
        "before; optim.precision (bf16 or fp32) decides what is computed in",
    ),
    (
        r"\w*cuda_graph",
        "a graph replays fixed shapes, but routed experts get another number of rows in every micro-batch, which the host has "
        "to read; there is nothing to set",
    ),
    (
        r"\w*context_parallel|max_seqlen_per_dp_cp_rank|cp_comm_type",
        "keys and values are gathered by this project's own core attention; parallel.context_parallel_size says over how many "
        "ranks",
    ),
    (
        r"\w*recompute|distribute_saved|num_microbatches_with_partial",
        "parallel.recompute decides what is computed again",
    ),
    (
        r"\w*offload",
        "a layer loop that this project replaces reads it, or it belongs to parallel.fine_grained_activation_offloading",
    ),
    (
        r"moe_|overlap_moe|overlap_dispatch|delay_wgrad|ep_overlap|high_priority_a2a",
        "router, dispatcher and experts are this project's own, which model.moe sets",
    ),
    (r"mtp_", "multi-token prediction is not part of the model"),
    (
        r"mamba_|use_mamba|linear_|dsa_|experimental_|multi_latent|is_hybrid|hetero|hetereo|num_layers_in_|pipeline_model_parallel_layout"
        r"|account_for_|microbatch_group",
        "blocks are attention and a feed-forward part; model.num_layers, parallel.pipeline_model_parallel_size and "
        "parallel.pipeline_layout decide",
    ),
    (r"init_|\w*init_method|use_mup|mup_|use_cpu_init|embedding_init", "weights are drawn with model.init_method_std"),
    (
        r"attention_|window_|qk_|softmax_|apply_query|log_max_attention|flash_|no_rope|rotary_|apply_rope|fused_single_qkv"
        r"|masked_softmax|mrope",
        "core attention and rotary positions are this project's own (models/attention.py, models/rope.py); "
        "model.rotary_base, model.mrope_section, model.attention_dropout and softmax_scale here set them",
    ),
    (
        r"layernorm_|memory_efficient_layer|persist_layer|fused_residual|apply_residual|fp32_residual",
        "norms are this project's own or Transformer Engine's; model.layernorm_epsilon sets them",
    ),
    (
        r"activation_func|glu_|use_te_activation|use_fused_weighted",
        "experts and the dense part compute SwiGLU, as the weights ask",
    ),
    (r"cross_entropy|calculate_per_token", "the loss is this project's own (ops/token_log_probs.py)"),
    (r"tp_comm_", "Transformer Engine's communication buffers are not set up; there is nothing to set"),
    (
        r"inference_|use_inference|\w*_for_prefill|symmetric_ar",
        "answers are made by this project's own engine (generation/)",
    ),
    (
        r"\w*_func$|timers|barrier_with|overlap_p2p|use_ring_exchange|deallocate_|defer_embedding|wgrad_deferral|enable_autocast",
        "the schedule of a step sets it (parallel/schedule.py)",
    ),
    (r"gtp_|\w*num_weight_shards|expert_gtp", "weights are laid out by the sizes in parallel"),
)
"""Fields that do not act (a pattern of how their names begin) -> what acts instead. First match wins."""


def refusal(name: str, recipe: Recipe) -> str | None:
    """Why ``model.megatron`` of ``recipe`` may not set ``name``; None where it may."""
    own = {field.rsplit(".", 1)[-1]: field for field in reversed(all_fields())}
    if name in own:
        return f"decided by another field of the recipe; set {own[name]}"
    if name in OURS:
        return f"decided by another field of the recipe; it follows from {OURS[name]}"
    if name not in ACTING:
        known = transformer_config_fields()
        if name not in known:
            near = get_close_matches(name, known, n=1)
            return "Megatron's TransformerConfig has no such field" + (f"; did you mean {near[0]!r}?" if near else "")
        told = (text for pattern, text in INSTEAD if re.match(pattern, name))
        why = next(told, f"those that act are {', '.join(ACTING)}")
        return f"not known to have an effect: {why}"
    if recipe.model.moe is not None and name == "bias_activation_fusion":
        return "it acts on the dense feed-forward part alone, which a model with experts does not have; model.moe sets experts"
    if recipe.parallel.pipeline_model_parallel_size == 1 and name.startswith("batch_p2p"):
        return "it acts on messages between pipeline stages, of which there is one; leave it out"
    return None


@functools.cache
def transformer_config_fields() -> frozenset[str]:
    """Names of the fields of ``TransformerConfig``; ValueError where megatron-core is not installed."""
    spec = importlib.util.find_spec("megatron.core")  # imports the namespace ``megatron`` alone
    if spec is None or spec.origin is None:
        raise ValueError("model.megatron needs megatron-core, which is not installed; install it")
    root = Path(spec.origin).parent
    names: set[str] = set()
    for file, name in SOURCES.items():
        tree = ast.parse((root / file).read_text(encoding="utf-8"))
        body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
        names |= {
            node.target.id for node in body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        }
    return frozenset(names)
