"""The layers of the trunk over a cache, without gradients: the same modules and weights, fewer steps.

Megatron's layer and attention modules keep what a backward, recomputation, offloading and their own inference engines
need; for a few tokens that is more time than the arithmetic. What is left of them here, for hidden states [T, 1, H] of
one row of tokens:

    attention   x + proj(cache.attend(rotated q, rotated k, v)),   (q | k | v) of each group = qkv(norm(x))
    dense FFN   x + fc2(silu(gate) up),                            (gate | up) = fc1(norm(x))
    mixture     x + moe(norm(x))

Modules that do more than multiply (tensor parallelism, adapters, Transformer Engine's) are called as they are.
Cached logits are compared with those of Megatron's layers in tests/parity and tests/distributed/test_generation.py.
"""

from collections.abc import Iterable
from typing import Any

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP
from torch import Tensor

from megatron_omni.models.attention import Cache
from megatron_omni.models.moe.context import TokenContext, token_context
from megatron_omni.models.moe.kernels import swiglu
from megatron_omni.models.rope import rotated
from megatron_omni.ops.linear import linear


def cached_layers(layers: Iterable[tuple[bool, Any]], hidden: Tensor, cache: Cache, ctx: TokenContext | None) -> Tensor:
    """Hidden states [T / TP, 1, H] after ``layers``, each with whether it is attention."""
    with token_context(ctx):
        for is_attention, layer in layers:
            if is_attention:
                hidden = hidden + _attention(layer.self_attention, layer.input_layernorm(hidden), cache)
            else:
                hidden = hidden + _feed_forward(layer.mlp, layer.pre_mlp_layernorm(hidden))
    return hidden


def _attention(attention: Any, x: Tensor, cache: Cache) -> Tensor:
    groups, width = attention.num_query_groups_per_partition, attention.hidden_size_per_attention_head
    mixed = product(attention.linear_qkv, x).unflatten(-1, (groups, -1, width)).squeeze(1)  # [T, groups, n + 2, D]
    assert cache.rotation is not None
    turned = rotated(mixed[:, :, :-1], *cache.rotation)  # queries and keys in one go
    core = attention.core_attention
    output = cache.attend(core.layer_number, turned[:, :, :-1], turned[:, :, -1], mixed[:, :, -1], core.softmax_scale)
    return product(attention.linear_proj, output.flatten(1).unsqueeze(1))


def _feed_forward(mlp: Any, x: Tensor) -> Tensor:
    if type(mlp) is not MLP:
        return mlp(x)[0]
    return product(mlp.linear_fc2, swiglu(product(mlp.linear_fc1, x)))


def product(module: Any, x: Tensor, weight: Tensor | None = None) -> Tensor:
    """What a linear ``module`` makes of ``x``, its bias added; ``weight`` in place of its own (a tied vocabulary)."""
    if type(module) in (ColumnParallelLinear, RowParallelLinear) and module.tp_group.size() == 1:
        return linear(x, module.weight if weight is None else weight, module.bias)
    output, bias = module(x) if weight is None else module(x, weight=weight)
    return output if bias is None else output + bias
