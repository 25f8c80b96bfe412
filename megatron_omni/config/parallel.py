"""How the model is laid out over ranks. Names are Megatron-Core's."""

from dataclasses import dataclass
from typing import Literal

from megatron_omni.config.ranges import number

LOGITS_CHUNK = 2**26
"""Logits that stand on a rank at a time (256 MiB in fp32, of which three copies stand at the peak); the loss of more of
them is made in chunks of rows, which the backward makes once more."""


@dataclass(kw_only=True)
class ParallelConfig:
    """Sizes of the parallel groups; data parallelism is what is left of the world size."""

    tensor_model_parallel_size: int = number(1, at_least=1, at_most=10**6)
    """TP: ranks that share every matrix of attention, dense FFN and vocabulary; above 1 sequences are shared, too
    (sequence parallelism)."""
    pipeline_model_parallel_size: int = number(1, at_least=1, at_most=1000)
    """PP: stages that the blocks are divided over, equally many each."""
    expert_model_parallel_size: int = number(1, at_least=1, at_most=10**6)
    """EP: ranks that the routed experts are divided over."""
    expert_tensor_parallel_size: int = number(1, at_least=1, at_most=10**6)
    """ETP: ranks that share the matrices of one routed expert."""
    recompute: Literal["none", "full", "moe"] = "none"
    """Activation recomputation: every layer, those of the encoders too, or the MoE layers alone."""
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


def bucket_size(parallel: ParallelConfig, *, stage: int, dp_size: int) -> int | None:
    """Elements from which on a gradient bucket of pipeline ``stage`` is full; None: one bucket for all."""
    if stage > 0:
        return None  # later stages reduce off the critical path: Megatron gives them one bucket
    if parallel.bucket_size is not None:
        return parallel.bucket_size
    # Larger for many ranks: a rank's part of a message must stay long enough for the links to be used fully.
    return max(40_000_000, 1_000_000 * dp_size) if parallel.overlap_grad_reduce else None
