"""Parameters, FLOPs, bytes and step time of a recipe, from its sizes alone: no torch, no process group.

Read in this order: ``parameters`` (every weight of a rank), ``flops``, ``memory`` (weights, gradients, optimizer state),
``activations`` (what a micro-batch keeps).
"""

from megatron_omni.estimate.flops import encoder_flops, flops_per_token, media_flops
from megatron_omni.estimate.memory import weight_bytes_per_rank
from megatron_omni.estimate.parameters import ParameterCount, count_parameters, padded_vocab_size

__all__ = [
    "ParameterCount",
    "count_parameters",
    "encoder_flops",
    "flops_per_token",
    "media_flops",
    "padded_vocab_size",
    "weight_bytes_per_rank",
]
