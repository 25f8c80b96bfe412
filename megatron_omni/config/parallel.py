"""How the model is laid out over ranks. Names are Megatron-Core's."""

import math
from dataclasses import dataclass, field
from typing import Literal

from megatron_omni.config.ranges import number

LOGITS_CHUNK = 2**26
"""Logits that stand on a rank at a time (256 MiB in fp32, of which three copies stand at the peak); the loss of more of
them is made in chunks of rows, which the backward makes once more."""
MODEL_PARALLEL = (
    "tensor_model_parallel_size",
    "context_parallel_size",
    "pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)
"""Sizes by which a model, or a sequence, is divided."""

OFFLOAD_MODULES = ("attn_norm", "qkv_linear", "core_attn", "attn_proj")
"""Of Megatron's, those that are its own code here: the feed-forward layers are not."""


@dataclass(kw_only=True)
class ParallelConfig:
    """Sizes of the parallel groups; data parallelism is what is left of the world size."""

    tensor_model_parallel_size: int = number(1, at_least=1, at_most=10**6)
    """TP: ranks that share every matrix of attention, dense FFN and vocabulary; above 1 sequences are shared, too
    (sequence parallelism)."""
    context_parallel_size: int = number(1, at_least=1, at_most=10**6)
    """CP: ranks that share the tokens of every sequence, an early and a late part each, and gather keys and values in every
    attention layer."""
    pipeline_model_parallel_size: int = number(1, at_least=1, at_most=1000)
    """PP: stages that the blocks are divided over, equally many each unless ``pipeline_layout`` says otherwise."""
    pipeline_layout: list[int] = number(
        list,
        at_least=1,
        at_most=1000,
        fix="give every stage a block, or use fewer stages (pipeline_model_parallel_size)",
    )
    """Blocks (attention with its feed-forward part) of each pipeline stage, such as [6, 8, 8, 6]; [] gives all as many.
    The first stage has the encoders besides, the last the output layer and what speaks or draws; ``megatron-omni plan``
    proposes the split whose slowest stage is fastest. Checkpoints do not depend on it."""
    expert_model_parallel_size: int = number(1, at_least=1, at_most=10**6)
    """EP: ranks that the routed experts are divided over."""
    expert_tensor_parallel_size: int = number(1, at_least=1, at_most=10**6)
    """ETP: ranks that share the matrices of one routed expert."""
    recompute: Literal["none", "full", "moe"] = "none"
    """Activation recomputation: every layer, those of the encoders too, or the MoE layers alone."""
    fine_grained_activation_offloading: bool = False
    """What ``offload_modules`` keep for the backward waits for it in main memory (needs a CUDA device and Transformer
    Engine)."""
    offload_modules: list[str] = field(default_factory=list)
    """Parts of attention layers whose inputs are offloaded: attn_norm, qkv_linear, core_attn, attn_proj."""
    overlap_grad_reduce: bool = False
    """Gradients are reduced over data-parallel ranks while the backward goes on, in buckets."""
    overlap_param_gather: bool = False
    """Weights that other ranks updated are gathered while the next forward goes on (distributed optimizer)."""
    bucket_size: int | None = number(None, at_least=1, fix="null chooses one")
    """Gradient elements that are reduced together, as Megatron's ``ddp_bucket_size``; null: 40 million, or a million a
    data-parallel rank where that is more, if ``overlap_grad_reduce`` is set, else all of them. Stages after the first
    reduce all together."""
    distributed_timeout_seconds: float = number(600.0, at_least=1, at_most=604_800)
    """A collective that waits longer ends the run on every rank."""


def not_divided(parallel: ParallelConfig, world_size: int) -> str:
    """What is wrong with ``world_size`` ranks for a replica of the model; nothing where it fits."""
    sizes = {
        name: getattr(parallel, name)
        for name in ("tensor_model_parallel_size", "context_parallel_size", "pipeline_model_parallel_size")
        if name != "context_parallel_size" or parallel.context_parallel_size > 1
    }
    needed = math.prod(sizes.values())
    if world_size % needed == 0:
        return ""
    named = " x ".join(f"{name}={size}" for name, size in sizes.items())
    return (
        f"parallel.{named} = {needed} does not divide the {world_size} rank(s) of this run; start a multiple of {needed} "
        "ranks or lower one of them"
    )


def sequence_multiple(parallel: ParallelConfig) -> int:
    """Tokens that the length of a row must be a multiple of: every rank has two equal parts of it under context parallelism,
    each of which is cut over the tensor-parallel ranks."""
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    return tp if cp == 1 else 2 * tp * cp


def pipeline_problem(parallel: ParallelConfig, num_layers: int) -> str | None:
    """What is wrong with the cut of ``num_layers`` blocks into pipeline stages: field, value, why, fix."""
    stages, layout = parallel.pipeline_model_parallel_size, parallel.pipeline_layout
    nearly_even = [(num_layers + stage) // stages for stage in range(stages)]
    example = f", such as {nearly_even}" if num_layers >= stages else ""
    if not layout:
        if num_layers % stages == 0:
            return None
        listed = f" or list the blocks of each stage: parallel.pipeline_layout={nearly_even}" if example else ""
        return (
            f"parallel.pipeline_model_parallel_size={stages} does not divide model.num_layers={num_layers}; choose a divisor of "
            f"{num_layers}{listed}"
        )
    if stages == 1:
        return f"parallel.pipeline_layout={layout}: no effect with pipeline_model_parallel_size=1; set it to []"
    if len(layout) != stages:
        return (
            f"parallel.pipeline_layout={layout}: {len(layout)} number(s) for parallel.pipeline_model_parallel_size={stages} "
            f"stages; give {stages}{example}"
        )
    if sum(layout) != num_layers:
        return (
            f"parallel.pipeline_layout={layout}: {sum(layout)} blocks, and model.num_layers={num_layers}; give numbers with "
            f"this sum{example}"
        )
    return None


def stage_blocks(parallel: ParallelConfig, num_layers: int) -> list[int]:
    """Blocks of each pipeline stage, the first one's first; ValueError where they cannot be cut so."""
    if (problem := pipeline_problem(parallel, num_layers)) is not None:
        raise ValueError(problem)
    stages = parallel.pipeline_model_parallel_size
    return list(parallel.pipeline_layout) or [num_layers // stages] * stages


def bucket_size(parallel: ParallelConfig, *, stage: int, dp_size: int) -> int | None:
    """Elements from which on a gradient bucket of pipeline ``stage`` is full; None: one bucket for all."""
    if stage > 0:
        return None  # later stages reduce off the critical path: Megatron gives them one bucket
    if parallel.bucket_size is not None:
        return parallel.bucket_size
    # Larger for many ranks: a rank's part of a message must stay long enough for the links to be used fully.
    return max(40_000_000, 1_000_000 * dp_size) if parallel.overlap_grad_reduce else None
