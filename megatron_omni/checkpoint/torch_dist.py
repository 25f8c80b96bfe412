"""Megatron's ``torch_dist`` directories, written and read one block at a time by one process, without process groups.

    __<rank>_0.distcp    blocks back to back, each a small ``torch.save`` archive; ``rank`` is the one that would have
                         saved it in a run of that layout
    .metadata            pickled table: tensor -> global shape, type, blocks (offsets, sizes); block -> file, position
    metadata.json        the format's name

Writing gives what ``megatron.core.dist_checkpointing.save`` gives for the same weights, and any layout loads it. Reading
takes only the bytes of the asked part, wherever a block is stored contiguously (always, in what Megatron and we write).
"""

import io
import itertools
import json
import math
import os
import pickle
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, serialization
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_omni.checkpoint.commit import CheckpointError
from megatron_omni.checkpoint.tensor_files import HashedFile, read_into, tensor_bytes
from megatron_omni.checkpoint.untrusted import read_metadata
from megatron_omni.estimate.memory import STAGING_BYTES

COMMON_STATE = "common_state/shard_0_1"
Shape = tuple[int, ...]


class TorchDistWriter:
    """Writes a checkpoint block by block. Files of ranks that get no block do not exist."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._files: dict[int, HashedFile] = {}
        self._tensors: dict[str, Any] = {}
        self._storage: dict[MetadataIndex, _StorageInfo] = {}

    def write(self, key: str, block: Tensor, *, shape: Shape, offsets: Shape, rank: int) -> None:
        """One block of tensor ``key``, whose whole ``shape`` is known; blocks must not overlap and must cover it."""
        found = self._tensors.setdefault(
            key, TensorStorageMetadata(TensorProperties(dtype=block.dtype), torch.Size(shape), [])
        )
        assert found.size == torch.Size(shape) and found.properties.dtype == block.dtype, key
        found.chunks.append(ChunkStorageMetadata(torch.Size(offsets), block.shape))
        self._save(MetadataIndex(key, offsets), alone(block), rank)

    def write_object(self, key: str, value: Any, *, rank: int = 0) -> None:
        """Plain values under ``key``."""
        self._tensors[key] = BytesStorageMetadata()
        self._save(MetadataIndex(key), value, rank)

    def finish(self) -> dict[str, str]:
        """Write the tables; SHA-256 of every file by its name."""
        for key, found in self._tensors.items():
            if isinstance(found, TensorStorageMetadata):
                covered = sum(math.prod(chunk.sizes) for chunk in found.chunks)
                assert covered == math.prod(found.size), f"{key}: {covered} of {math.prod(found.size)} elements"
        table = Metadata(self._tensors, None, self._storage, StorageMeta(), version="1.0.0")
        digests = {f"__{rank}_0.distcp": file.finish() for rank, file in self._files.items()}
        digests[".metadata"] = self._write_bytes(".metadata", pickle.dumps(table))
        backend = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        digests["metadata.json"] = self._write_bytes("metadata.json", json.dumps(backend).encode())
        return digests

    def close(self) -> None:
        """Close files without completing (after a failure)."""
        for file in self._files.values():
            file.close()

    def _save(self, index: MetadataIndex, value: Any, rank: int) -> None:
        if rank not in self._files:
            self._files[rank] = HashedFile(self.directory / f"__{rank}_0.distcp")
        file = self._files[rank]
        start = file.size
        checked = serialization.get_crc32_options()
        serialization.set_crc32_options(False)  # readers ignore it, and the whole file gets a SHA-256
        try:
            torch.save(value, file)  # type: ignore[arg-type]
        except RuntimeError as error:
            # A signal in the middle: torch's writer closes the half-written archive and complains of that instead.
            if isinstance(error.__context__, KeyboardInterrupt):
                raise error.__context__ from None
            raise
        finally:
            serialization.set_crc32_options(checked)
        self._storage[index] = _StorageInfo(f"__{rank}_0.distcp", start, file.size - start)

    def _write_bytes(self, name: str, data: bytes) -> str:
        file = HashedFile(self.directory / name)
        file.write(data)
        return file.finish()


@dataclass(frozen=True)
class StoredTensor:
    """What the table says of a tensor."""

    dtype: torch.dtype
    shape: Shape
    blocks: tuple[tuple[Shape, Shape], ...]
    """(offsets, sizes)."""


class TorchDistReader:
    """Reads parts of the tensors in a ``torch_dist`` directory. Nothing in it is trusted (``untrusted.py``)."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.moved: Callable[[], None] = lambda: None
        """Called for every piece that was read."""
        self.table = table = read_metadata(directory / ".metadata")
        self._storage: dict[MetadataIndex, _StorageInfo] = table.storage_data
        self._raw: dict[MetadataIndex, tuple[int, torch.dtype] | None] = {}
        self.tensors = {
            key: StoredTensor(
                found.properties.dtype,
                tuple(found.size),
                tuple((tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in found.chunks),
            )
            for key, found in table.state_dict_metadata.items()
            if isinstance(found, TensorStorageMetadata)
        }

    def read(self, key: str, *, index: int | None = None) -> Tensor:
        """Tensor ``key``, or its entry ``index`` on the leading axis, in memory of its own."""
        stored = self.tensors[key]
        start, size = [0] * len(stored.shape), list(stored.shape)
        if index is not None:
            start[0], size[0] = index, 1
        tensor = torch.empty(size, dtype=stored.dtype)
        self.fill(key, start, tensor)
        return tensor.squeeze(0) if index is not None else tensor

    def fill(self, key: str, start: Sequence[int], target: Tensor) -> None:
        """Fill ``target``, on any device, from the region of tensor ``key`` at ``start``."""
        size, pieces = list(target.shape), []
        for offsets, sizes in self.tensors[key].blocks:
            low = [max(a, b) for a, b in zip(start, offsets)]
            high = [min(a + n, b + m) for a, n, b, m in zip(start, size, offsets, sizes)]
            if all(a < b for a, b in zip(low, high)):
                pieces.append((offsets, sizes, low, [b - a for a, b in zip(low, high)]))
        self._check_cover(key, size, [piece[2:] for piece in pieces])
        for offsets, sizes, low, extent in pieces:
            part = narrow_tensor_by_index(target, [a - b for a, b in zip(low, start)], extent)
            self._read_block(key, offsets, sizes, [a - b for a, b in zip(low, offsets)], part)

    def _check_cover(self, key: str, size: Sequence[int], pieces: Sequence[Sequence[list[int]]]) -> None:
        """CheckpointError unless the ``pieces`` (start, extent) of a region of that size are disjoint and fill it."""
        for (low, extent), (other, width) in itertools.combinations(pieces, 2):
            if all(a < b + m and b < a + n for a, n, b, m in zip(low, extent, other, width)):
                raise CheckpointError(
                    f"{self.directory}: two blocks of {key!r}, at {low} and {other}, overlap; not a whole checkpoint"
                )
        covered = sum(math.prod(extent) for _, extent in pieces)
        if covered != math.prod(size):
            raise CheckpointError(
                f"{self.directory}: the blocks of {key!r} cover {covered} of {math.prod(size)} elements; not a whole checkpoint"
            )

    def _read_block(self, key: str, offsets: Shape, sizes: Shape, within: Sequence[int], target: Tensor) -> None:
        """Fill ``target`` with the part of a block at ``within``: only its rows, where the bytes lie in order in the file."""
        where = MetadataIndex(key, offsets)
        info = self._storage[where]
        with (self.directory / info.relative_path).open("rb", buffering=0) as file:
            raw = self._position(file, where, info, sizes, target.dtype)
            if raw is None:
                whole = self._load(_window(file, info), where, info, device="cpu")
                target.copy_(narrow_tensor_by_index(whole, within, target.shape))
                self.moved()
            else:
                self._read_rows(
                    file, raw, sizes, within, target, what=f"{self.directory / info.relative_path}: {key!r}"
                )

    def _read_rows(
        self, file: Any, position: int, sizes: Shape, within: Sequence[int], target: Tensor, *, what: str
    ) -> None:
        """Fill ``target`` with the part at ``within`` of the contiguous block at ``position``, by ``STAGING_BYTES``."""
        if not sizes:
            sizes, within, target = (1,), [0], target.view(1)
        row = math.prod(sizes[1:]) * target.itemsize
        if len(sizes) > 1 and (len(target) == 1 or row > STAGING_BYTES):
            for i, part in enumerate(target):
                self._read_rows(file, position + (within[0] + i) * row, sizes[1:], within[1:], part, what=what)
            return
        count = max(1, STAGING_BYTES // max(1, row))
        for first in range(0, len(target), count):
            part = target[first : first + count]
            is_place = part.device.type == "cpu" and part.shape[1:] == sizes[1:] and part.is_contiguous()
            rows = part if is_place else torch.empty(len(part), *sizes[1:], dtype=part.dtype)
            read_into(file, tensor_bytes(rows), position + (within[0] + first) * row, what=what)
            if not is_place:
                part.copy_(narrow_tensor_by_index(rows, [0, *within[1:]], part.shape))
            self.moved()

    def _load(self, view: io.BufferedReader, where: MetadataIndex, info: _StorageInfo, *, device: str) -> Any:
        try:
            return torch.load(view, map_location=device, weights_only=True)
        except Exception as error:  # a damaged archive fails in as many ways as zip and pickle have parts
            raise CheckpointError(
                f"{self.directory / info.relative_path}: {where.fqn!r}: the block at byte {info.offset} is damaged or was "
                f"made to run code ({type(error).__name__}); restore it from a copy"
            ) from error

    def _position(
        self, file: Any, where: MetadataIndex, info: _StorageInfo, sizes: Shape, dtype: torch.dtype
    ) -> int | None:
        """Where the block's first byte lies in its file; None when its bytes are not the plain contiguous block."""
        if where not in self._raw:
            view = _window(file, info)
            found = self._load(view, where, info, device="meta")
            if not isinstance(found, Tensor) or tuple(found.shape) != sizes or found.dtype != dtype:
                raise CheckpointError(
                    f"{self.directory / info.relative_path}: {where.fqn!r}: expected a block {list(sizes)} of {dtype}, "
                    "found something else; not a whole checkpoint"
                )
            position = None
            if found.is_contiguous() and found.storage_offset() == 0:
                view.seek(0)
                with zipfile.ZipFile(view) as archive:
                    entry = next((e for e in archive.infolist() if e.filename.endswith("/data/0")), None)
                if entry is not None and entry.compress_type == zipfile.ZIP_STORED:
                    view.seek(entry.header_offset)
                    local = view.read(30)
                    names = int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
                    if entry.file_size >= found.numel() * dtype.itemsize:
                        position = info.offset + entry.header_offset + 30 + names
            self._raw[where] = None if position is None else (position, dtype)
        known = self._raw[where]
        return None if known is None else known[0]


def alone(block: Tensor) -> Tensor:
    """``block`` as a tensor with a storage of just its size: a view would be saved with all that it is a view of."""
    if block.ndim == 0 or block.numel() == 0 or not block.is_contiguous():
        return block.clone(memory_format=torch.contiguous_format)
    return torch.from_numpy(block.view(torch.uint8).numpy()).view(block.dtype)


def _window(file: Any, info: _StorageInfo) -> io.BufferedReader:
    """The archive at ``info`` as a file of its own."""
    return io.BufferedReader(_Window(file.fileno(), info.offset, info.length))


class _Window(io.RawIOBase):
    """``length`` bytes of an open file from ``start``; closing it leaves the file open."""

    def __init__(self, descriptor: int, start: int, length: int) -> None:
        self._descriptor, self._start, self._length, self._at = descriptor, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        view = view[: max(0, min(len(view), self._length - self._at))]
        count = os.preadv(self._descriptor, [view], self._start + self._at) if len(view) else 0
        self._at += count
        return count
