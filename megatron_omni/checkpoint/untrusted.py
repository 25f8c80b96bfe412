"""Reading pickles without running what they say: our distributed checkpoints and other people's ``.bin`` / ``.pt`` files.

A pickle is a program: a checkpoint from elsewhere can run any code in the process that loads it, and a manifest of
plain hashes does not stop that. torch reads ``.metadata`` of a distributed checkpoint with ``pickle.load`` and its byte
entries (RNG and optimizer scalars, the common state) with ``weights_only=False``. Here:

* ``.metadata`` goes through an unpickler that knows a fixed list of names: the classes that torch's and Megatron's
  writers put there, data holders all of them. Any other name is refused before anything is called. Storage entries must
  name files inside the checkpoint.
* byte entries, ``.bin`` and ``.pt`` are read with ``weights_only=True``: tensors and plain values.

:func:`install` puts both in the place of torch's readers, for the whole process and for good, so that no path to a load
can miss them; ``checkpoint/distributed.py`` calls it when it is imported.
"""

import io
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

from megatron_omni.checkpoint.commit import CheckpointError

_DTYPES = frozenset(
    f"{kind}{bits}"
    for kind, sizes in (("float", (16, 32, 64)), ("int", (8, 16, 32, 64)), ("uint", (8, 16, 32, 64)))
    for bits in sizes
) | {"bfloat16", "bool", "float8_e4m3fn", "float8_e5m2", "complex64", "complex128"}
ALLOWED: frozenset[tuple[str, str]] = frozenset(
    {("torch", name) for name in _DTYPES}
    | {("torch", "Size"), ("torch", "device"), ("torch.serialization", "_get_layout")}
    | {("collections", "OrderedDict"), ("pathlib", "PosixPath"), ("pathlib._local", "PosixPath")}
    | {("torch.distributed.checkpoint.filesystem", "_StorageInfo")}
    | {
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    }
    | {
        ("torch.distributed.checkpoint.planner", name)
        for name in ("BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")
    }
)
"""Names that ``.metadata`` may use, as (module, name)."""

PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth"})


class _RestrictedUnpickler(pickle.Unpickler):
    """Knows the names in :data:`ALLOWED` and no other."""

    def __init__(self, file: Any, path: Path) -> None:
        super().__init__(file)
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise CheckpointError(
                f"{self.path}: refused: its pickle asks for {module}.{name}, which checkpoint metadata has no use for; "
                "the file is damaged or was made to run code. Take the checkpoint from its source again"
            )
        return super().find_class(module, name)


def read_metadata(path: Path) -> Metadata:
    """The ``.metadata`` file ``path`` of a distributed checkpoint.

    CheckpointError for a name outside :data:`ALLOWED`, a file that is no such metadata, or one that names a file outside
    its directory.
    """
    try:
        with path.open("rb") as file:
            metadata = _RestrictedUnpickler(file, path).load()
    except CheckpointError:
        raise
    except Exception as error:  # a broken pickle fails in as many ways as there are opcodes
        raise CheckpointError(
            f"{path}: not readable as checkpoint metadata ({type(error).__name__}: {error})"
        ) from error
    if not isinstance(metadata, Metadata):
        raise CheckpointError(f"{path}: holds a {type(metadata).__name__}, expected checkpoint metadata")
    for info in (metadata.storage_data or {}).values():
        inside = PurePosixPath(str(info.relative_path))
        if inside.is_absolute() or ".." in inside.parts:
            raise CheckpointError(f"{path}: refused: names the file {str(inside)!r} outside the checkpoint")
    return metadata


def read_torch_file(path: Path) -> dict[str, Tensor]:
    """Tensors of a ``.bin`` / ``.pt`` state dict by key, mapped from disk where the format allows it.

    ``{"module": state}`` and ``{"state_dict": state}`` wrappers are opened. ValueError for anything but tensors and for a
    pickle that asks for code.
    """
    try:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            state = torch.load(path, map_location="cpu", weights_only=True)  # the format before torch 1.6
    except pickle.UnpicklingError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{path}: refused: not a file of plain tensors ({reason}); pickles are read with weights_only=True alone. "
            "Convert it to safetensors where it comes from"
        ) from error
    except Exception as error:  # a damaged file fails in as many ways as zip and pickle have parts
        raise ValueError(f"{path}: not readable as a torch file ({type(error).__name__}: {error})") from error
    for wrapper in ("module", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict):
        raise ValueError(f"{path}: holds a {type(state).__name__}, expected tensors by name")
    for key, value in state.items():
        if not (isinstance(key, str) and isinstance(value, Tensor)):
            raise ValueError(f"{path}: {key!r} is a {type(value).__name__}, expected a tensor")
    return dict(state)


_known: dict[Path, Metadata] = {}


@contextmanager
def known(path: Path, metadata: Metadata) -> Iterator[None]:
    """Inside the block torch's readers take ``metadata`` for what is in the file ``path``, which was read already."""
    _known[path] = metadata
    try:
        yield
    finally:
        del _known[path]


def install() -> None:
    """Make torch's distributed checkpoint readers restricted, in this process from now on. Safe to call again."""
    FileSystemReader.read_metadata = _reader_metadata  # type: ignore[method-assign]
    DefaultLoadPlanner.load_bytes = _load_bytes  # type: ignore[method-assign]


def _reader_metadata(self: FileSystemReader, *args: Any, **kwargs: Any) -> Metadata:
    """Torch's ``FileSystemReader.read_metadata``, through the restricted unpickler."""
    path = Path(os.fspath(self._get_metadata_path(kwargs.get("rank"))))
    metadata = _known[path] if path in _known else read_metadata(path)
    if getattr(metadata, "storage_meta", None) is None:
        metadata.storage_meta = StorageMeta()
    assert metadata.storage_meta is not None
    metadata.storage_meta.load_id = self.load_id
    return metadata


def _load_bytes(self: DefaultLoadPlanner, read_item: ReadItem, value: io.BytesIO) -> None:
    """Torch's ``DefaultLoadPlanner.load_bytes`` with ``weights_only=True``."""
    name = read_item.dest_index.fqn
    try:
        loaded = torch.load(value, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"checkpoint entry {name!r}: refused: not plain values ({reason})") from error
    if self.flatten_state_dict:
        set_element(self.original_state_dict, self.mappings[name], loaded)
    else:
        self.state_dict[name] = loaded
