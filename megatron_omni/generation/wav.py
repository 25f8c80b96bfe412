"""Sound to a file or a pipe while it is made: 16-bit PCM, one channel.

    NAME.pcm    samples alone, little-endian
    others      WAV (RIFF): a header of 44 bytes and the samples

A WAV header says how much follows. Where the end is not known it says as much as fits (players then read to the end of the
stream); a file's is corrected when it is closed, a pipe's stays so.
"""

import struct
import sys
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from torch import Tensor

STANDARD_OUTPUT = "-"
_UNKNOWN = 0xFFFFFFFF
_HEADER_BYTES = 44


def wav_header(sample_rate: int, num_samples: int | None = None) -> bytes:
    """44 bytes; ``num_samples`` None: unknown, or more than a WAV file can say."""
    size = _UNKNOWN if num_samples is None else 2 * num_samples
    if size + _HEADER_BYTES - 8 > _UNKNOWN:
        size = _UNKNOWN
    whole = min(size + _HEADER_BYTES - 8, _UNKNOWN)
    layout = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, sample_rate, 2 * sample_rate, 2, 16)
    return struct.pack("<4sI4s", b"RIFF", whole, b"WAVE") + layout + struct.pack("<4sI", b"data", size)


def pcm16(wave: Tensor) -> bytes:
    """Samples [n] from -1 to 1 as 16-bit integers, louder ones clipped."""
    return (wave.numpy().clip(-1.0, 1.0) * 32767.0).round().astype("<i2").tobytes()


class SoundFile:
    """One sound that is written as it comes. A context; :attr:`num_samples` counts."""

    def __init__(self, target: str | Path, sample_rate: int) -> None:
        """``target``: a path, or ``-`` for the standard output. OSError where it cannot be written."""
        self.num_samples, self._sample_rate = 0, sample_rate
        self._is_ours = str(target) != STANDARD_OUTPUT
        self._file: BinaryIO = open(target, "wb") if self._is_ours else sys.stdout.buffer  # noqa: SIM115
        self._has_header = not str(target).endswith(".pcm")
        if self._has_header:
            self._file.write(wav_header(sample_rate))

    def write(self, wave: Tensor) -> None:
        """Samples [n] float32 that follow; whoever reads can hear them."""
        self.num_samples += len(wave)
        self._file.write(pcm16(wave))
        self._file.flush()

    def close(self) -> None:
        """Say how long it was, where that can be said."""
        if self._has_header and self._is_ours and self._file.seekable():
            self._file.seek(0)
            self._file.write(wav_header(self._sample_rate, self.num_samples))
        self._file.flush()
        if self._is_ours:
            self._file.close()

    def __enter__(self) -> "SoundFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
