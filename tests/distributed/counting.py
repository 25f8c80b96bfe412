"""What a rank asks of others and of the file system, counted: store operations, collectives, files; by phase and by whose it is.

    counts = Counts()
    store = CountedStore(rank.store, counts)              # counts what C++ asks of it, too
    with counts.watching(root):                           # collectives of this thread; files below root, for good
        counts.phase = "start"
        ...
    counts.plain()                                        # {phase: {"owner kind name": [calls, bytes]}}

A collective belongs to the innermost package on the stack that is not torch; a store operation to the innermost one, torch
included: what ``init_process_group`` exchanges is torch's. ``poll`` are questions whether a key is there, repeated while a
rank waits, ``beat`` signs of life and warnings of a slow save: their number depends on time, so they stand apart. Bytes of a
collective are those of the tensors that this rank has after it, of a store operation the value's.
"""

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

OURS, MEGATRON, TORCH = "ours", "megatron", "torch"
COLLECTIVES = {"allreduce_": "all_reduce", "broadcast_": "broadcast", "allgather_": "all_gather",
               "_allgather_base_": "all_gather", "_reduce_scatter_base_": "reduce_scatter", "alltoall_base_": "all_to_all",
               "gather_": "gather", "scatter_": "scatter"}  # fmt: skip


def owner(*, skip_torch: bool) -> str:
    """Whose code the caller's caller is."""
    frame = sys._getframe(2)
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if name.startswith("megatron_omni."):
            return OURS
        if name.startswith("megatron."):
            return MEGATRON
        if name.startswith("torch.") and not skip_torch:
            return TORCH
        frame = frame.f_back  # type: ignore[assignment]
    return "test"


class Counts:
    """Calls and bytes by (phase, owner, kind, name)."""

    def __init__(self) -> None:
        self.phase = ""
        self.calls: Counter[tuple[str, str]] = Counter()
        self.bytes: Counter[tuple[str, str]] = Counter()
        self.files: dict[str, set[str]] = {}
        """Files that were opened, by phase."""
        self._off = False

    def add(self, what: str, num_bytes: int = 0) -> None:
        self.calls[self.phase, what] += 1
        self.bytes[self.phase, what] += num_bytes

    def plain(self) -> dict[str, dict[str, list[int]]]:
        """{phase: {what: [calls, bytes]}}, with the number of files opened."""
        found: dict[str, dict[str, list[int]]] = {}
        for (phase, what), number in sorted(self.calls.items()):
            found.setdefault(phase, {})[what] = [number, self.bytes[phase, what]]
        for phase, paths in self.files.items():
            found.setdefault(phase, {})["files opened"] = [len(paths), 0]
        return found

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Count what happens inside as ``phase``."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    @contextmanager
    def watching(self, root: Path) -> Iterator[None]:
        """Count the collectives of this thread, and what this process does with files below ``root``."""
        _watch_files(self, str(root))
        with _CountedCollectives(self):
            yield
        self._off = True

    def file(self, kind: str, path: Any, root: str) -> None:
        if self._off or not isinstance(path, str | os.PathLike) or not os.fspath(path).startswith(root):
            return
        self.add(f"file {kind}")
        if kind == "open":
            self.files.setdefault(self.phase, set()).add(os.fspath(path))


class _CountedCollectives(TorchDispatchMode):
    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self._counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__
            tensors = [leaf for leaf in tree_leaves(args[0]) if isinstance(leaf, torch.Tensor)]
            size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            self._counts.add(f"{owner(skip_torch=True)} collective {COLLECTIVES.get(name, name)}", size)
        return func(*args, **(kwargs or {}))


def _watch_files(counts: Counts, root: str) -> None:
    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            counts.file("open", arguments[0], root)
        elif event in ("os.listdir", "os.scandir"):
            counts.file("list", arguments[0], root)

    sys.addaudithook(hook)  # stays: these processes end with the count
    for name in ("stat", "lstat"):
        setattr(os, name, _counted(getattr(os, name), lambda path: counts.file("stat", path, root)))


def _counted(function: Callable[..., Any], note: Callable[[Any], None]) -> Callable[..., Any]:
    def wrapped(path: Any, *args: Any, **settings: Any) -> Any:
        note(path)
        return function(path, *args, **settings)

    return wrapped


class CountedStore(dist.Store):
    """``inner``, with every operation counted, also those of torch's C++ code."""

    def __init__(self, inner: dist.Store, counts: Counts) -> None:
        super().__init__()
        self._inner, self._counts = inner, counts
        self._clones: list[CountedStore] = []  # C++ keeps only its half of a clone alive

    def _add(self, name: str, key: str = "", value: Any = b"") -> None:
        name = "beat" if "beat/" in key or "slow_save/" in key else name
        self._counts.add(f"{owner(skip_torch=False)} store {name}", len(value))

    def set(self, key: str, value: Any) -> None:
        self._add("set", key, value)
        self._inner.set(key, value)

    def get(self, key: str) -> bytes:
        value = self._inner.get(key)
        self._add("get", key, value)
        return value

    def add(self, key: str, value: int) -> int:
        self._add("add", key)
        return self._inner.add(key, value)

    def check(self, keys: list[str]) -> bool:
        self._add("poll")
        return self._inner.check(keys)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        self._add("wait")
        if timeout is None:
            self._inner.wait(keys)
        else:
            self._inner.wait(keys, timeout)

    def compare_set(self, key: str, expected_value: str, desired_value: str) -> bytes:
        self._add("set")
        return self._inner.compare_set(key, expected_value, desired_value)

    def delete_key(self, key: str) -> bool:
        self._add("set")
        return self._inner.delete_key(key)

    def num_keys(self) -> int:
        return self._inner.num_keys()

    def set_timeout(self, timeout: timedelta) -> None:
        self._inner.set_timeout(timeout)

    @property
    def timeout(self) -> timedelta:
        return self._inner.timeout  # type: ignore[attr-defined,no-any-return]

    def clone(self) -> "CountedStore":
        self._clones.append(CountedStore(self._inner.clone(), self._counts))  # type: ignore[attr-defined]
        return self._clones[-1]
