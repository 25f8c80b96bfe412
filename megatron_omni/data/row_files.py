"""Arrays on disk that rows name by ``FILE.safetensors#NUMBER``: latents, hidden states, teachers' embeddings.

    values     [n] all arrays, one behind the other, in one type (fp32, fp16 or bf16)
    offsets    [arrays + 1] int64: array i has values[offsets[i] : offsets[i + 1]]
    shapes     [arrays, 3] int64: its shape, 0 behind the last dimension
    metadata   "about": JSON with ``kind`` and ``fingerprint`` of what made it, and what the maker keeps there

(Metadata has one entry, because the library writes several in an order of chance, and the same arrays should be the same
bytes.) Files are read in place: opening one reads offsets and shapes, an array reads its own bytes. Arrays of another model
train without a complaint and teach nonsense, so a file is used only where its fingerprint is the one that is asked for.
"""

import json
import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from megatron_omni.data.descriptors import MOST_OPEN
from megatron_omni.foreign import open_regular, parse_json

Kind = Literal["latents", "hidden", "teachers"]
_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_MOST_DIMENSIONS = 3


class RowFile:
    """An open file of arrays; threads may share it. ValueError for a damaged file or one of another kind."""

    def __init__(self, path: Path, kind: Kind) -> None:
        self.path, self.kind = path, kind
        try:
            open_regular(path).close()  # a pipe would hold the library for ever
            self._file: Any = safe_open(path, framework="pt")
            self.about: Mapping[str, Any] = parse_json((self._file.metadata() or {})["about"], "its metadata")
            if self.about["kind"] != kind:
                raise ValueError(f"it holds {self.about['kind']}")
            self.fingerprint = str(self.about["fingerprint"])
            self._values = self._file.get_slice("values")
            self._offsets, self._shapes = self._file.get_tensor("offsets"), self._file.get_tensor("shapes")
            self._check()
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: no usable file of {kind} ({error}); {_again(kind)}") from error

    def _check(self) -> None:
        offsets, shapes = self._offsets, self._shapes
        (total,) = self._values.get_shape()
        if self._values.get_dtype() not in _TYPES or offsets.dtype != torch.int64 or offsets.ndim != 1:
            raise ValueError(f"values are none of {', '.join(_TYPES)} or offsets no int64")
        if shapes.dtype != torch.int64 or shapes.shape != (len(offsets) - 1, _MOST_DIMENSIONS):
            raise ValueError("shapes do not fit the offsets")
        counts = torch.where(shapes > 0, shapes, 1).prod(1)
        if offsets[0] != 0 or offsets[-1] != total or not torch.equal(offsets.diff(), counts):
            raise ValueError("offsets and shapes do not add up to the values")

    def __len__(self) -> int:
        return len(self._shapes)

    def array(self, number: int) -> Tensor:
        """An array of the file, in its type; ValueError for a number that it does not have."""
        if not 0 <= number < len(self):
            raise ValueError(
                f"{self.path}#{number}: the file holds {len(self)} arrays, from #0 on; {_again(self.kind)}"
            )
        start, stop = self._offsets[number : number + 2].tolist()
        shape = [size for size in self._shapes[number].tolist() if size]
        found: Tensor = self._values[start:stop]
        return found.reshape(shape)


def open_rows(path: str | Path, kind: Kind) -> RowFile:
    """The file, opened once as long as it is the same one; ValueError where there is none that can be used."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise ValueError(f"{path}: no file of {kind} ({error.strerror}); {_again(kind)}") from error
    return _opened(str(path), kind, (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size))


@lru_cache(maxsize=MOST_OPEN)
def _opened(path: str, kind: Kind, identity: tuple[int, ...]) -> RowFile:
    return RowFile(Path(path), kind)


def write_rows(
    path: Path, arrays: Sequence[Tensor], *, kind: Kind, fingerprint: str, about: Mapping[str, Any] | None = None
) -> None:
    """Put ``arrays``, of one type and one to three dimensions each, into ``path``, whole or not at all."""
    types = {array.dtype for array in arrays} or {torch.float32}
    assert len(types) == 1 and types <= set(_TYPES.values()), f"arrays of types {types}"
    assert all(1 <= array.ndim <= _MOST_DIMENSIONS and array.numel() for array in arrays), "an empty array"
    shapes = [[*array.shape, *[0] * (_MOST_DIMENSIONS - array.ndim)] for array in arrays]
    values = [array.detach().cpu().reshape(-1) for array in arrays]
    tensors = {
        "values": torch.cat(values) if values else torch.zeros(0),
        "offsets": torch.tensor(np.cumsum([0, *map(len, values)]), dtype=torch.int64),
        "shapes": torch.tensor(shapes, dtype=torch.int64).reshape(-1, _MOST_DIMENSIONS),
    }
    metadata = {"about": json.dumps({**(about or {}), "kind": kind, "fingerprint": fingerprint}, sort_keys=True)}
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:  # the library's own file could be read by its owner alone
            file.write(save(tensors, metadata=metadata))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _again(kind: Kind) -> str:
    return "write it again" if kind == "teachers" else f"run megatron-omni prepare --{kind} again"
