"""Routes as bytes: which dynamic slots each token took in each MoE layer, recorded by one forward, replayed by another.

    bit e            slot e was selected, routed experts first, then null (which is in the softmax, so it is kept)
    the last bit     nothing is recorded: the token is routed by its logits, as without a record

ceil((E_d + 1) / 8) bytes for a token and layer, one for up to seven slots; the MoE layers of the whole model follow each
other, so 28 layers take 28 bytes a token. How many slots a token took need not be the same for any two.

A replaying router takes the recorded slots and weighs them by its own logits (router.py): the gate and its inputs get
their gradients. A record in the making tells what the logits chose, also where a record is replayed: the two differ where
routes have flipped.

T tokens of this rank's shard, E_d dynamic slots, L MoE layers, n bytes for a token and layer.
"""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_omni.batch import NO_RECORD, OmniBatch
from megatron_omni.config.model import ModelConfig, MoEConfig
from megatron_omni.models.context_parallel import gathered, in_order


def bytes_of(num_slots: int) -> int:
    """n: bytes for a token and layer."""
    return -(-(num_slots + 1) // 8)


def packed(mask: Tensor) -> Tensor:
    """[.., n] uint8 of the selected slots [.., E_d] bool."""
    num_bytes = bytes_of(mask.shape[-1])
    bits = torch.nn.functional.pad(mask, (0, 8 * num_bytes - mask.shape[-1])).unflatten(-1, (num_bytes, 8))
    shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (bits.view(torch.uint8) << shifts).sum(-1, dtype=torch.uint8)


def unpacked(routes: Tensor, num_slots: int) -> tuple[Tensor, Tensor]:
    """Of [.., n] uint8 the slots [.., E_d] bool and where there is a record, [..] bool."""
    slots = torch.arange(num_slots, device=routes.device)
    bits = routes[..., slots // 8] if routes.shape[-1] > 1 else routes
    return (bits >> (slots % 8).to(torch.uint8)) & 1 > 0, routes[..., -1] < NO_RECORD


@dataclass(kw_only=True)
class RouteRecord:
    """What the routers of this rank chose in one forward; each adds its layer's."""

    layers: dict[int, Tensor] = field(default_factory=dict)
    """Number of the MoE layer in the model, from 0 -> [T, E_d] bool of this rank's sequence shard."""
    cut: bool = False
    """Whether the forward was one of this rank's tokens alone (context parallelism); the model says so."""

    def whole(self, model: ModelConfig, pg: ProcessGroupCollection) -> Tensor:
        """[T, L n] uint8 of the whole sequence and all stages, in the order of hidden states, on every rank of the replica.

        All ranks of a replica call this together, in no other order than their other messages.
        """
        assert model.moe is not None and self.layers, "no MoE layer has run"
        routes = self._of_model(packed(torch.stack([*self.layers.values()], dim=1)), model, pg).flatten(1)
        return in_order(gathered(routes, pg.cp), pg.cp.size()) if self.cut else routes

    def _of_model(self, own: Tensor, model: ModelConfig, pg: ProcessGroupCollection) -> Tensor:
        """[T, L, n] of all stages and tensor-parallel ranks from what ``own`` [T / TP, .., n] layers chose."""
        if pg.mp.size() == 1:
            return own
        num_tokens, first = len(own), pg.tp.rank() * len(own)
        routes = own.new_zeros(num_tokens * pg.tp.size(), model.num_layers, own.shape[2])
        layers = torch.tensor([*self.layers], device=own.device)
        routes[first : first + num_tokens].index_copy_(1, layers, own)
        dist.all_reduce(routes, group=pg.mp)  # exact: one rank has a byte, the others zeros
        return routes

    def grid(self, batch: OmniBatch, model: ModelConfig, pg: ProcessGroupCollection) -> Tensor:
        """:meth:`whole` as ``OmniBatch.routes`` of the ``batch`` that was computed, [B, S, L n]."""
        rows, length = batch.input_ids.shape
        return self.whole(model, pg).view(length, rows, -1).transpose(0, 1).contiguous()


def width_of(model: ModelConfig) -> int:
    """L n: bytes of a token."""
    return 0 if model.moe is None else model.num_layers * bytes_of(num_slots(model.moe))


def num_slots(moe: MoEConfig) -> int:
    """E_d."""
    return moe.num_routed_experts + moe.num_null_experts


def flipped(one: Tensor, other: Tensor, *, num_slots: int) -> Tensor:
    """[..] int64: in how many layers two records [.., L n] chose other slots; layers without a record in either do not
    count."""
    layers = (*one.shape[:-1], -1, bytes_of(num_slots))
    first, second = one.view(layers), other.view(layers)
    (mine, has), (theirs, had) = unpacked(first, num_slots), unpacked(second, num_slots)
    return ((mine != theirs).any(-1) & has & had).sum(-1)
