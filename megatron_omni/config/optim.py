"""Optimizer and learning-rate schedule. Names are Megatron-Core's."""

from dataclasses import dataclass
from typing import Literal

from megatron_omni.config.ranges import number


@dataclass(kw_only=True)
class OptimConfig:
    """AdamW with a Megatron learning-rate schedule."""

    lr: float = number(1e-5, above=0, at_most=1000)
    """Highest learning rate, reached at the end of the warm-up."""
    min_lr: float = number(0.0, at_least=0, at_most=1000)
    """Learning rate at the end of the schedule."""
    lr_decay_style: Literal["constant", "linear", "cosine", "WSD"] = "cosine"
    """Shape of the schedule after its warm-up. WSD: constant, then a linear decay over the last ``lr_wsd_decay_iters`` steps."""
    lr_warmup_iters: int = number(0, at_least=0)
    """Steps over which the learning rate rises linearly from 0."""
    lr_decay_iters: int | None = number(None, at_least=1)
    """Steps of the schedule, warm-up included; null: ``train_iters``."""
    lr_wsd_decay_iters: int | None = number(None, at_least=1)
    """Steps of the decay at the end of a WSD schedule."""
    lr_scale: dict[str, float] = number(dict, above=0, at_most=10**6, fix="freeze leaves a part as it is")
    """Factor on the learning rate per named part (``vision: 0.1``); the part names of ``freeze``."""
    weight_decay: float = number(0.0, at_least=0, at_most=1000)
    """Share of a matrix, times the learning rate, that a step takes off it (AdamW); norms and biases keep theirs."""
    adam_beta1: float = number(0.9, at_least=0, below=1)
    """Decay of the running mean of gradients."""
    adam_beta2: float = number(0.95, at_least=0, below=1)
    """Decay of the running mean of squared gradients."""
    adam_eps: float = number(1e-8, above=0, at_most=1)
    """Added to the root of the squares' mean in Adam's divisor."""
    clip_grad: float = number(1.0, at_least=0)
    """Largest norm of the whole gradient, which is scaled down to it; 0 switches clipping off."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """What is computed in. bf16 keeps fp32 master weights, and fp32 gradients and moments unless the next fields say
    otherwise."""
    grad_reduce_in_fp32: bool = True
    """Gradients are added up over micro-batches and ranks in fp32. False, with ``precision: bf16``: in bf16, which has 8
    bits (docs/parallelism.md, "Less memory")."""
    use_distributed_optimizer: bool = True
    """Each data-parallel rank holds and updates its part of the optimizer's state alone (ZeRO stage 1)."""
    use_precision_aware_optimizer: bool = False
    """Adam keeps master weights itself and reads gradients as they were reduced, with no fp32 copy of them; what the next
    two fields need."""
    exp_avg_dtype: Literal["fp32", "bf16"] = "fp32"
    """What Adam's running mean of gradients is kept in; it is computed with in fp32."""
    exp_avg_sq_dtype: Literal["fp32", "bf16"] = "fp32"
    """What Adam's running mean of squared gradients is kept in; it is computed with in fp32."""
    optimizer_cpu_offload: bool = False
    """Adam's state lies in main memory, and the CPU makes the updates (needs a CUDA device)."""
    optimizer_offload_fraction: float = number(1.0, above=0, at_most=1)
    """Share of the optimizer's state that is offloaded, in whole parameters."""
    overlap_cpu_optimizer_d2h_h2d: bool = False
    """Copies of gradients and weights of an offloaded optimizer overlap with its updates."""
