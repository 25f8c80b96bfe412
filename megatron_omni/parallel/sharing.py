"""One reader per model replica: its micro-batches reach the other ranks of the replica by broadcast.

The data-reader rank of a replica (tensor-parallel rank 0 of the first pipeline stage) loads the micro-batches of a
step. Their integer tensors go to every rank of the replica (labels are needed on the last stage, positions on all of
them); pictures and sound only to the tensor-parallel group of the first stage, the only one that embeds. A step costs
one header, one integer buffer and, on the first stage, one media buffer, whatever the number of micro-batches.

A reader that fails says so in the header; :func:`sum_over_ranks` then carries the news to the other replicas, so that
every rank stops at the same step instead of waiting for a timeout.
"""

from collections.abc import Sequence
from dataclasses import fields

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_omni.batch import OmniBatch

MEDIA = ("pixel_values", "audio_features")
INTEGERS = tuple(f.name for f in fields(OmniBatch) if f.name not in MEDIA)
_MEDIA_DIMS = {"pixel_values": 4, "audio_features": 3}
_HEADER = 2 + sum(_MEDIA_DIMS.values())
"""Numbers per micro-batch: B, S and the shape of each media tensor (-1 in the first place where there is none)."""


class ReaderFailed(RuntimeError):
    """Another rank could not load its data; that rank reports why."""


def share_step(
    batches: Sequence[OmniBatch] | None, *, num_micro_batches: int, pg: ProcessGroupCollection, device: torch.device
) -> list[OmniBatch] | None:
    """The step's micro-batches on every rank of the replica, media only on the first stage.

    ``batches`` is the reader's list, on the reader; None on the other ranks, and on a reader that failed, in which
    case every rank of the replica gets None.
    """
    on_device = None if batches is None else [batch.to(device) for batch in batches]
    if pg.mp.size() == 1:
        return on_device
    source = dist.get_global_rank(pg.mp, 0)
    is_reader = dist.get_rank() == source
    header = torch.full((1 + num_micro_batches * _HEADER,), -1, dtype=torch.int64, device=device)
    if is_reader and on_device is not None:
        assert len(on_device) == num_micro_batches, (
            f"{len(on_device)} micro-batches loaded, {num_micro_batches} expected"
        )
        header.copy_(torch.tensor([1, *(n for batch in on_device for n in _shapes(batch))], dtype=torch.int64))
    dist.broadcast(header, source, group=pg.mp)
    status, *numbers = header.tolist()
    if status < 0:
        return None
    shapes = [numbers[i : i + _HEADER] for i in range(0, len(numbers), _HEADER)]
    integers = _broadcast_integers(on_device, shapes, source=source, group=pg.mp, device=device)
    media: list[dict[str, Tensor | None]] = [dict.fromkeys(MEDIA) for _ in shapes]
    if pg.pp.rank() == 0:
        media = _broadcast_media(on_device, shapes, source=source, group=pg.tp, device=device)
    return [OmniBatch(**i, **m) for i, m in zip(integers, media, strict=True)]  # type: ignore[arg-type]


def sum_over_ranks(values: Sequence[int], *, device: torch.device) -> list[int]:
    """Sum of each value over all ranks of the run; one small collective, none on a single rank."""
    if dist.get_world_size() == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.int64, device=device)
    dist.all_reduce(total)
    return [int(value) for value in total.tolist()]


def gathered[T](found: Sequence[T], *, group: dist.ProcessGroup, device: torch.device) -> list[T]:
    """What the ranks of ``group`` found, each thing once, in the same order on all; one integer where none found any."""
    if group.size() == 1:
        return list(found)
    total = torch.tensor([len(found)], dtype=torch.int64, device=device)
    dist.all_reduce(total, group=group)
    if not total.item():
        return []
    everyone: list[list[T]] = [[] for _ in range(group.size())]
    dist.all_gather_object(everyone, list(found), group=group)
    return list(dict.fromkeys(item for items in everyone for item in items))


def _shapes(batch: OmniBatch) -> list[int]:
    shapes = list(batch.input_ids.shape)
    for name in MEDIA:
        tensor = getattr(batch, name)
        shapes += [-1] * _MEDIA_DIMS[name] if tensor is None else list(tensor.shape)
    return shapes


def _broadcast_integers(
    batches: Sequence[OmniBatch] | None,
    shapes: Sequence[Sequence[int]],
    *,
    source: int,
    group: dist.ProcessGroup,
    device: torch.device,
) -> list[dict[str, Tensor]]:
    sizes = [(3, b, s) if name == "position_ids" else (b, s) for b, s, *_ in shapes for name in INTEGERS]
    flat = torch.empty(sum(_count(size) for size in sizes), dtype=torch.int64, device=device)
    if batches is not None:
        torch.cat([getattr(batch, name).reshape(-1) for batch in batches for name in INTEGERS], out=flat)
    dist.broadcast(flat, source, group=group)
    parts = [part.view(size) for part, size in zip(flat.split([_count(s) for s in sizes]), sizes, strict=True)]
    width = len(INTEGERS)
    return [dict(zip(INTEGERS, parts[i : i + width], strict=True)) for i in range(0, len(parts), width)]


def _broadcast_media(
    batches: Sequence[OmniBatch] | None,
    shapes: Sequence[Sequence[int]],
    *,
    source: int,
    group: dist.ProcessGroup,
    device: torch.device,
) -> list[dict[str, Tensor | None]]:
    sizes: list[tuple[int, ...] | None] = []
    for shape in shapes:
        offset = 2
        for name in MEDIA:
            size = tuple(shape[offset : offset + _MEDIA_DIMS[name]])
            sizes.append(size if _count(size) > 0 and size[0] > 0 else None)
            offset += _MEDIA_DIMS[name]
    flat = torch.empty(sum(_count(size) for size in sizes if size), dtype=torch.float32, device=device)
    if batches is not None:
        present = [getattr(batch, name) for batch in batches for name in MEDIA]
        tensors = [tensor.reshape(-1).float() for tensor in present if tensor is not None and tensor.numel()]
        if tensors:
            torch.cat(tensors, out=flat)
    if group.size() > 1 and flat.numel():
        dist.broadcast(flat, source, group=group)
    parts = iter(flat.split([_count(size) for size in sizes if size])) if flat.numel() else iter(())
    tensors_or_none = [next(parts).view(size) if size else None for size in sizes]
    return [dict(zip(MEDIA, tensors_or_none[i : i + 2], strict=True)) for i in range(0, len(sizes), 2)]


def _count(shape: Sequence[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
