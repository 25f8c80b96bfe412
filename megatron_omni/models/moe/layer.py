"""The MoE layer: y = sum over selected real experts w_e FFN_e(x) + sum over shared experts w_s FFN_s(x).

A Megatron ``MoELayer`` by type, because ``TransformerLayer`` asks for one, but not by construction: router,
dispatchers and experts are ours (Megatron's assume a fixed number of experts per token, one dense shared expert and
no null slots). What it would inherit of ``MoELayer`` works on those of Megatron, and is refused (``_MEGATRONS_OWN``).
Megatron's layer signature carries no token facts, so routing reads them from ``current_token_context()``; its
``padding_mask`` argument is not used, the context has its own.

Shapes: hidden states [S / TP, B, H], flattened to [T, H].
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import BaseMoELayer, MoELayer
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_omni.config.model import MoEConfig
from megatron_omni.models.moe.balance import attach_loss, record_routing
from megatron_omni.models.moe.context import TokenContext, current_token_context
from megatron_omni.models.moe.dispatcher import AllGatherDispatcher, AllToAllDispatcher, Dispatcher
from megatron_omni.models.moe.experts import RoutedExperts, SharedExperts
from megatron_omni.models.moe.kernels import load_kernels
from megatron_omni.models.moe.router import OmniRouter
from megatron_omni.ops.gradient_estimator import row_gradient_factor
from megatron_omni.ops.topp_route import Routing
from megatron_omni.platform.device import device

_MEGATRONS_OWN = (
    "route", "preprocess", "dispatch", "routed_experts_compute", "shared_experts_compute", "combine", "postprocess",
    "router_and_preprocess", "backward_dw", "setup_delayed_wgrad_for_dispatch_backward_overlap",
    "set_for_recompute_pre_mlp_layernorm", "_setup_inference_mode",
)  # fmt: skip
"""Methods of ``MoELayer`` that are steps of its forward, or settings of parts that are not here."""


class OmniMoELayer(MoELayer):
    """Dynamic-capacity MoE layer, built by a Megatron layer spec through ``functools.partial(OmniMoELayer,
    moe=...)``."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: Any = None,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
        name: str | None = None,
        *,
        moe: MoEConfig,
    ) -> None:
        assert pg_collection is not None, "OmniMoELayer takes its process groups as pg_collection"
        assert submodules is None, "OmniMoELayer builds its own router and experts"
        assert config.num_moe_experts == moe.num_routed_experts, (
            f"TransformerConfig.num_moe_experts = {config.num_moe_experts} must be {moe.num_routed_experts}"
        )
        if config.recompute_granularity == "selective" and "moe" in (config.recompute_modules or ()):
            raise ValueError(
                "model.megatron.recompute_modules = [moe]: the stack replays MoE layers; set parallel.recompute = moe"
            )
        # Past MoELayer.__init__, which would build Megatron's router, dispatcher and experts.
        BaseMoELayer.__init__(
            self, config=config, layer_number=layer_number, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer
        )
        self.moe = moe
        self.tp_group = pg_collection.tp
        self.fwd_execution_map = ["route", "expert_compute", "postprocess"]  # read by Megatron's layer
        kind: dict[str, Any] = {"dtype": config.params_dtype, "device": device()}
        if config.use_cpu_initialization:
            kind["device"] = "cpu"
        kernels = load_kernels(moe.kernels)
        self.router = OmniRouter(
            moe,
            hidden_size=config.hidden_size,
            init_std=config.init_method_std,
            sequence_parallel=config.sequence_parallel,
            # Ranks with other tokens of the same micro-batch.
            group=pg_collection.tp_cp if config.sequence_parallel or pg_collection.cp.size() > 1 else None,
            topp_route=kernels.topp_route,
            **kind,
        )
        self.experts = RoutedExperts(
            num_experts=moe.num_routed_experts,
            hidden_size=config.hidden_size,
            ffn_hidden_size=moe.moe_ffn_hidden_size,
            ep_group=pg_collection.ep,
            expt_tp_group=pg_collection.expt_tp,
            expt_dp_group=pg_collection.expt_dp,
            expert_mlp=kernels.expert_mlp,
            init_std=config.init_method_std,
            **kind,
        )
        self.shared_experts = None
        if moe.num_shared_experts:
            self.shared_experts = SharedExperts(
                num_experts=moe.num_shared_experts,
                hidden_size=config.hidden_size,
                ffn_hidden_size=moe.moe_shared_expert_intermediate_size,
                sequence_parallel=config.sequence_parallel,
                init_std=config.init_method_std,
                **kind,
            )
        self.token_dispatcher: Dispatcher
        if moe.moe_token_dispatcher_type == "alltoall":
            self.token_dispatcher = AllToAllDispatcher(
                num_experts=moe.num_routed_experts,
                ep_group=pg_collection.ep,
                expt_tp_group=pg_collection.expt_tp,
                kernels=kernels,
            )
        else:
            self.token_dispatcher = AllGatherDispatcher(
                num_experts=moe.num_routed_experts,
                ep_group=pg_collection.ep,
                tp_ep_group=pg_collection.tp_ep,
                kernels=kernels,
            )
        if layer_number is not None:
            self.router.set_layer_number(layer_number)

    def forward(
        self,
        hidden_states: Tensor,
        intermediate_tensors: Any = None,
        padding_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """Output of the layer and no bias."""
        assert intermediate_tensors is None, "partial CUDA graphs of MoE layers are not supported"
        if self.tp_group.size() > 1 and not self.config.sequence_parallel and torch.is_grad_enabled():
            raise ValueError(
                "sequence_parallel = false with tensor_model_parallel_size > 1: MoE layers train only with sequence "
                "parallelism, because every tensor-parallel rank routes its own tokens; set sequence_parallel = true"
            )
        return self._compute(hidden_states, current_token_context()), None

    def _compute(self, hidden_states: Tensor, ctx: TokenContext) -> Tensor:
        x = hidden_states.flatten(0, -2)
        assert ctx.padding.shape[0] == x.shape[0], (
            f"token context of {ctx.padding.shape[0]} tokens for {x.shape[0]} hidden states: slice it to the shard"
        )
        # Nobody reads what padding holds, and it may be inf or NaN: 0 x NaN in a product of gradients would reach the
        # weights of the gate and of the shared experts.
        x = x.masked_fill(ctx.padding.unsqueeze(1), 0)
        trains = torch.is_grad_enabled() and ctx.stochastic
        routed = self.router(x, ctx=ctx, with_aux_loss=trains or ctx.stats is not None)
        routing, num_routed = routed.routing, self.moe.num_routed_experts
        if ctx.fixed_shapes:
            return self._every_expert(x, routing).to(hidden_states.dtype).view(hidden_states.shape)
        # The host waits for the numbers of rows. Meanwhile the device has the shared experts to compute.
        dispatch = self.token_dispatcher.begin(routing.mask[:, :num_routed])
        shared = None if self.shared_experts is None else self.shared_experts(x, routing.shared_weights)
        factor = row_gradient_factor(routing.scale, estimator=self.moe.gradient_estimator) if ctx.stochastic else None
        y = dispatch(
            x,
            routing.weights[:, :num_routed],
            self.experts,
            gradient_factor=None if factor is None else factor[:, :num_routed],
        )
        if shared is not None:
            y = y + shared
        y = y.to(hidden_states.dtype).view(hidden_states.shape)
        if trains and ctx.aux_loss_scale:
            y = attach_loss(y, routed.aux_loss * ctx.aux_loss_scale)
        if ctx.stats is not None:
            assert self.layer_number is not None
            record_routing(
                ctx.stats,
                routing,
                layer=self.layer_number,
                ctx=ctx,
                num_routed=num_routed,
                num_before_drop=routed.num_before_drop,
                aux_loss=routed.aux_loss,
            )
        return y

    def _every_expert(self, x: Tensor, routing: Routing) -> Tensor:
        """y [T, H] in at least fp32 from ``x`` [T, H]: every expert computes every token, and what was not chosen is left
        out of the sum. With a few tokens nearly all experts have one anyway, and reading their weights is what takes time."""
        assert not torch.is_grad_enabled() and self.experts.ep_size * self.experts.etp_size == 1
        num_routed, num_tokens = self.moe.num_routed_experts, len(x)
        offsets = torch.arange(num_routed + 1, device=x.device) * num_tokens
        rows = self.experts(x.repeat(num_routed, 1), offsets).view(num_routed, num_tokens, -1)
        mask, weights = (t[:, :num_routed].t().unsqueeze(2) for t in (routing.mask, routing.weights))
        # Not by a weight of zero: an expert may give inf for a token that is not its own.
        y = (rows * weights).masked_fill_(~mask, 0).sum(0)
        return y if self.shared_experts is None else y + self.shared_experts(x, routing.shared_weights)

    def set_layer_number(self, layer_number: int) -> None:
        """Global layer number, called by Megatron's layer after construction."""
        self.layer_number = layer_number
        self.router.set_layer_number(layer_number)


def _refused(name: str) -> Callable[..., None]:
    def method(self: OmniMoELayer, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            f"MoELayer.{name} was called: it works on Megatron's own router, dispatcher and experts, which this layer has "
            "not; take out the entry of model.megatron that asks for it"
        )

    return method


for _name in _MEGATRONS_OWN:
    setattr(OmniMoELayer, _name, _refused(_name))
