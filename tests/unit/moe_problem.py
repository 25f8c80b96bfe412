"""A small MoE layer problem shared by the one-rank and the layout tests: weights, micro-batches, groups of one rank."""

from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_omni.config.model import MoEConfig
from megatron_omni.models.moe.context import RoutingStats, TokenContext
from megatron_omni.models.moe.layer import OmniMoELayer

HIDDEN, WIDTH, SHARED_WIDTH, ROUTED, SHARED = 12, 8, 6, 4, 2
LAYER = 6
AUX_SCALE = 0.05


class Alone:
    """A process group of one rank, without torch.distributed."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


def one_rank() -> Any:
    return SimpleNamespace(
        tp=Alone(), cp=Alone(), tp_cp=Alone(), ep=Alone(), expt_tp=Alone(), expt_dp=Alone(), tp_ep=Alone()
    )


def settings(**changes: Any) -> MoEConfig:
    sizes = {"moe_ffn_hidden_size": WIDTH, "moe_shared_expert_intermediate_size": SHARED_WIDTH}
    return MoEConfig(**(sizes | changes))


def weights(*, null_bias: float = 0.0) -> dict[str, torch.Tensor]:
    """Full weights by name; ``null_bias`` makes hidden dimension 0 (which is 1 for marked tokens) push towards null."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.5

    gate = normal(ROUTED + 1 + SHARED, HIDDEN)
    gate[:, 0] = 0.0
    gate[ROUTED, 0] = null_bias
    return {
        "router.weight": gate,
        "experts.weight1": normal(ROUTED, HIDDEN, 2 * WIDTH),
        "experts.weight2": normal(ROUTED, WIDTH, HIDDEN),
        "shared_experts.weight1": normal(HIDDEN, 2 * SHARED * SHARED_WIDTH),
        "shared_experts.weight2": normal(SHARED * SHARED_WIDTH, HIDDEN),
    }


def local_slice(name: str, full: torch.Tensor, layer: OmniMoELayer) -> torch.Tensor:
    """The part of a full weight that ``layer`` holds: its experts, and its columns of gate and of up."""
    if not name.startswith("experts."):
        return full
    first, count = layer.experts.global_expert_offset, layer.experts.num_local_experts
    size, rank = layer.experts.etp_size, layer.experts.etp_rank
    full = full[first : first + count]
    if name == "experts.weight2":
        return full.chunk(size, dim=1)[rank]
    gate, up = full.chunk(2, dim=2)
    return torch.cat([gate.chunk(size, dim=2)[rank], up.chunk(size, dim=2)[rank]], dim=2)


def build_layer(
    moe: MoEConfig, full: dict[str, torch.Tensor], *, pg: Any = None, dtype: torch.dtype = torch.float32, **config: Any
) -> OmniMoELayer:
    pg = one_rank() if pg is None else pg
    transformer = TransformerConfig(
        num_layers=2,
        hidden_size=HIDDEN,
        num_attention_heads=2,
        num_moe_experts=ROUTED,
        moe_ffn_hidden_size=WIDTH,
        gated_linear_unit=True,
        add_bias_linear=False,
        moe_token_dispatcher_type="alltoall",
        moe_router_load_balancing_type="none",
        tensor_model_parallel_size=pg.tp.size(),
        sequence_parallel=pg.tp.size() > 1,
        expert_model_parallel_size=pg.ep.size(),
        expert_tensor_parallel_size=pg.expt_tp.size(),
        use_cpu_initialization=True,
        **config,
    )
    layer = OmniMoELayer(transformer, pg_collection=pg, moe=moe).to(dtype)
    layer.set_layer_number(LAYER)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(local_slice(name, full[name], layer))
    return layer


def micro_batch(
    index: int, *, sequence: int = 24, batch: int = 2, marked: str = "none", stochastic: bool = True
) -> tuple[torch.Tensor, torch.Tensor, TokenContext]:
    """Hidden states [S, B, H], output gradient [S, B, H] and the token context of the whole micro-batch.

    ``marked``: which tokens carry 1 in hidden dimension 0 (see ``weights``): ``none`` or ``all``.
    """
    generator = torch.Generator().manual_seed(100 + index)
    hidden = torch.randn(sequence, batch, HIDDEN, generator=generator)
    gradient = torch.randn(sequence, batch, HIDDEN, generator=generator)
    hidden[..., 0] = 1.0 if marked == "all" else 0.0
    position = torch.arange(sequence).unsqueeze(1).expand(sequence, batch).flatten()
    row = torch.arange(batch).expand(sequence, batch).flatten()
    padding = (position >= sequence - 3) & (row == batch - 1)
    context = TokenContext(
        sample_ids=torch.where(padding, -1, index * batch + row),
        sample_positions=position,
        modality=position % 4,
        has_label=(position % 3 == 0) & ~padding,
        padding=padding,
        seed=5,
        step=9,
        stochastic=stochastic,
        aux_loss_scale=AUX_SCALE,
        stats=RoutingStats(),
    )
    return hidden, gradient, context
