"""Thousands of shards with few descriptors: maps that hold none, and files of which only some stay open.

A process may usually hold 1024 descriptors (``ulimit -n``), and sources of thousands of shards are common.
"""

import ctypes
import mmap
import os
import resource
import weakref
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_omni.foreign import open_regular

MOST_OPEN = 128
"""Data files that stay open; the one that was not read for longest is closed first."""
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_longlong]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_FAILED = ctypes.c_void_p(-1).value


def mapped(path: Path) -> NDArray[np.uint8]:
    """[bytes] of a file, read-only, through a memory map that ends with the last view of it.

    Python's own ``mmap`` keeps a duplicate of the descriptor as long as the map lives; the system needs none.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if not size:
            return np.zeros(0, np.uint8)
        address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
    if address == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, f"{os.strerror(number)} (mapping {size} bytes)", str(path))
    contents = np.frombuffer((ctypes.c_ubyte * size).from_address(address), np.uint8)
    contents.flags.writeable = False
    # Not at exit: threads may still read then, and the map ends with the process.
    weakref.finalize(contents, _libc.munmap, address, size).atexit = False
    return contents


class DataFile:
    """A file that is read at places by several threads. It holds no descriptor of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with open_regular(path) as file:
            self._identity = _identity(file.fileno())

    def read_at(self, start: int, num_bytes: int) -> bytes:
        """These bytes, fewer behind the end of the file; ForeignError, or OSError, where it is not there any more."""
        file = _opened(str(self.path), self._identity)  # as long as this holds it, nobody closes it
        return os.pread(file.number, num_bytes, start)  # no shared file position: safe from several threads


class _Open:
    def __init__(self, path: str, identity: tuple[int, int]) -> None:
        self._file = open_regular(path)
        self.number = self._file.fileno()
        if _identity(self.number) != identity:
            raise OSError(f"{path}: another file has taken its place since the run began")

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()


_opened = lru_cache(maxsize=MOST_OPEN)(_Open)


def _identity(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


def raise_limit() -> None:
    """Allow this process as many descriptors as it may allow itself: sockets, checkpoints and media need some too."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
