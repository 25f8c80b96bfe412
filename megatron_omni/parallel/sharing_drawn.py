"""Pictures to be drawn, from the reader of a replica to the ranks of its last pipeline stage.

The header of a step (sharing.py) says of each micro-batch what tensors its :class:`~megatron_omni.drawn.Drawn` has. All of a
step go at once, as bytes: latents and teachers' rows of a picture are as large as a few hundred hidden states. Where the reader
is in the last stage itself they go to its other ranks; else one message takes them down the pipeline, from the
reader to the first rank of the last stage, which hands them to the others.

With several stages the pixels for the vision encoder go the same way, where rows of it are to stand for a source: the last
stage makes them by itself.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_omni.batch import OmniBatch
from megatron_omni.drawn import Drawn
from megatron_omni.parallel.groups import replica
from megatron_omni.platform.device import pinned

_DTYPES = (torch.uint8, torch.bool, torch.int64, torch.float16, torch.bfloat16, torch.float32)
_ALIGNMENT = 16
"""Bytes: a tensor begins at a multiple of it."""

TensorSpec = tuple[torch.dtype, tuple[int, ...]] | None
"""Dtype and shape; None where there is none."""


class DrawnSpec(NamedTuple):
    """What a rank knows of a micro-batch's pictures before they arrive."""

    vision_rows: list[tuple[int, int]]
    tasks: list[str]
    tensors: list[TensorSpec]
    """Those of :meth:`Drawn.tensors`; the last one is the pixels that come along."""

    @classmethod
    def of(cls, numbers: Sequence[int]) -> "DrawnSpec":
        """As :func:`drawn_numbers` wrote them."""
        count, length, *rest = numbers
        rows = [(rest[2 * i], rest[2 * i + 1]) for i in range(count)]
        names = bytes(rest[2 * count :][:length]).decode()
        specs, place = list[TensorSpec](), 2 * count + length
        while place < len(rest):
            dtype, dims = rest[place : place + 2]
            shape = tuple(rest[place + 2 : place + 2 + dims])
            specs.append(None if dtype < 0 else (_DTYPES[dtype], shape))
            place += 2 + dims
        return cls(rows, names.split("\n"), specs)

    @property
    def sizes(self) -> list[int]:
        """Bytes of each tensor in the message."""
        return [0 if spec is None else _padded(_num_bytes(spec)) for spec in self.tensors]


def drawn_numbers(batch: OmniBatch, *, with_pixels: bool) -> list[int]:
    """What the header says of ``batch.drawn``; nothing without. ``with_pixels``: those for the vision encoder come along."""
    drawn = batch.drawn
    if drawn is None:
        return []
    names = "\n".join(drawn.tasks).encode()
    numbers = [len(drawn), len(names)]
    numbers += [number for rows in drawn.vision_rows for number in rows or (-1, -1)] + list(names)
    for tensor in _tensors(batch, with_pixels):
        numbers += [-1, 0] if tensor is None else [_DTYPES.index(tensor.dtype), tensor.dim(), *tensor.shape]
    return numbers


def share_drawn(
    batches: Sequence[OmniBatch] | None,
    shared: list[OmniBatch],
    specs: Sequence[DrawnSpec | None],
    *,
    pg: ProcessGroupCollection,
    device: torch.device,
) -> list[OmniBatch]:
    """``shared`` with what ``batches``, the reader's, have to draw, on the last stage; as they are on the others. All ranks of
    the replica call this together."""
    if replica(pg).size() == 1 and batches is not None:
        own = [None if batch.drawn is None else batch.drawn.to(device) for batch in batches]
        return [replace(batch, drawn=drawn) for batch, drawn in zip(shared, own, strict=True)]
    sizes = [size for spec in specs if spec is not None for size in spec.sizes]
    is_last = pg.pp.rank() == pg.pp.size() - 1
    if not sizes or not (is_last or batches is not None):
        return shared
    buffer = _host_buffer(batches, specs) if batches is not None else torch.empty(sum(sizes), dtype=torch.uint8)
    buffer = (pinned(buffer) if batches is not None else buffer).to(device, non_blocking=True)
    if pg.pp.size() > 1 and pg.tp_cp.rank() == 0:
        if batches is not None:
            dist.send(buffer, dist.get_global_rank(pg.pp, pg.pp.size() - 1), group=pg.pp)
        else:
            dist.recv(buffer, dist.get_global_rank(pg.pp, 0), group=pg.pp)
    if not is_last:
        return shared
    if pg.tp_cp.size() > 1:
        dist.broadcast(buffer, dist.get_global_rank(pg.tp_cp, 0), group=pg.tp_cp)
    parts = iter(buffer.split(sizes))
    return [
        batch if spec is None else _with(batch, spec, [next(parts) for _ in spec.sizes])
        for batch, spec in zip(shared, specs)
    ]


def _host_buffer(batches: Sequence[OmniBatch], specs: Sequence[DrawnSpec | None]) -> Tensor:
    buffer = torch.empty(sum(size for spec in specs if spec is not None for size in spec.sizes), dtype=torch.uint8)
    parts = iter(buffer.split([size for spec in specs if spec is not None for size in spec.sizes]))
    for batch, spec in zip(batches, specs):
        if spec is not None:
            for tensor, known in zip(_tensors(batch, spec.tensors[-1] is not None), spec.tensors, strict=True):
                part = next(parts)
                if tensor is not None and known is not None:
                    _as(part, known).copy_(tensor)
    return buffer


def _with(batch: OmniBatch, spec: DrawnSpec, parts: Sequence[Tensor]) -> OmniBatch:
    found = [None if known is None else _as(part, known) for known, part in zip(spec.tensors, parts, strict=True)]
    drawn = Drawn.of_tensors(found[:-1], tasks=spec.tasks, vision_rows=spec.vision_rows)
    return replace(batch, drawn=drawn, pixel_values=found[-1])


def _tensors(batch: OmniBatch, with_pixels: bool) -> list[Tensor | None]:
    """Those of the pictures, then the pixels for the vision encoder, where it is asked for."""
    assert batch.drawn is not None
    return [*batch.drawn.tensors(), batch.pixel_values if with_pixels and batch.drawn.wants_pixels else None]


def _as(part: Tensor, spec: tuple[torch.dtype, tuple[int, ...]]) -> Tensor:
    return part[: _num_bytes(spec)].view(spec[0]).view(spec[1])


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _num_bytes(spec: tuple[torch.dtype, tuple[int, ...]]) -> int:
    count = spec[0].itemsize
    for size in spec[1]:
        count *= size
    return count
