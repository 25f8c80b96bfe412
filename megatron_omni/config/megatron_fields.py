"""Which fields ``model.megatron`` may set: those of Megatron-Core's ``TransformerConfig`` that no field of a recipe decides.

The names are read from megatron-core's source, since importing it would import torch. Importing nothing also means that they
are those of the installed version.
"""

import ast
import functools
import importlib.util
from pathlib import Path

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
    "context_parallel_size": "parallel, which has no context parallelism",
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
