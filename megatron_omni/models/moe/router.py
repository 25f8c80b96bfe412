"""The gate and the routing decision: hidden states [T, H] to a ``Routing`` (ops/topp_route.py) and the auxiliary loss.

Gate: z = x W^T, W [E, H] without bias, rows ordered [routed | null | shared] (paper: one z for all of them), in fp32 in
training and evaluation alike unless ``fp32_gate`` is off (the published code evaluates in bf16).

Training (``ctx.stochastic``) alone: the gate's input, and nothing else, times U(1 - j, 1 + j) element by element;
slots drawn by Gumbel order; the gradient estimator; capacity. Every draw is a hash of (seed, step, layer, purpose,
sample, position) (ops/counter_rng.py), so layouts agree and a recomputed layer repeats itself. Otherwise routing is
deterministic.

Replay (``ctx.routes``): the recorded slots in place of those that the logits choose, weighted by the live logits. It is
the op that routes, told to take every slot and to keep the recorded ones; tokens without a record keep those that they
would have taken. Without noise alone: a draw has an order, by which the estimator and ``release`` scale weights.

Under sequence and context parallelism T is this rank's shard; the auxiliary loss and capacity see the whole micro-batch
through the group of the ranks that share it. T tokens, H hidden, E = routed + null + shared, E_d = routed + null.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_omni.config.model import MoEConfig
from megatron_omni.models.moe.balance import load_balancing_loss
from megatron_omni.models.moe.context import TokenContext
from megatron_omni.models.moe.routes import bytes_of, unpacked
from megatron_omni.ops.counter_rng import Purpose, gumbel, uniform
from megatron_omni.ops.topp_route import Routing, RoutingRule, capacity_keep, expert_capacity, topp_route


class RouterOutput(NamedTuple):
    """Result of one routing decision."""

    routing: Routing
    aux_loss: Tensor | None
    """L of the whole micro-batch, unscaled; None where it is not wanted."""
    num_before_drop: Tensor | None
    """Selected slots of this rank before capacity removed some; None without capacity."""


class OmniRouter(torch.nn.Module):
    """Gate weight and routing decision of one layer."""

    def __init__(
        self,
        moe: MoEConfig,
        *,
        hidden_size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        init_std: float = 0.02,
        sequence_parallel: bool = False,
        group: dist.ProcessGroup | None = None,
        topp_route: Callable[..., Routing] = topp_route,
    ) -> None:
        super().__init__()
        self.topp_route = topp_route
        self.moe = moe
        self.layer_number = 0
        self.group = group
        self.rule = RoutingRule(
            num_routed=moe.num_routed_experts,
            num_null=moe.num_null_experts,
            top_p=moe.top_p,
            top_k=moe.top_k,
            max_routed=moe.max_routed,
            mode=moe.routing_weight_mode,
            estimator=moe.gradient_estimator,
            release_eps=moe.router_jitter_eps,
        )
        self.rule_without_noise = replace(self.rule, estimator="none")
        self.num_slots = self.rule.num_slots
        self.rule_of_all = replace(self.rule_without_noise, top_k=self.num_slots, max_routed=None)
        num_rows = self.num_slots + moe.num_shared_experts
        self.weight = torch.nn.Parameter(torch.empty(num_rows, hidden_size, dtype=dtype, device=device))
        torch.nn.init.normal_(self.weight, std=init_std)
        # Each TP rank sees its own tokens under sequence parallelism: marked gradients are summed (parallel/gradients.py).
        self.weight.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]

    def set_layer_number(self, layer_number: int) -> None:
        """Global layer number: part of the key of every random draw."""
        self.layer_number = layer_number

    def gate(self, x: Tensor, *, ctx: TokenContext) -> Tensor:
        """Logits [T, E] in fp32 (float64 for float64 input); jitter touches this copy of x only."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        if self.moe.fp32_gate:
            x = x.to(dtype)
        if ctx.stochastic and self.moe.input_jitter > 0:
            u = self._uniform(ctx, Purpose.INPUT_JITTER, x.shape[1])
            # 1 + j (2u - 1), in place: the draw is a fresh buffer.
            x = x * u.mul_(2 * self.moe.input_jitter).add_(1 - self.moe.input_jitter).to(x.dtype)
        return torch.nn.functional.linear(x, self.weight.to(x.dtype)).to(dtype)

    def _uniform(self, ctx: TokenContext, purpose: Purpose, num_draws: int) -> Tensor:
        return uniform(
            ctx.sample_ids,
            ctx.sample_positions,
            num_draws=num_draws,
            seed=ctx.seed,
            step=ctx.step,
            layer=self.layer_number,
            purpose=purpose,
        )

    def forward(self, x: Tensor, *, ctx: TokenContext, with_aux_loss: bool = True) -> RouterOutput:
        """Route x [T, H]."""
        moe, slots = self.moe, self.num_slots
        z = self.gate(x, ctx=ctx)
        rule = self.rule if ctx.stochastic else self.rule_without_noise
        noise = bernoulli = None
        if ctx.stochastic and moe.sample_experts:
            draws = slots * slots if moe.routing_weight_mode == "release" else slots
            noise = gumbel(self._uniform(ctx, Purpose.GUMBEL, draws)).to(z.dtype)
            noise = noise.view(-1, slots, slots) if moe.routing_weight_mode == "release" else noise
        if rule.estimator != "none":
            bernoulli = self._uniform(ctx, Purpose.BERNOULLI, slots)
        tokens = {"gumbel": noise, "bernoulli": bernoulli, "padding": ctx.padding}
        aux_loss = num_before_drop = keep = None
        if ctx.stochastic and moe.capacity_factor is not None:
            selected = self.topp_route(z.detach(), rule, **tokens).mask
            num_before_drop = selected.sum()
            keep = self._capacity_keep(z.detach()[:, :slots], selected)
        if ctx.routes is None:
            routing = self.topp_route(z, rule, keep=keep, **tokens)
            chosen = routing.mask
        else:
            routing, chosen = self._replayed(z, ctx.routes, ctx)
        if ctx.record is not None:
            ctx.record.layers[self._layer_index] = chosen
        if keep is None:
            selected = routing.mask
        if with_aux_loss:
            # Without stochastic routing it is reported and not learned: a recomputed layer, which reports nothing, must not
            # find tensors saved for it.
            of = z if ctx.stochastic else z.detach()
            aux_loss = load_balancing_loss(of[:, :slots], selected, ctx=ctx, moe=moe, group=self.group)
        return RouterOutput(routing, aux_loss, num_before_drop)

    @property
    def _layer_index(self) -> int:
        """Number of this MoE layer in the model, from 0 (balance.moe_layer_numbers)."""
        return self.layer_number // 2 - 1

    def _replayed(self, z: Tensor, routes: Tensor, ctx: TokenContext) -> tuple[Routing, Tensor]:
        """The slots of ``routes`` [T, L n] weighted by z [T, E], and the mask [T, E_d] of those that z would choose."""
        assert not ctx.stochastic, "recorded routes are replayed without noise"
        if self.moe.routing_weight_mode == "release":
            raise ValueError(
                "model.moe.routing_weight_mode is release: its weights depend on the order in which slots were drawn, which "
                "routes do not hold, so they cannot be replayed; set masked_softmax, or reinforce.routes = live"
            )
        chosen = self.topp_route(z.detach(), self.rule_without_noise, padding=ctx.padding).mask
        width, first = bytes_of(self.num_slots), self._layer_index * bytes_of(self.num_slots)
        given, recorded = unpacked(routes[:, first : first + width], self.num_slots)
        keep = torch.where(recorded.unsqueeze(1), given, chosen)
        return self.topp_route(z, self.rule_of_all, keep=keep, padding=ctx.padding), chosen

    @torch.no_grad()
    def _capacity_keep(self, z: Tensor, mask: Tensor) -> Tensor:
        """Assignments kept under the cap, [T, E_d], decided over the whole micro-batch so that layouts agree."""
        num_local, ranks = z.shape[0], 1
        if self.group is not None:
            ranks = dist.get_world_size(self.group)
        if ranks > 1:
            local = torch.cat([z, mask.to(z.dtype)], dim=1).contiguous()
            gathered = [torch.empty_like(local) for _ in range(ranks)]
            dist.all_gather(gathered, local, group=self.group)
            whole = torch.cat(gathered)
            z, mask = whole[:, : self.num_slots], whole[:, self.num_slots :] > 0
        assert self.moe.capacity_factor is not None
        capacity = expert_capacity(
            z.shape[0],
            self.num_slots,
            capacity_factor=self.moe.capacity_factor,
            min_capacity=self.moe.min_capacity,
        )
        released = self.moe.routing_weight_mode == "release"  # the published code caps the null slot like any other
        num_capped = self.num_slots if released else self.moe.num_routed_experts
        keep = capacity_keep(z, mask, num_capped=num_capped, capacity=capacity)
        if ranks > 1:
            start = dist.get_rank(self.group) * num_local
            keep = keep[start : start + num_local]
        return keep
