"""One reader per model replica: its micro-batches reach the other ranks of the replica by broadcast.

The data-reader rank of a replica (the first one of the first pipeline stage) loads the micro-batches of a step. Their
integer tensors go to every rank of the replica (labels are needed on the last stage, positions on all of them), all of a
step at once: a header, which also brings the counts and who sees whom in attention, and a buffer. Bytes (routes) travel in
it as the integers that eight of them are.
Pictures and sound are a thousand times larger and only go to the ranks of the first stage, the only one that embeds: a
micro-batch at a time, pictures as the 8-bit pixels they are and sound in the model's precision. Those of the next
micro-batch travel while this one is computed (:class:`StepData`), so a device holds two of them.
Pictures to be drawn go to the last stage, which has the generator (sharing_drawn.py).

A reader that fails says so in the header; :func:`sum_over_ranks` then carries the news to the other replicas, so that
every rank stops at the same step instead of waiting for a timeout. :func:`from_rank_0` does so for other work of one rank.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_omni.batch import COUNTS, GRIDS, INDICES, MEDIA, KeptRows, OmniBatch, SampleRows
from megatron_omni.parallel.groups import replica
from megatron_omni.parallel.sharing_drawn import DrawnSpec, drawn_numbers, share_drawn
from megatron_omni.platform.device import beside_computation, join_computation, pinned
from megatron_omni.segments import AttentionSegments

_MEDIA_DIMS = {"pixel_values": 4, "audio_features": 3}
_DTYPES = (torch.uint8, torch.bfloat16, torch.float32)
_NUM_SIZES = 4 + len(INDICES)
_HEADER = _NUM_SIZES + len(COUNTS) + sum(1 + dims for dims in _MEDIA_DIMS.values())
"""Numbers per micro-batch: B, S, bytes of routes a token, how many ``part_labels``, the length of each index, the counts and,
for each medium, its dtype (-1: there is none) and shape. The ``part_labels``, how many numbers describe ``OmniBatch.drawn``,
these, and those of ``OmniBatch.attention`` follow."""
_MESSAGE = 8192
"""Numbers of a header's first message, whose size the receivers must know; what does not fit comes in a second one."""
_ALIGNMENT = 16
"""Bytes: a tensor begins at a multiple of it in a buffer of bytes."""

MediaSpec = tuple[torch.dtype, tuple[int, ...]] | None
"""Dtype and shape of a medium's tensor; None where the micro-batch has none."""


class _Header(NamedTuple):
    """What a rank knows of a micro-batch before its tensors arrive."""

    grid: tuple[int, int]
    """B, S."""
    route_bytes: int
    """Of a token; 0 without routes."""
    lengths: list[int]
    """Of the indices."""
    counts: dict[str, int]
    part_labels: tuple[int, ...]
    media: list[MediaSpec]
    drawn: DrawnSpec | None
    attention: AttentionSegments

    @classmethod
    def of(cls, numbers: Sequence[int]) -> "_Header":
        rows, length, route_bytes, num_parts, *lengths = numbers[:_NUM_SIZES]
        counts = dict(zip(COUNTS, numbers[_NUM_SIZES:]))
        media = _specs(numbers[_NUM_SIZES + len(COUNTS) : _HEADER])
        part_labels, rest = tuple(numbers[_HEADER:][:num_parts]), numbers[_HEADER + num_parts :]
        num_drawn = rest[0]
        drawn = DrawnSpec.of(rest[1:][:num_drawn]) if num_drawn else None
        attention = AttentionSegments.from_numbers(rest[1 + num_drawn :])
        return cls((rows, length), route_bytes, lengths, counts, part_labels, media, drawn, attention)

    @property
    def sizes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the integer tensors."""
        grids: dict[str, tuple[int, ...]] = {name: self.grid for name in GRIDS}
        indices = {name: (length,) for name, length in zip(INDICES, self.lengths, strict=True)}
        routes = {"routes": (-(-self.num_route_bytes // 8),)} if self.route_bytes else {}
        return grids | {"position_ids": (3, *self.grid)} | indices | routes

    @property
    def num_route_bytes(self) -> int:
        """Of the micro-batch."""
        return _count(self.grid) * self.route_bytes

    def batch(self, values: dict[str, Any]) -> OmniBatch:
        """The micro-batch, without media, of its integer tensors."""
        if self.route_bytes:
            routes = values["routes"].view(torch.uint8)[: self.num_route_bytes]
            values = values | {"routes": routes.view(*self.grid, self.route_bytes)}
        return OmniBatch(**(values | self.counts), attention=self.attention, part_labels=self.part_labels)


class PeerFailed(RuntimeError):
    """Another rank failed, and said so instead of what this one waited for; that rank reports why."""


class ReaderFailed(PeerFailed):
    """Another rank could not load its data."""


class StepData:
    """A step's micro-batches on the ranks of a replica, in order. Iterate once a pass, on all ranks of the first stage."""

    def __init__(self, batches: Sequence[OmniBatch], media: Callable[[int], Callable[[], list[Tensor | None]]]) -> None:
        """``batches`` without media, on the device; ``media(i)`` sets those of micro-batch i on their way, and what it
        returns waits for them."""
        self._batches, self._media = batches, media

    def __len__(self) -> int:
        return len(self._batches)

    def replay(self, routes: Sequence[Tensor | None]) -> None:
        """Have every micro-batch replay ``routes`` [B, S, L n], or route live."""
        self._batches = [replace(b, routes=r) for b, r in zip(self._batches, routes, strict=True)]

    @property
    def without_media(self) -> list[OmniBatch]:
        """All micro-batches at once, as stages have them that do not embed."""
        return list(self._batches)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(B, S) of every micro-batch."""
        return [(len(batch.input_ids), batch.input_ids.shape[1]) for batch in self._batches]

    def keep_rows(self, known: Mapping[int, SampleRows]) -> None:
        """Keep the rows of frozen encoders from the first pass on, in place of the media; those of the samples in ``known``
        are there already."""
        self._batches = [replace(batch, kept_rows=KeptRows.of_samples(batch, known)) for batch in self._batches]

    def _arriving(self, index: int) -> Callable[[], list[Tensor | None]]:
        kept = self._batches[index].kept_rows
        return (lambda: [None, None]) if kept is not None and kept.complete else self._media(index)

    def __iter__(self) -> Iterator[OmniBatch]:
        arriving = self._arriving(0)
        for index, batch in enumerate(self._batches):
            pixels, sound = arriving()
            if index + 1 < len(self._batches):
                arriving = self._arriving(index + 1)
            yield replace(batch, pixel_values=pixels, audio_features=sound)


def share_step(
    batches: Sequence[OmniBatch] | None,
    *,
    num_micro_batches: int,
    pg: ProcessGroupCollection,
    device: torch.device,
    precision: torch.dtype = torch.float32,
) -> StepData | None:
    """The step's micro-batches on every rank of the replica, media only on the first stage.

    ``batches`` is the reader's list, on the reader and in host memory; None on the other ranks, and on a reader that
    failed, in which case every rank of the replica gets None. Sound arrives in ``precision``.
    """
    group = replica(pg)
    alone, is_reader = group.size() == 1, group.rank() == 0
    if batches is not None:
        assert len(batches) == num_micro_batches, f"{len(batches)} micro-batches loaded, {num_micro_batches} expected"
        batches = [_in_precision(batch, precision) for batch in batches]
        if pg.cp.size() > 1:
            batches = [batch.with_parts(2 * pg.cp.size()) for batch in batches]
    numbers = None if batches is None else [_header(batch, with_pixels=pg.pp.size() > 1) for batch in batches]
    if not alone:
        numbers = _share_numbers(numbers if is_reader else None, group=group, device=device)
    if numbers is None:
        return None
    headers = [_Header.of(row) for row in numbers]
    integers = _share_integers(batches, headers, pg=pg, device=device)
    integers = share_drawn(batches, integers, [header.drawn for header in headers], pg=pg, device=device)
    if pg.pp.rank() > 0:
        return StepData(integers, lambda index: lambda: [integers[index].pixel_values, None])

    def media(index: int) -> Callable[[], list[Tensor | None]]:
        batch = None if batches is None else batches[index]
        return _send_media(batch, headers[index].media, group=pg.tp_cp, device=device)

    return StepData(integers, media)


def sum_over_ranks(values: Sequence[int], *, device: torch.device) -> list[int]:
    """Sum of each value over all ranks of the run; one small collective, none on a single rank."""
    if dist.get_world_size() == 1:
        return list(values)
    return _summed(values, group=None, device=device)


def from_rank_0[T](work: Callable[[], T]) -> T:
    """What ``work`` returns on rank 0, which alone does it, on every rank of the run; all of them call this together.

    Where it fails, rank 0 raises its error and the others PeerFailed.
    """
    box: list[tuple[T] | None] = [None]
    try:
        if dist.get_rank() == 0:
            box = [(work(),)]
    finally:  # the others wait, whatever happened
        if dist.get_world_size() > 1:
            dist.broadcast_object_list(box, src=0)
    if box[0] is None:
        raise PeerFailed("rank 0 failed, and says why")
    return box[0][0]


def gathered[T](found: Sequence[T], *, group: dist.ProcessGroup | None, device: torch.device) -> list[T]:
    """What the ranks of ``group`` (None: all) found, each thing once, in the same order on all; one integer where none found
    any.
    """
    size = dist.get_world_size(group)
    if size == 1:
        return list(found)
    if _summed([len(found)], group=group, device=device) == [0]:
        return []
    everyone: list[list[T]] = [[] for _ in range(size)]
    dist.all_gather_object(everyone, list(found), group=group)
    return list(dict.fromkeys(item for items in everyone for item in items))


def _summed(values: Sequence[int], *, group: dist.ProcessGroup | None, device: torch.device) -> list[int]:
    total = pinned(torch.tensor(values, dtype=torch.int64)).to(device, non_blocking=True)
    dist.all_reduce(total, group=group)
    summed: list[int] = total.tolist()
    return summed


def _in_precision(batch: OmniBatch, precision: torch.dtype) -> OmniBatch:
    """The encoders compute in ``precision``, so they would convert it there."""
    sound = batch.audio_features
    return batch if sound is None else replace(batch, audio_features=sound.to(precision))


def _share_numbers(
    rows: list[list[int]] | None, *, group: dist.ProcessGroup, device: torch.device
) -> list[list[int]] | None:
    """The reader's lists of integers on every rank of ``group``; None where it has none. One wait, or two for long ones."""
    sent = [] if rows is None else [n for row in rows for n in (len(row), *row)]
    first = torch.zeros(_MESSAGE, dtype=torch.int64)
    first[0] = len(sent)
    first[1 : 1 + len(sent)] = torch.tensor(sent[: _MESSAGE - 1], dtype=torch.int64)
    reader = dist.get_global_rank(group, 0)
    first = pinned(first).to(device, non_blocking=True)
    dist.broadcast(first, reader, group=group)
    length, *numbers = first.tolist()
    if length > len(numbers):
        rest = torch.tensor(sent[len(numbers) :] or [0] * (length - len(numbers)), dtype=torch.int64)
        rest = pinned(rest).to(device, non_blocking=True)
        dist.broadcast(rest, reader, group=group)
        numbers += rest.tolist()
    received, place = [], 0
    while place < length:
        start, place = place + 1, place + 1 + numbers[place]
        received.append(numbers[start:place])
    return received or None


def _header(batch: OmniBatch, *, with_pixels: bool) -> list[int]:
    route_bytes = 0 if batch.routes is None else batch.routes.shape[2]
    numbers = [*batch.input_ids.shape, route_bytes, len(batch.part_labels)]
    numbers += [len(getattr(batch, name)) for name in INDICES]
    numbers += [getattr(batch, name) for name in COUNTS]
    for name in MEDIA:
        tensor = getattr(batch, name)
        present = tensor is not None and tensor.numel() > 0
        numbers += [_DTYPES.index(tensor.dtype), *tensor.shape] if present else [-1] * (1 + _MEDIA_DIMS[name])
    drawn = drawn_numbers(batch, with_pixels=with_pixels)
    return [*numbers, *batch.part_labels, len(drawn), *drawn, *batch.attention.numbers()]


def _specs(numbers: Sequence[int]) -> list[MediaSpec]:
    specs: list[MediaSpec] = []
    offset = 0
    for name in MEDIA:
        dtype, *shape = numbers[offset : offset + 1 + _MEDIA_DIMS[name]]
        specs.append(None if dtype < 0 else (_DTYPES[dtype], tuple(shape)))
        offset += 1 + _MEDIA_DIMS[name]
    return specs


def _share_integers(
    batches: Sequence[OmniBatch] | None,
    headers: Sequence[_Header],
    *,
    pg: ProcessGroupCollection,
    device: torch.device,
) -> list[OmniBatch]:
    sizes = [size for header in headers for size in header.sizes.values()]
    if batches is not None:
        flat = torch.cat([_integers(b, name) for b, header in zip(batches, headers) for name in header.sizes])
        flat = pinned(flat).to(device, non_blocking=True)
    else:
        flat = torch.empty(sum(_count(size) for size in sizes), dtype=torch.int64, device=device)
    group = replica(pg)
    if group.size() > 1:
        dist.broadcast(flat, dist.get_global_rank(group, 0), group=group)
    parts = iter(flat.split([_count(size) for size in sizes]))
    shared = []
    for header in headers:
        values: dict[str, Any] = {name: next(parts).view(size) for name, size in header.sizes.items()}
        shared.append(header.batch(values))
    return shared


def _integers(batch: OmniBatch, name: str) -> Tensor:
    """A field as a row of int64."""
    flat: Tensor = getattr(batch, name).reshape(-1)
    if flat.dtype == torch.uint8:
        flat = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(torch.int64)
    return flat


def _send_media(
    batch: OmniBatch | None, specs: Sequence[MediaSpec], *, group: dist.ProcessGroup, device: torch.device
) -> Callable[[], list[Tensor | None]]:
    """Set a micro-batch's media on their way from the reader's host memory to every rank of ``group``."""
    sizes = [0 if spec is None else _padded(_count(spec[1]) * spec[0].itemsize) for spec in specs]
    if not any(sizes):
        return lambda: [None for _ in specs]
    work = None
    with beside_computation():
        if batch is not None:
            host = torch.empty(sum(sizes), dtype=torch.uint8)
            for name, spec, part in zip(MEDIA, specs, host.split(sizes), strict=True):
                if spec is not None:
                    _as(part, spec).copy_(getattr(batch, name))
            buffer = pinned(host).to(device, non_blocking=True)
        else:
            buffer = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
        if group.size() > 1:
            work = dist.broadcast(buffer, dist.get_global_rank(group, 0), group=group, async_op=True)

    def arrived() -> list[Tensor | None]:
        if work is not None:
            work.wait()
        join_computation(buffer)
        return [None if s is None else _as(part, s) for s, part in zip(specs, buffer.split(sizes), strict=True)]

    return arrived


def _as(part: Tensor, spec: tuple[torch.dtype, tuple[int, ...]]) -> Tensor:
    """The tensor that bytes are."""
    dtype, shape = spec
    return part[: _count(shape) * dtype.itemsize].view(dtype).view(shape)


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _count(shape: Sequence[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
