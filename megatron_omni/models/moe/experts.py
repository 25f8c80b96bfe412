"""The experts: SwiGLU MLPs y = (silu(x Wg) * (x Wu)) Wd, routed ones by ``model.moe.kernels`` (kernels.py), shared ones
as one dense pair.

Routed: ``weight1`` [E_local, H, 2 F / etp] holds (gate | up) side by side, ``weight2`` [E_local, F / etp, H]; this
rank owns experts ``global_expert_offset`` .. + E_local and, under expert tensor parallelism (etp), the same slice of
Wg, Wu and Wd's rows of each, so its output is a partial sum that the dispatcher adds up. Weights multiply rows on
their return, not here.

Shared: every token uses all of them, weighted per token: y = sum_s w_s FFN_s(x) = ((silu(x Wg) * (x Wu)) * w) Wd with
the experts concatenated along the width, one matrix product up and one down. Replicated over tensor parallelism and
applied to the rank's own sequence shard (docs/decisions/0002-own-dispatcher.md).

A rows, T tokens, H hidden, F expert width, E_s shared experts.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_omni.models.attention import current_cache
from megatron_omni.models.moe.kernels import swiglu
from megatron_omni.ops.linear import product


class RoutedExperts(torch.nn.Module):
    """This rank's share of the routed experts."""

    def __init__(
        self,
        *,
        num_experts: int,
        hidden_size: int,
        ffn_hidden_size: int,
        ep_group: dist.ProcessGroup,
        expt_tp_group: dist.ProcessGroup,
        expt_dp_group: dist.ProcessGroup | None = None,
        expert_mlp: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        self.expert_mlp = expert_mlp
        self.ep_size, self.ep_rank = ep_group.size(), ep_group.rank()
        self.etp_size, self.etp_rank = expt_tp_group.size(), expt_tp_group.rank()
        self.expt_dp_rank = expt_dp_group.rank() if expt_dp_group is not None else 0
        if num_experts % self.ep_size:
            raise ValueError(
                f"moe.num_routed_experts = {num_experts} does not divide over parallel.expert_model_parallel_size = "
                f"{self.ep_size}; choose a divisor"
            )
        if ffn_hidden_size % self.etp_size:
            raise ValueError(
                f"moe.moe_ffn_hidden_size = {ffn_hidden_size} does not divide over "
                f"parallel.expert_tensor_parallel_size = {self.etp_size}; choose a divisor"
            )
        self.lora_experts: Any = None
        """Low-rank adapters (models/lora.py)."""
        self.num_experts = num_experts
        self.num_local_experts = num_experts // self.ep_size
        self.global_expert_offset = self.ep_rank * self.num_local_experts
        width = ffn_hidden_size // self.etp_size
        self.weight1 = torch.nn.Parameter(
            torch.empty(self.num_local_experts, hidden_size, 2 * width, dtype=dtype, device=device)
        )
        self.weight2 = torch.nn.Parameter(
            torch.empty(self.num_local_experts, width, hidden_size, dtype=dtype, device=device)
        )
        for weight in (self.weight1, self.weight2):
            torch.nn.init.normal_(weight, std=init_std)
            # Reduced over the expert data-parallel group and kept in the expert optimizer, at every EP size (EP = 1
            # too): otherwise an optimizer checkpoint could not move between EP = 1 and EP > 1.
            weight.allreduce = False  # type: ignore[attr-defined]
            weight.global_expert_offset = self.global_expert_offset  # type: ignore[attr-defined]
            # Slices under expert tensor parallelism: every rank's share counts in the gradient norm, copies count once.
            weight.tensor_model_parallel = self.etp_size > 1  # type: ignore[attr-defined]

    def forward(self, rows: Tensor, offsets: Tensor) -> Tensor:
        """Outputs [A, H] of rows [A, H] grouped by local expert with ``offsets`` [E_local + 1]; partial under etp."""
        w1, w2 = self.weight1.to(rows.dtype), self.weight2.to(rows.dtype)
        if self.lora_experts is not None:
            return self.lora_experts(rows, w1, w2, offsets)
        return self.expert_mlp(rows, w1, w2, offsets)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Entries with a leading axis of all experts: loadable under any EP, expert-TP and PP size.

        Keys are ``{prefix}experts.linear_fc{1,2}.weight`` of shapes [E, H, 2 F] and [E, F, H]. Gate and up are sharded
        separately, so that a slice over expert TP holds the same columns of both. They are views of the weight: a load
        writes into it, a save copies it once, when it needs to.
        """
        from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

        axis = len(sharded_offsets)
        replica_id = (0, 0, self.expt_dp_rank)
        experts = (axis, self.ep_rank, self.ep_size)

        def shard(key: str, data: Tensor, replica: Any, *offset: tuple[int, int, int]) -> ShardedTensor:
            return ShardedTensor.from_rank_offsets(
                key, data, *sharded_offsets, experts, *offset, replica_id=replica, prepend_axis_num=axis
            )

        def build_fc1(key: str, data: Tensor, replica: Any, flattened_range: Any) -> list[ShardedTensor]:
            assert flattened_range is None, "flattened parameters are not supported"
            halves = torch.chunk(data.detach(), 2, dim=-1)
            return [
                shard(key, half, replica, (axis + 2, self.etp_rank + i * self.etp_size, 2 * self.etp_size))
                for i, half in enumerate(halves)
            ]

        def merge_fc1(halves: list[Tensor]) -> Tensor:
            return torch.cat(list(halves), dim=-1)

        key1, key2 = f"{prefix}experts.linear_fc1.weight", f"{prefix}experts.linear_fc2.weight"
        adapters = {}
        if self.lora_experts is not None:
            adapters = self.lora_experts.sharded_state_dict(f"{prefix}lora_experts.", sharded_offsets)
        return {
            **adapters,
            f"{prefix}weight1": ShardedTensorFactory(key1, self.weight1, build_fc1, merge_fc1, replica_id),
            f"{prefix}weight2": shard(key2, self.weight2, replica_id, (axis + 1, self.etp_rank, self.etp_size)),
        }


class SharedExperts(torch.nn.Module):
    """All shared experts of a layer: ``weight1`` [H, 2 E_s F] = (all gates | all ups), ``weight2`` [E_s F, H]."""

    def __init__(
        self,
        *,
        num_experts: int,
        hidden_size: int,
        ffn_hidden_size: int,
        sequence_parallel: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        width = num_experts * ffn_hidden_size
        self.weight1 = torch.nn.Parameter(torch.empty(hidden_size, 2 * width, dtype=dtype, device=device))
        self.weight2 = torch.nn.Parameter(torch.empty(width, hidden_size, dtype=dtype, device=device))
        for weight in (self.weight1, self.weight2):
            torch.nn.init.normal_(weight, std=init_std)
            # Each TP rank applies them to its own tokens: marked gradients are summed (parallel/gradients.py).
            weight.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """sum_s weights[:, s] FFN_s(x) [T, H] for x [T, H] and weights [T, E_s]."""
        # Without a cache as in training, whoever computes: a forward without gradients has the bits of one with them.
        times = torch.matmul if current_cache() is None else product
        hidden = swiglu(times(x, self.weight1.to(x.dtype))).unflatten(-1, (self.num_experts, -1))
        # The product is taken in the weights' precision (fp32): a bf16 weight would carry 0.4 % error.
        hidden = (hidden * weights.unsqueeze(-1)).to(x.dtype)
        return times(hidden.flatten(1), self.weight2.to(x.dtype))
