"""Foreign checkpoints to read from: a Hugging Face directory of safetensors or ``.bin`` files, one file, or drawn values.

A source lists its tensors from headers alone and reads one at a time. Files may only lie in the directory itself (an
index that names ``../x`` is refused; links are followed, as model caches use them). ``.bin`` and ``.pt`` files are read
through the restricted reader of ``untrusted.py``.
"""

import hashlib
import os
import re
import threading
import zipfile
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_omni import foreign
from megatron_omni.checkpoint.tensor_files import ConversionError, TensorInfo, read_header, read_tensor
from megatron_omni.checkpoint.untrusted import PICKLE_SUFFIXES, read_torch_file

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
COUNTS = frozenset(
    {"num_hidden_layers", "encoder_layers", "decoder_layers", "mlp_dynamic_expert_num", "mlp_fixed_expert_num"}
)
"""Fields of a configuration that say how often a tensor is there."""
CHUNK_BYTES, LEAD_BYTES, KEPT_BYTES = 4 << 20, 256 << 20, 512 << 20


class Source(Protocol):
    """What the converter asks of a place that holds tensors."""

    label: str
    """For messages: where the tensors come from."""

    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor by key; ``path`` of an info is the file to name in messages."""
        ...

    def read(self, key: str) -> Tensor:
        """One tensor, in memory of its own."""
        ...

    def files(self) -> list[Path]:
        """Files whose hashes belong into the ledger."""
        ...


class HuggingFaceSource:
    """A directory with ``config.json`` and weights, or a single weights file."""

    def __init__(self, path: Path) -> None:
        path = path.absolute()  # the ledger keeps it, and is read from elsewhere
        self.path, self.label = path, str(path)
        if not path.exists():
            raise ConversionError(f"{path}: does not exist; give a Hugging Face directory or a weights file")
        self._tensors: dict[str, Tensor] = {}
        self._infos: dict[str, TensorInfo] = {}
        self._weights = [path] if path.is_file() else _weight_files(path)
        for file in self._weights:
            for key, info in self._read_infos(file).items():
                if key in self._infos:
                    raise ConversionError(f"{file}: {key!r} is in {self._infos[key].path.name} too; expected once")
                self._infos[key] = info
        if path.is_dir():
            self._check_index(path)

    def config(self) -> dict[str, Any]:
        """``config.json``. ConversionError where it counts more layers or experts than there are tensors.

        Rows are made for each of them before any is looked for, so a number alone could keep a conversion busy for ever.
        """
        file = self.path / "config.json"
        config = read_json(file)
        for table in (config, *(value for value in config.values() if isinstance(value, dict))):
            for name in COUNTS & table.keys():
                if isinstance(table[name], int | float) and table[name] > len(self._infos):
                    raise ConversionError(
                        f"{file}: {name}: {table[name]} of them do not fit {self.path}, whose files hold "
                        f"{len(self._infos)} tensors; copy the files again"
                    )
        return config

    def infos(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def read(self, key: str) -> Tensor:
        if key in self._tensors:
            return self._tensors[key].clone()
        info = self._infos[key]
        # Mapped anew for each tensor: a mapping that stays counts what was read of it as resident.
        return read_torch_file(info.path)[key].clone() if info.path.suffix in PICKLE_SUFFIXES else read_tensor(info)

    def files(self) -> list[Path]:
        extra = [self.path / "config.json"] if self.path.is_dir() else []
        return [*(file for file in extra if file.is_file()), *self._weights]

    def _read_infos(self, file: Path) -> dict[str, TensorInfo]:
        if file.suffix not in PICKLE_SUFFIXES:
            return read_header(file)
        try:
            tensors = read_torch_file(file)
        except ValueError as error:
            raise ConversionError(str(error)) from error
        if not zipfile.is_zipfile(file):  # the format before torch 1.6 cannot be mapped: read once and held
            self._tensors |= tensors
        return {key: TensorInfo(file, key, t.dtype, tuple(t.shape), 0) for key, t in tensors.items()}

    def _check_index(self, path: Path) -> None:
        """The index and the files must agree on what lies where."""
        index = next((path / name for name in INDEXES if (path / name).is_file()), None)
        if index is None:
            return
        for key, name in read_json(index)["weight_map"].items():
            found = self._infos.get(key)
            if found is None or found.path.name != name:
                where = "nowhere" if found is None else f"in {found.path.name}"
                raise ConversionError(f"{index}: expected {key!r} in {name}, found it {where}; copy the files again")
        extra = [key for key in self._infos if key not in read_json(index)["weight_map"]]
        if extra:
            raise ConversionError(f"{self._infos[extra[0]].path}: {extra[0]!r} is not in {index.name}; copy it again")


class ValuesSource:
    """Tensors that are in memory already (drawn weights)."""

    def __init__(self, label: str, tensors: dict[str, Tensor]) -> None:
        self.label, self._tensors = label, tensors

    def infos(self) -> Mapping[str, TensorInfo]:
        path = Path(self.label)
        return {key: TensorInfo(path, key, t.dtype, tuple(t.shape), 0) for key, t in self._tensors.items()}

    def read(self, key: str) -> Tensor:
        return self._tensors[key].clone()

    def files(self) -> list[Path]:
        return []


class Digests:
    """SHA-256 of files, computed by a thread while the main one converts.

    A converter reads the files of a directory in their order, several directories side by side, and the rank files of
    a checkpoint of ours too. So does this thread, and not much further than the converter, so that what one of the two
    has read is still in the page cache for the other. What lies behind both is dropped from there: a full cache makes
    every further page several times as dear.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._lanes: dict[Path, list[Path]] = {}
        for file in dict.fromkeys(files):
            self._lanes.setdefault(file if file.suffix == ".distcp" else file.parent, []).append(file)
        self._digests: dict[Path, str] = {}
        self._error: OSError | None = None
        self._stop = threading.Event()
        self._moved = threading.Condition()
        self._share = 0.0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def follow(self, share: float) -> None:
        """The converter has read this ``share`` (0 .. 1) of what it will."""
        with self._moved:
            self._share = max(self._share, share)
            self._moved.notify()

    def result(self) -> dict[Path, str]:
        """Digest of every file; waits for the rest."""
        self.follow(1.0)
        self._thread.join()
        if self._error is not None:
            raise ConversionError(f"{self._error.filename}: cannot be read: {self._error.strerror}") from self._error
        return self._digests

    def stop(self) -> None:
        """Give up (after a failure)."""
        self._stop.set()
        self.follow(1.0)
        self._thread.join()

    def _run(self) -> None:
        try:
            lanes = [_Lane(files, self._digests) for files in self._lanes.values()]
            total, hashed = max(1, sum(lane.total for lane in lanes)), 0
            for lane in lanes:
                lane.kept_bytes = KEPT_BYTES * lane.total // total
            while lanes and not self._stop.is_set():
                with self._moved:
                    while hashed > self._share * total + LEAD_BYTES and self._share < 1.0:
                        self._moved.wait()
                lane = min(lanes, key=lambda lane: lane.done / lane.total)
                count = next(lane.chunks, 0)
                hashed += count
                if count == 0:
                    lanes.remove(lane)
        except OSError as error:
            self._error = error


class _Lane:
    """Files that are hashed one after the other, a chunk at a time."""

    def __init__(self, files: Sequence[Path], digests: dict[Path, str]) -> None:
        self._files, self._digests = files, digests
        self.done, self.total = 0, max(1, sum(path.stat().st_size for path in files))
        self.kept_bytes = KEPT_BYTES
        """What stays in the page cache behind the last chunk."""
        self.chunks = self._chunks()

    def _chunks(self) -> Iterator[int]:
        """The bytes of each chunk, when it is hashed."""
        buffer, cached = bytearray(CHUNK_BYTES), deque[tuple[Path, int, int]]()
        dropped = 0
        for path in self._files:
            digest, start = hashlib.sha256(), 0
            with path.open("rb", buffering=0) as file:
                while count := file.readinto(buffer):
                    digest.update(memoryview(buffer)[:count])
                    self.done += count
                    cached.append((path, start, count))
                    start += count
                    while self.done - dropped > self.kept_bytes:
                        dropped += _drop_cached(*cached.popleft())
                    yield count
            self._digests[path] = digest.hexdigest()


def _drop_cached(path: Path, start: int, count: int) -> int:
    """Drop a piece of a file from the page cache; its bytes."""
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), start, count, os.POSIX_FADV_DONTNEED)
    return count


def read_json(path: Path) -> dict[str, Any]:
    """A JSON table; ConversionError names the file."""
    try:
        value = foreign.read_json(path)
    except foreign.ForeignError as error:
        raise ConversionError(str(error)) from error
    if not isinstance(value, dict):
        raise ConversionError(f"{path}: expected a JSON table, found a {type(value).__name__}")
    return value


def _weight_files(directory: Path) -> list[Path]:
    """The files that an index names, else the single file."""
    for name in INDEXES:
        if (index := directory / name).is_file():
            names = read_json(index).get("weight_map")
            if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
                raise ConversionError(f"{index}: weight_map: expected a table of key to file name")
            return [_member(directory, index, str(name)) for name in sorted(set(names.values()))]
    for name in SINGLE_FILES:
        if (directory / name).is_file():
            return [directory / name]
    if shards := sorted(file.name for file in directory.iterdir() if re.search(r"-\d+-of-\d+\.\w+$", file.name)):
        wanted = INDEXES[1] if shards[0].endswith(".bin") else INDEXES[0]
        raise ConversionError(
            f"{directory}: holds {len(shards)} shards ({shards[0]}, ...) and no index, so nothing says whether all are there; "
            f"copy {wanted} from where they come from"
        )
    raise ConversionError(
        f"{directory}: expected {' or '.join((*INDEXES, *SINGLE_FILES))}, found none; give a Hugging Face directory"
    )


def _member(directory: Path, index: Path, name: str) -> Path:
    if Path(name).name != name or name in ("", ".", ".."):
        raise ConversionError(f"{index}: names the file {name!r}; expected a plain file name inside the directory")
    if not (directory / name).is_file():
        raise ConversionError(f"{index}: expected the shard {name}, found no such file in {directory}; copy it there")
    return directory / name


def check_finite(tensor: Tensor, info: TensorInfo) -> None:
    """ConversionError when a floating tensor holds NaN or infinity."""
    if not tensor.is_floating_point() or tensor.numel() == 0 or tensor.dtype.itemsize == 1:
        return
    low, high = torch.aminmax(tensor)
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        bad = (~torch.isfinite(tensor)).flatten().nonzero()
        raise ConversionError(
            f"{info.path}: {info.key!r}: expected finite weights, found {len(bad)} NaN or infinite values, the first at "
            f"element {int(bad[0])}; take the checkpoint from a step before it diverged"
        )
