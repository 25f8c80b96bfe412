"""Codes of recordings on disk: ``NAME.codes.safetensors``, made once by ``megatron-omni prepare --codes``.

    codes      [n] uint16: the codes of all recordings, one behind the other
    offsets    [recordings + 1] int64: recording i has codes[offsets[i] : offsets[i + 1]]
    metadata   "about": JSON with the codec's fingerprint (SHA-256), num_codes, codes_per_second, and what the maker keeps there

(One entry, because the library writes several in an order of chance, and the same codes should be the same bytes.)

A record names a recording by ``NAME.codes.safetensors#i``. Files are read in place: opening one reads the offsets, a piece
of a recording reads its own bytes. Codes of another codec sound like noise and train without a complaint, so a file is
used only where its fingerprint is that of ``model.speech.codec``.
"""

import json
import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from megatron_omni.config.generators import SpeechConfig
from megatron_omni.data.descriptors import MOST_OPEN
from megatron_omni.data.errors import RecipeError
from megatron_omni.data.spoken import CodesAt, Speech
from megatron_omni.foreign import open_regular, parse_json, read_json

SUFFIX = ".codes.safetensors"
MOST_CODES = 1 << 16
"""Entries of a codebook whose codes are two bytes each."""
_AGAIN = "run megatron-omni prepare --codes again"


class CodesFile:
    """An open file of codes; threads may share it. ValueError for a damaged file or one of another kind."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            open_regular(path).close()  # a pipe would hold the library for ever
            self._file: Any = safe_open(path, framework="numpy")
            self.about: Mapping[str, Any] = parse_json((self._file.metadata() or {})["about"], "its metadata")
            self.fingerprint = str(self.about["fingerprint"])
            self.num_codes = int(self.about["num_codes"])
            self.codes_per_second = float(self.about["codes_per_second"])
            self._codes, self._offsets = self._file.get_slice("codes"), self._file.get_tensor("offsets")
            self._check_offsets()
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: no usable file of codes ({error}); {_AGAIN}") from error

    def _check_offsets(self) -> None:
        offsets, (total,) = self._offsets, self._codes.get_shape()
        if offsets.dtype != np.int64 or offsets.ndim != 1 or not len(offsets) or self._codes.get_dtype() != "U16":
            raise ValueError("codes are no uint16 or offsets no int64")
        if offsets[0] != 0 or offsets[-1] != total or (np.diff(offsets) < 0).any():
            raise ValueError("offsets do not add up to the codes")

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def length(self, number: int) -> int:
        """Codes of a recording; ValueError for a number that the file does not have."""
        if not 0 <= number < len(self):
            raise ValueError(f"{self.path}#{number}: the file holds {len(self)} recordings, from #0 on; {_AGAIN}")
        return int(self._offsets[number + 1] - self._offsets[number])

    def codes(self, number: int, start: int = 0, stop: int | None = None) -> NDArray[np.uint16]:
        """[stop - start] codes of a recording; ValueError for a range that leaves it."""
        total = self.length(number)
        stop = total if stop is None else stop
        if not 0 <= start <= stop <= total:
            raise ValueError(f"{self.path}#{number}: codes {start} to {stop} of a recording that has {total}; {_AGAIN}")
        first = int(self._offsets[number])
        found: NDArray[np.uint16] = self._codes[first + start : first + stop]
        return found


def open_codes(path: str | Path) -> CodesFile:
    """The file, opened once as long as it is the same one."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise ValueError(f"{path}: no file of codes ({error.strerror}); {_AGAIN}") from error
    return _opened(str(path), (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size))


@lru_cache(maxsize=MOST_OPEN)
def _opened(path: str, identity: tuple[int, ...]) -> CodesFile:
    return CodesFile(Path(path))


def write_codes(
    path: Path,
    recordings: Sequence[Sequence[int] | NDArray[Any]],
    *,
    fingerprint: str,
    num_codes: int,
    codes_per_second: float,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Put the codes of ``recordings`` into ``path``, whole or not at all. ValueError for a codebook above 65536 entries."""
    if num_codes > MOST_CODES:
        raise ValueError(
            f"{path}: a codebook of {num_codes} entries; files of codes hold two bytes a code, at most {MOST_CODES}"
        )
    arrays = [np.asarray(codes, dtype=np.int64) for codes in recordings]
    flat = np.concatenate([np.zeros(0, np.int64), *arrays])
    assert not len(flat) or (flat.min() >= 0 and flat.max() < num_codes), f"codes outside of 0 .. {num_codes - 1}"
    offsets = np.cumsum([0, *map(len, arrays)], dtype=np.int64)
    known = {
        "fingerprint": fingerprint,
        "num_codes": num_codes,
        "codes_per_second": float(codes_per_second),
    }
    metadata = {"about": json.dumps({**(about or {}), **known}, sort_keys=True)}
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:  # the library's own file could be read by its owner alone
            file.write(save({"codes": flat.astype(np.uint16), "offsets": offsets}, metadata=metadata))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------ of a spoken answer


def code_range(speech: Speech) -> range:
    """Places of an answer's codes in its recording; ValueError where there are none, or they cannot be read."""
    if speech.codes is None:
        raise ValueError(f"speech has no codes; {_AGAIN.removesuffix(' again')}")
    at = speech.codes
    total = open_codes(at.file).length(at.number) if isinstance(at, CodesAt) else len(at)
    stop = total if speech.stop is None else speech.stop
    if not speech.start < stop <= total:
        raise ValueError(f"speech is codes {speech.start} to {stop} of a recording that has {total}; {_AGAIN}")
    return range(speech.start, stop)


def codes_between(speech: Speech, start: int, stop: int) -> Sequence[int]:
    """Codes ``start`` to ``stop`` of the recording of an answer that has some."""
    if isinstance(speech.codes, CodesAt):
        return open_codes(speech.codes.file).codes(speech.codes.number, start, stop).tolist()
    assert speech.codes is not None
    return speech.codes[start:stop]


class CodecOf:
    """The codec that a recipe's codes must be of: that of ``model.speech.codec``, without one that of ``codec_fingerprint``
    (which a checkpoint knows), without both any with the recipe's numbers.
    """

    def __init__(self, config: SpeechConfig) -> None:
        self.config = config
        # A checkpoint knows the fingerprint, and its codec may lie elsewhere by now; training compares the two (setup.py).
        self.fingerprint = config.codec_fingerprint
        if self.fingerprint is None and config.codec is not None:
            self.fingerprint = codec_fingerprint(config.codec)
        self._known: set[tuple[str, int, float]] = set()

    def check(self, speech: Speech) -> None:
        """RecipeError, which names both, for codes of another codec; lists of codes in a row do not say whose they are."""
        if not isinstance(speech.codes, CodesAt):
            return
        file = open_codes(speech.codes.file)
        key = (file.fingerprint, file.num_codes, file.codes_per_second)
        if key not in self._known:
            self._compare(file)
            self._known.add(key)

    def _compare(self, file: CodesFile) -> None:
        if self.fingerprint not in (None, file.fingerprint):
            of = (
                f"model.speech.codec = {self.config.codec!r} has"
                if self.config.codec
                else "this model learned codes of"
            )
            raise RecipeError(
                f"{file.path}: codes of the codec with fingerprint {file.fingerprint[:12]}, and {of} "
                f"{str(self.fingerprint)[:12]}; extract the codes with this codec (megatron-omni prepare --codes), or name "
                "the codec that they are of"
            )
        for name in ("num_codes", "codes_per_second"):
            found, wanted = getattr(file, name), getattr(self.config, name)
            if found != wanted:
                raise RecipeError(
                    f"{file.path}: {name} = {found:g} of its codec, and model.speech.{name} = {wanted:g}; set it to that"
                )


def codec_fingerprint(folder: str | Path) -> str:
    """Of the codec in a folder, as its ``codec.json`` names it; ValueError for a folder without one."""
    path = Path(folder) / "codec.json"
    if not path.is_file():
        raise ValueError(f"model.speech.codec = {str(folder)!r}: no codec.json there; name the folder of a codec")
    document = read_json(path)
    found = document.get("fingerprint") if isinstance(document, dict) else None
    if not isinstance(found, str):
        raise ValueError(f"{path}: names no fingerprint; copy the codec's folder again")
    return found
