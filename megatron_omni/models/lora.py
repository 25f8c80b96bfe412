"""Low-rank adapters (LoRA, Hu et al. 2021) on attention and routed experts: ``model.lora``. Nothing else is trained then.

    y = x W + (alpha / r) drop(x) A B        A [in, r] uniform in +-1 / sqrt(in), B [r, out] zero: a fresh adapter changes nothing

One pair for each weight as it is stored: queries, keys and values share an A, so do gate and up of an expert; the router has
none. ``merge_lora`` adds (alpha / r) A B to the weights and removes the adapters; checkpoint/merged.py does so for a
checkpoint that is exported.

Attention under tensor parallelism (with sequence parallelism, as everywhere here): beside the column-parallel qkv, A is
whole and works on the rank's part of the sequence, the narrow result is gathered and B is a slice; beside the row-parallel
output projection, A is a slice, partial sums are reduced and scattered over the sequence, B is whole. Experts: a pair
for each expert, on the rank that has it.

Dropout is drawn by counter (ops/counter_rng.py) from the micro-batch's first token and the row, so that a recomputed layer and
a resumed run repeat it; rows change places between layouts, and with them their masks.

S sequence, B batch, H hidden, A rows, E local experts, F expert width, r rank.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from megatron_omni.config.model import LoraConfig, ModelConfig
from megatron_omni.models.init import partition
from megatron_omni.models.moe.context import current_token_context
from megatron_omni.models.moe.experts import RoutedExperts
from megatron_omni.models.moe.kernels import swiglu, torch_grouped_gemm
from megatron_omni.ops.counter_rng import Purpose, uniform
from megatron_omni.ops.grouped_gemm import grouped_gemm
from megatron_omni.platform.seeds import named_generator

ATTENTION_LINEARS = ("linear_qkv", "linear_proj")
ADAPTER_PREFIX = "lora_"
"""Of the modules beside what they adapt; models/parts.py knows adapters by it."""


class AttentionAdapter(nn.Module):
    """Adapter of a column-parallel (``row`` False) or row-parallel linear layer: ``a`` [r, in], ``b`` [out, r]."""

    def __init__(
        self, linear: nn.Module, lora: LoraConfig, *, row: bool, layer: int, name: str, seed: int, tp_group: Any
    ) -> None:
        super().__init__()
        self.lora, self.row, self.layer, self.tp_group = lora, row, layer, tp_group
        weight: Any = linear.weight
        size, rank = tp_group.size(), tp_group.rank()
        size_out, size_in = weight.shape
        full = _draw(lora.rank, size_in * (size if row else 1), seed, name)
        self.a = nn.Parameter((partition(full, 1, parts=size, index=rank, stride=1) if row else full).to(weight))
        self.b = nn.Parameter(weight.new_zeros(size_out, lora.rank))
        cut, whole = (self.a, self.b) if row else (self.b, self.a)
        set_tensor_model_parallel_attributes(cut, is_parallel=True, dim=1 if row else 0, stride=1)
        # Works on this rank's part of the sequence: marked gradients are summed (parallel/gradients.py).
        whole.sequence_parallel = size > 1  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """What is added to the linear layer's output for its input x [.., in]."""
        narrow = F.linear(_dropped(x, self.lora, layer=self.layer, row=int(self.row)), self.a)
        if self.tp_group.size() > 1:
            exchange = reduce_scatter_to_sequence_parallel_region if self.row else gather_from_sequence_parallel_region
            narrow = exchange(narrow, group=self.tp_group)
        return F.linear(narrow, self.b) * self.lora.scale

    @torch.no_grad()
    def merge_into(self, linear: nn.Module) -> None:
        """Add the product to this rank's share of the weight."""
        weight: Any = linear.weight
        weight.add_((self.b.float() @ self.a.float() * self.lora.scale).to(weight))

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """``{prefix}a`` [r, in] and ``{prefix}b`` [out, r], loadable under any TP and PP size."""
        assert metadata is not None, "adapters are saved with their process groups"
        return make_sharded_tensors_for_checkpoint(
            {"a": self.a, "b": self.b},
            prefix,
            {"a": 1} if self.row else {"b": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )


class ExpertAdapters(nn.Module):
    """Adapters of this rank's experts: ``a1`` [E, H, r], ``b1`` [E, r, 2 F], ``a2`` [E, F, r], ``b2`` [E, r, H]."""

    a1: nn.Parameter
    b1: nn.Parameter
    a2: nn.Parameter
    b2: nn.Parameter

    def __init__(
        self, experts: RoutedExperts, lora: LoraConfig, *, layer: int, name: str, seed: int, kernels: str
    ) -> None:
        super().__init__()
        self.lora, self.layer = lora, layer
        self.product = grouped_gemm if kernels == "omni" else torch_grouped_gemm
        self._place = experts.ep_rank, experts.ep_size, experts.expt_dp_rank
        for number, weight in (("1", experts.weight1), ("2", experts.weight2)):
            size_in, size_out = weight.shape[1:]
            drawn = [
                _draw(lora.rank, size_in, seed, f"{name}.a{number}", experts.global_expert_offset + i).t()
                for i in range(len(weight))
            ]
            self.register_parameter(f"a{number}", nn.Parameter(torch.stack(drawn).to(weight).contiguous()))
            self.register_parameter(f"b{number}", nn.Parameter(weight.new_zeros(len(weight), lora.rank, size_out)))
        for parameter in self.parameters():
            # As the experts' own weights (moe/experts.py).
            parameter.allreduce = False  # type: ignore[attr-defined]
            parameter.global_expert_offset = experts.global_expert_offset  # type: ignore[attr-defined]

    def forward(self, rows: Tensor, w1: Tensor, w2: Tensor, offsets: Tensor) -> Tensor:
        """The experts with their adapters: outputs [A, H] of rows [A, H] grouped by ``offsets`` [E + 1]."""
        hidden = self.product(rows, w1, offsets) + self._added(rows, self.a1, self.b1, offsets, row=2)
        hidden = swiglu(hidden).contiguous()
        return self.product(hidden, w2, offsets) + self._added(hidden, self.a2, self.b2, offsets, row=3)

    def _added(self, x: Tensor, a: Tensor, b: Tensor, offsets: Tensor, *, row: int) -> Tensor:
        x = _dropped(x, self.lora, layer=self.layer, row=row)
        narrow = self.product(x, a.to(x.dtype), offsets)
        return self.product(narrow, b.to(x.dtype), offsets) * self.lora.scale

    @torch.no_grad()
    def merge_into(self, experts: RoutedExperts) -> None:
        """Add the products to the experts' weights."""
        for weight, a, b in ((experts.weight1, self.a1, self.b1), (experts.weight2, self.a2, self.b2)):
            weight.add_((a.float() @ b.float() * self.lora.scale).to(weight))

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Entries with a leading axis of all experts, loadable under any EP and PP size."""
        from megatron.core.dist_checkpointing.mapping import ShardedTensor

        ep_rank, ep_size, replica = self._place
        axis = len(sharded_offsets)
        return {
            f"{prefix}{name}": ShardedTensor.from_rank_offsets(
                f"{prefix}{name}",
                parameter,
                *sharded_offsets,
                (axis, ep_rank, ep_size),
                replica_id=(0, 0, replica),
                prepend_axis_num=axis,
            )
            for name, parameter in self.named_parameters()
        }


def add_lora(language: nn.Module, model: ModelConfig, *, seed: int, pg: ProcessGroupCollection) -> None:
    """Put fresh adapters beside what ``model.lora`` targets in this rank's part of the language model."""
    lora = model.lora
    assert lora is not None
    for layer, number in _layers(language):
        if "attention" in lora.targets and isinstance(layer.self_attention, SelfAttention):
            for linear_name in ATTENTION_LINEARS:
                linear = getattr(layer.self_attention, linear_name)
                adapter = AttentionAdapter(
                    linear,
                    lora,
                    row=linear_name == "linear_proj",
                    layer=number,
                    name=f"layers.{number}.{linear_name}",
                    seed=seed,
                    tp_group=pg.tp,
                )
                layer.self_attention.add_module(ADAPTER_PREFIX + linear_name, adapter)
                adapter.hook = linear.register_forward_hook(_adding(adapter))  # type: ignore[assignment]
        experts = getattr(layer.mlp, "experts", None)
        if "experts" in lora.targets and isinstance(experts, RoutedExperts):
            assert model.moe is not None and experts.etp_size == 1, "refused by config/validate.py"
            experts.lora_experts = ExpertAdapters(
                experts, lora, layer=number, name=f"layers.{number}.experts", seed=seed, kernels=model.moe.kernels
            )


def merge_lora(language: nn.Module) -> None:
    """Add every adapter to the weight that it stands beside, and remove it."""
    for layer, _ in _layers(language):
        for linear_name in ATTENTION_LINEARS:
            adapter = getattr(layer.self_attention, ADAPTER_PREFIX + linear_name, None)
            if adapter is not None:
                adapter.merge_into(getattr(layer.self_attention, linear_name))
                adapter.hook.remove()
                delattr(layer.self_attention, ADAPTER_PREFIX + linear_name)
        experts = getattr(layer.mlp, "experts", None)
        if isinstance(experts, RoutedExperts) and experts.lora_experts is not None:
            experts.lora_experts.merge_into(experts)
            experts.lora_experts = None


def _layers(language: Any) -> Iterator[tuple[Any, int]]:
    """Layers of this stage with their number in the whole model."""
    for layer in language.decoder.layers:
        yield layer, layer.layer_number


def _adding(adapter: AttentionAdapter) -> Any:
    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        return output[0] + adapter(inputs[0]), *output[1:]

    return hook


def _draw(rank: int, size_in: int, seed: int, *name: str | int) -> Tensor:
    """A [r, in] of the whole layer, by name: the same on every layout."""
    bound = size_in**-0.5
    return torch.empty(rank, size_in).uniform_(-bound, bound, generator=named_generator(seed, "lora", *name))


def _dropped(x: Tensor, lora: LoraConfig, *, layer: int, row: int) -> Tensor:
    """``x`` with a share of its elements zero and the rest scaled up, in training; ``row`` tells a layer's adapters apart."""
    if lora.dropout == 0.0 or not (ctx := current_token_context()).stochastic:
        return x
    index = torch.arange(x.numel() // x.shape[-1], device=x.device)
    # Whose micro-batch, and which part of its sequence, is the identity of the first token.
    draws = uniform(
        ctx.sample_ids[:1].expand_as(index),
        index + ctx.sample_positions[:1] * index.numel(),
        num_draws=x.shape[-1],
        seed=ctx.seed,
        step=ctx.step,
        layer=4 * layer + row,
        purpose=Purpose.ADAPTER_DROPOUT,
    )
    return x * (draws.view(x.shape) >= lora.dropout).to(x.dtype) / (1.0 - lora.dropout)
