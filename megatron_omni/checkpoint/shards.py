"""Which part of every tensor this rank writes and reads, so that each byte of a checkpoint passes through one rank.

    optimizer's state, distributed      the rank's own slice of Megatron's flat buffers, as boxes of the tensors that it
                                        lies in: written from where it is and read to where it belongs, without exchange
    weights, other optimizers' state    equal on all data-parallel ranks: dealt over them by size

In the checkpoint the optimizer's state is ``fully_reshardable``: one tensor of the parameter's shape for each state, cut
into blocks wherever the ranks that wrote it met. Any TP, PP, EP and DP reads it, Megatron's own reader included.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection

Shape = tuple[int, ...]


def boxes(sizes: Shape, strides: Shape, start: int, end: int) -> Iterator[tuple[Shape, Shape]]:
    """(offsets, sizes) of the boxes that the elements ``start`` .. ``end`` of memory fill in a view of it.

    Memory is counted from the view's first element; strides must not increase. At most two boxes for each axis and one more.
    """
    if start <= 0 and end > sum((n - 1) * s for n, s in zip(sizes, strides)):
        yield (0,) * len(sizes), sizes
        return
    if not sizes:
        return
    length, step = sizes[0], strides[0]
    if length == 1:
        yield from (((0, *at), (1, *inner)) for at, inner in boxes(sizes[1:], strides[1:], start, end))
        return
    extent = 1 + sum((n - 1) * s for n, s in zip(sizes[1:], strides[1:]))
    assert step >= extent, "the axes of a stored tensor are in the order of memory"
    first, last = max(0, -(-start // step)), min(length, (end - extent) // step + 1)  # entries that lie inside wholly
    if first < last:
        yield (first, *(0 for _ in sizes[1:])), (last - first, *sizes[1:])
    for entry in sorted({start // step, (end - 1) // step}):
        if 0 <= entry < length and not first <= entry < last:
            for offsets, inner in boxes(sizes[1:], strides[1:], start - entry * step, end - entry * step):
                yield (entry, *offsets), (1, *inner)


class FlatState:
    """The state of ``optimizer``'s distributed members: which of it is this rank's."""

    def __init__(self, optimizer: MegatronOptimizer) -> None:
        members = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
        self._members = [member for member in members if isinstance(member, DistributedOptimizer)]
        self._starts: list[int] = []
        self._buffers: list[_Buffer] = []
        self._end = 0

    @contextmanager
    def described(self) -> Iterator[None]:
        """Inside the block, Megatron's ``sharded_state_dict`` of the optimizer names its state without gathering it.

        Its tensors then have no memory (device ``meta``); :meth:`own` knows from their place what belongs there.
        """
        for member in self._members:
            member.get_parameter_state_dp_zero = self._describer(member)  # type: ignore[method-assign]
        try:
            yield
        finally:
            for member in self._members:
                del member.get_parameter_state_dp_zero

    def own(self, tensor: ShardedTensor) -> Iterator[ShardedTensor]:
        """This rank's boxes of a described ``tensor``, as views of the optimizer's memory."""
        if not tensor.data.numel():
            return
        number = bisect_right(self._starts, tensor.data.storage_offset()) - 1
        buffer, first = self._buffers[number], tensor.data.storage_offset() - self._starts[number]
        sizes, strides = tuple(tensor.data.shape), tensor.data.stride()
        extent = 1 + sum((n - 1) * s for n, s in zip(sizes, strides))
        for start, end, parameter in buffer.pieces:
            if end <= first or first + extent <= start:
                continue
            flat = _state(buffer.member, parameter, buffer.name).detach().view(-1)
            assert flat.numel() == end - start, tensor.key
            for offsets, box in boxes(sizes, strides, start - first, end - first):
                place = first - start + sum(o * s for o, s in zip(offsets, strides))
                yield _box(tensor, offsets, flat.as_strided(box, strides, flat.storage_offset() + place))

    def _describer(self, member: DistributedOptimizer) -> Callable[..., dict[Any, Any]]:
        def describe(use_gloo_comm: bool, empty_data: bool, return_on_all_ranks: bool) -> dict[Any, Any]:
            """Megatron's ``get_parameter_state_dp_zero``: {buffer: {dtype: {state name: all of the buffer}}}."""
            state: dict[Any, Any] = {"buckets_coalesced": True}
            for index, ranges in enumerate(member.gbuf_ranges):
                ((dtype, buckets),) = ranges.items()
                pieces = sorted(
                    (
                        (places["gbuf_world"].start, places["gbuf_world"].end, parameter)
                        for bucket in buckets
                        for parameter, places in bucket["param_map"].items()
                    ),
                    key=lambda piece: piece[0],
                )
                names, numel = ("param", *member.optimizer_state_keys), member.buffers[index].numel
                state[index] = {dtype: {name: self._describe(_Buffer(member, name, pieces), numel) for name in names}}
            return state

        return describe

    def _describe(self, buffer: "_Buffer", numel: int) -> torch.Tensor:
        """A tensor without memory whose place no other described one has."""
        start = self._end
        self._starts.append(start)
        self._buffers.append(buffer)
        self._end += numel
        dtype = buffer.member._get_state_key_dtype(buffer.name)  # of a moment; fp32 of master weights
        return torch.empty(self._end, dtype=dtype, device="meta")[start:]


class _Buffer(NamedTuple):
    """One state of one of Megatron's flat buffers."""

    member: DistributedOptimizer
    name: str
    pieces: list[tuple[int, int, torch.nn.Parameter]]
    """This rank's: first element and last + 1 in the buffer, and the parameter that they belong to."""


def _state(member: DistributedOptimizer, parameter: torch.nn.Parameter, name: str) -> torch.Tensor:
    """This rank's part of a state of ``parameter``, where the optimizer has it (Megatron's own way there copies bf16)."""
    if not member.config.use_precision_aware_optimizer:
        return member._get_main_param_and_optimizer_states(parameter)[name]
    optimizer, (group, place) = member.optimizer, member.model_param_group_index_map[parameter]
    own = optimizer.param_groups[group]["params"][place]
    if isinstance(optimizer, HybridDeviceOptimizer) and name == "param":
        return optimizer.param_to_inner_param[own]  # after a load its state has a copy
    return optimizer.state[own]["master_param" if name == "param" else name]


def _box(tensor: ShardedTensor, offsets: Shape, data: torch.Tensor) -> ShardedTensor:
    """The part of ``tensor`` at ``offsets``, which only this rank of its data-parallel group has."""
    axes = tensor.prepend_axis_num
    assert isinstance(tensor.replica_id, tuple), tensor.key
    return ShardedTensor(
        tensor.key,
        data[(None,) * axes],
        data.dtype,
        (1,) * axes + tuple(data.shape),
        tensor.global_shape,
        tensor.global_offset[:axes] + tuple(map(sum, zip(tensor.global_offset[axes:], offsets))),
        None,  # no grid
        replica_id=(*tensor.replica_id[:-1], 0),  # the last number counts data-parallel ranks
    )


def is_described(value: Any) -> bool:
    """Whether ``value`` is a part of a described state (:class:`FlatState`)."""
    return isinstance(value, (ShardedTensor, ShardedTensorFactory)) and value.data is not None and value.data.is_meta


def expert_keys(weights: dict[str, Any]) -> set[str]:
    """Names in the checkpoint of the routed experts' parameters, whose equals are on other ranks than those of the rest."""
    sharded = [value for value in nested_values(weights) if isinstance(value, (ShardedTensor, ShardedTensorFactory))]
    return {value.key for value in sharded if not getattr(value.data, "allreduce", True)}


class Dealt(NamedTuple):
    """A tensor that is equal on all ranks of ``group``, and the one of them that writes or reads it."""

    tensor: ShardedTensor
    group: dist.ProcessGroup
    owner: int

    @property
    def is_ours(self) -> bool:
        """Whether this rank is the one."""
        return self.group.rank() == self.owner


def dealt(tensors: Iterable[ShardedTensor], experts: set[str], pg: ProcessGroupCollection) -> list[Dealt]:
    """``tensors``, the same ones in the same order on every rank of a group, dealt over the ranks by size.

    Names of optimizer state are ``optimizer.state.<state>.<name of the parameter>``.
    """
    groups: dict[bool, list[ShardedTensor]] = {False: [], True: []}
    for tensor in tensors:
        groups[tensor.key in experts or tensor.key.split(".", 3)[-1] in experts].append(tensor)
    found = []
    for is_expert, group in ((False, pg.dp_cp), (True, pg.expt_dp)):
        sizes = [math.prod(tensor.local_shape) * tensor.dtype.itemsize for tensor in groups[is_expert]]
        for tensor, owner in zip(groups[is_expert], deal(sizes, group.size()), strict=True):
            assert isinstance(tensor.replica_id, tuple) and tensor.replica_id[-1] == group.rank(), tensor
            found.append(Dealt(tensor, group, owner))
    return found


def deal(sizes: Sequence[int], num_ranks: int) -> list[int]:
    """The rank of each item, by its size: the largest first, each to the rank that has least."""
    loads, owners = [0] * num_ranks, [0] * len(sizes)
    for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        owners[item] = loads.index(min(loads))
        loads[owners[item]] += sizes[item]
    return owners
