"""Optimizer and learning-rate schedule. Names are Megatron-Core's."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(kw_only=True)
class OptimConfig:
    """AdamW with a Megatron learning-rate schedule."""

    lr: float = 1e-5
    min_lr: float = 0.0
    lr_decay_style: Literal["constant", "linear", "cosine", "WSD"] = "cosine"
    """WSD: constant after the warm-up, then a linear decay over the last ``lr_wsd_decay_iters`` steps."""
    lr_warmup_iters: int = 0
    lr_decay_iters: int | None = None
    """None: ``train_iters``."""
    lr_wsd_decay_iters: int | None = None
    """Steps of the decay at the end of a WSD schedule."""
    lr_scale: dict[str, float] = field(default_factory=dict)
    """Factor on the learning rate per named part (``vision: 0.1``); the part names of ``freeze``."""
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    clip_grad: float = 1.0
    precision: Literal["fp32", "bf16"] = "bf16"
    """bf16 keeps fp32 master weights and fp32 gradient accumulation."""
    use_distributed_optimizer: bool = True
