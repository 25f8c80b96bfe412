"""The distributed optimizer's state on every rank, in one pass and in memory that is kept: what a save copies.

Megatron gathers the state for a ``fully_reshardable`` checkpoint into tensors that it allocates, fills with zeros, joins
and copies anew for every save: about six passes over twelve bytes a parameter, all of which training waits for. Here each
rank copies its shard once, the ranks exchange shards straight into the result, and the result's memory is used again
by the next save. The tensors belong to the checkpoint alone, so they can be written while training goes on.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, MegatronOptimizer
from torch import Tensor


class GatheredState:
    """Memory for the gathered state of one optimizer, on this rank: twelve bytes for each of its model's parameters, and
    as much as is copied into it.
    """

    def __init__(self) -> None:
        self._memory: dict[tuple[Any, ...], Tensor] = {}
        self.is_known = False
        """Whether the ranks have compared what each of them saves."""

    @contextmanager
    def used_by(self, optimizer: MegatronOptimizer) -> Iterator[None]:
        """Inside the block, the distributed members of ``optimizer`` gather their state into this memory."""
        members = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
        distributed = [member for member in members if isinstance(member, DistributedOptimizer)]
        for number, member in enumerate(distributed):
            member.get_parameter_state_dp_zero = self._gatherer(member, number)  # type: ignore[method-assign]
        try:
            yield
        finally:
            for member in distributed:
                del member.get_parameter_state_dp_zero

    def copy(self, tensor: Tensor, *, key: tuple[Any, ...]) -> Tensor:
        """A copy of ``tensor`` on the CPU, in memory that the next copy of the same ``key`` uses again.

        Fresh memory costs more than the copy: the system has to map and clear every page of it.
        """
        # Flat in its own storage: Megatron's writer would copy a slice of a larger one again.
        copied = self._take(("copy", *key, tensor.shape), tensor.numel(), torch.device("cpu"), tensor.dtype)
        return copied.view(tensor.shape).copy_(tensor)

    def storages(self) -> set[int]:
        """Addresses of the memory."""
        return {tensor.untyped_storage().data_ptr() for tensor in self._memory.values()}

    def _gatherer(self, member: DistributedOptimizer, number: int) -> Callable[..., dict[Any, Any]]:
        def gather(use_gloo_comm: bool, empty_data: bool, return_on_all_ranks: bool) -> dict[Any, Any]:
            """Megatron's ``get_parameter_state_dp_zero``: {buffer: {dtype: {state name: [parameters of the buffer]}}}."""
            assert not use_gloo_comm and not empty_data and return_on_all_ranks
            state: dict[Any, Any] = {"buckets_coalesced": True}
            for index, ranges in enumerate(member.gbuf_ranges):
                ((dtype, buckets),) = ranges.items()
                state[index] = {dtype: self._gather_buffer(member, buckets, (number, index))}
            return state

        return gather

    def _gather_buffer(self, member: DistributedOptimizer, buckets: list[Any], key: tuple[int, int]) -> dict[str, Any]:
        buffer, group = member.buffers[key[1]], member.data_parallel_group
        names = ("param", *member.optimizer_state_keys)
        cpu = torch.device("cpu")
        world: dict[str, Any] = {name: self._take((*key, name), buffer.numel_unpadded, cpu) for name in names}
        offset = 0
        for bucket, ranges in zip(buffer.buckets, buckets, strict=True):
            numel = bucket.grad_data.numel()
            assert bucket.numel_unpadded == numel  # training/optimizer.py declares padding content
            for name in names:
                self._gather_bucket(member, ranges, name, world[name][offset : offset + numel], group)
            offset += numel
        return {**world, "numel_unpadded": buffer.numel_unpadded}

    def _gather_bucket(
        self, member: DistributedOptimizer, ranges: Any, name: str, result: Tensor, group: dist.ProcessGroup
    ) -> None:
        """One state of one bucket into ``result``, on the CPU."""
        world_size, device = group.size(), member.buffers[0].grad_data.device
        own = result
        if world_size > 1:
            own = self._take(("own", result.numel()), result.numel() // world_size, device).zero_()
        for param, places in ranges["param_map"].items():
            place = places["gbuf_local"]
            own[place.start : place.end].copy_(
                member._get_main_param_and_optimizer_states(param)[name].detach().flatten()
            )
        if world_size == 1:
            return
        if device.type == "cpu":
            dist.all_gather_into_tensor(result, own, group=group)
        else:
            gathered = self._take(("all", result.numel()), result.numel(), device)
            dist.all_gather_into_tensor(gathered, own, group=group)
            result.copy_(gathered)

    def _take(
        self, key: tuple[Any, ...], numel: int, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        key = (*key, dtype)
        if key not in self._memory:
            self._memory[key] = torch.zeros(numel, dtype=dtype, device=device)
        return self._memory[key]
