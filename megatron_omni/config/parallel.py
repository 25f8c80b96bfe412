"""How the model is laid out over ranks. Names are Megatron-Core's."""

from dataclasses import dataclass
from typing import Literal


@dataclass(kw_only=True)
class ParallelConfig:
    """Sizes of the parallel groups; data parallelism is what is left of the world size."""

    tensor_model_parallel_size: int = 1
    """TP > 1 implies sequence parallelism."""
    pipeline_model_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int = 1
    recompute: Literal["none", "full", "moe"] = "none"
    """Activation recomputation: every layer, those of the encoders too, or the MoE layers alone."""
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    distributed_timeout_seconds: float = 600.0
    """A collective that waits longer ends the run on every rank."""
