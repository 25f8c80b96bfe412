"""safetensors files, read one tensor at a time and written in one pass, without ever mapping or holding a whole file.

A file is 8 bytes (little-endian length n of the header), n bytes of JSON ``{key: {dtype, shape, data_offsets}}``, then
the tensors back to back. Everything that the header claims is checked against the file before a tensor is read: its
length, JSON, known dtypes, offsets that follow each other and end with the file. Tensors are read with ``read`` into
their own memory (a mapping would count the whole file as resident).
"""

import errno
import fcntl
import hashlib
import json
import math
import mmap
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_omni.foreign import parse_json

MAX_HEADER_BYTES = 100_000_000
MAX_AXES = 16
"""Of a tensor. A product over millions of axes would take for ever."""
PARALLEL_BYTES = 1 << 20
BUFFER_BYTES = 4 << 20
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class ConversionError(ValueError):
    """A checkpoint that cannot be converted as asked: the message names the file, the key, what was expected and found."""


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies."""

    path: Path
    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """Of its first byte in the file."""

    @property
    def num_bytes(self) -> int:
        """Size on disk."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Tensors of the safetensors file ``path`` by key. ConversionError unless the header fits the file exactly."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                raise ConversionError(
                    f"{path}: not a whole safetensors file: its first 8 bytes announce a header of {length} bytes, the "
                    f"file has {size}; download or copy it again"
                )
            header = parse_json(file.read(length), "header")
    except OSError as error:
        raise ConversionError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        if isinstance(error, ConversionError):
            raise
        raise ConversionError(
            f"{path}: damaged: the safetensors header is not valid JSON ({error}); copy it again"
        ) from error
    if not isinstance(header, dict):
        raise ConversionError(f"{path}: damaged: the safetensors header is a {type(header).__name__}, expected a table")
    infos = [_info(path, key, value, 8 + length) for key, value in header.items() if key != "__metadata__"]
    end = 8 + length
    for info in sorted(infos, key=lambda i: (i.offset, i.num_bytes)):
        if info.offset != end:
            raise ConversionError(
                f"{path}: damaged: {info.key!r} expected at byte {end}, the header says {info.offset}; copy it again"
            )
        end += info.num_bytes
    if end != size:
        raise ConversionError(
            f"{path}: truncated or damaged: the header describes {end} bytes, the file has {size}; copy it again"
        )
    return {info.key: info for info in infos}


def _info(path: Path, key: str, value: Any, start: int) -> TensorInfo:
    try:
        dtype, shape, (first, last) = DTYPES[value["dtype"]], tuple(value["shape"]), value["data_offsets"]
        whole = len(shape) <= MAX_AXES and all(isinstance(n, int) and 0 <= n < 1 << 63 for n in (*shape, first, last))
    except (KeyError, TypeError, ValueError) as error:
        raise ConversionError(
            f"{path}: damaged: the entry of {key!r} is {str(value)[:200]}, expected dtype, shape and data_offsets; copy it again"
        ) from error
    info = TensorInfo(path, key, dtype, shape, start + first) if whole else None
    if info is None or last - first != info.num_bytes:
        raise ConversionError(
            f"{path}: damaged: {key!r} of shape {list(shape[:MAX_AXES])} and type {value['dtype']} does not fill its bytes "
            f"{first}..{last}; copy it again"
        )
    return info


def read_tensor(info: TensorInfo) -> Tensor:
    """The tensor at ``info``, in memory of its own."""
    tensor = torch.empty(info.shape, dtype=info.dtype)
    with info.path.open("rb", buffering=0) as file:
        read_into(file, tensor_bytes(tensor), info.offset, what=f"{info.path}: {info.key!r}")
    return tensor


def read_into(file: Any, buffer: memoryview, offset: int, *, what: str) -> None:
    """Fill ``buffer`` from ``offset`` of the unbuffered ``file``; ConversionError where it ends too early."""
    done = 0
    while done < len(buffer):
        count = os.preadv(file.fileno(), [buffer[done:]], offset + done)
        if count <= 0:
            raise ConversionError(f"{what}: the file ends at byte {offset + done}; copy it again")
        done += count


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, shared with it."""
    assert tensor.is_contiguous()
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


class HashedFile:
    """A file being written, with the SHA-256 of what went into it; large pieces are hashed while they are written.

    It goes past the page cache where the file system can do that: a copy of what will not be read again would push out
    what will, and a cache that is full makes every page of it several times as dear.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._direct = self._set_direct(True)
        self._buffer, self._filled = mmap.mmap(-1, BUFFER_BYTES), 0
        """Whole pages of memory, as the disk wants them."""
        self._digest = hashlib.sha256()
        self._hasher = ThreadPoolExecutor(1)
        self.size = 0

    def write(self, data: Any) -> int:
        """All of ``data``, to the file and into the hash."""
        view = memoryview(data).cast("B")
        if len(view) < PARALLEL_BYTES:
            self._digest.update(view)
            self._fill(view)
        else:
            hashed = self._hasher.submit(self._digest.update, view)
            try:
                self._fill(view)
            finally:
                hashed.result()  # the caller's memory is its own again after this
        self.size += len(view)
        return len(view)

    def flush(self) -> None:
        """For writers that ask; :meth:`finish` is what counts."""

    def finish(self) -> str:
        """Flush to disk, close; the digest."""
        self._direct = self._direct and self._set_direct(False)  # the rest is no whole number of pages
        self._drain()
        os.fsync(self._descriptor)
        self.close()
        return self._digest.hexdigest()

    def close(self) -> None:
        """Close without flushing to disk (after a failure); a file that is closed already stays so."""
        self._hasher.shutdown()
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:  # its number may be another file's by now
            os.close(descriptor)

    def _fill(self, view: memoryview) -> None:
        while view:
            count = min(len(view), BUFFER_BYTES - self._filled)
            self._buffer[self._filled : self._filled + count] = view[:count]
            self._filled += count
            view = view[count:]
            if self._filled == BUFFER_BYTES:
                self._drain()

    def _drain(self) -> None:
        done = 0
        while done < self._filled:
            with memoryview(self._buffer)[done : self._filled] as rest:
                try:
                    done += os.write(self._descriptor, rest)
                except OSError as error:
                    if error.errno != errno.EINVAL or not self._direct:
                        raise
                    self._direct = self._set_direct(False)  # a file system that promised too much
        self._filled = 0

    def _set_direct(self, wanted: bool) -> bool:
        """Whether writes go past the page cache from now on."""
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        try:
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags | os.O_DIRECT if wanted else flags & ~os.O_DIRECT)
        except OSError:
            return False
        return wanted


class SafetensorsWriter:
    """A safetensors file whose tensors arrive one by one, in the announced order."""

    def __init__(self, path: Path, tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for key, dtype, shape in tensors:
            size = math.prod(shape) * dtype.itemsize
            header[key] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._expected: Iterator[tuple[str, torch.dtype, tuple[int, ...]]] = iter(tensors)
        self._file = HashedFile(path)
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, key: str, tensor: Tensor) -> None:
        """The next tensor."""
        assert (key, tensor.dtype, tuple(tensor.shape)) == next(self._expected), key
        self._file.write(tensor_bytes(tensor.contiguous()))

    def finish(self) -> str:
        """Close the complete file; its SHA-256."""
        assert next(self._expected, None) is None, "tensors are missing"
        return self._file.finish()

    def close(self) -> None:
        """Close without completing (after a failure)."""
        self._file.close()
