"""What every decoder takes and gives: a media file by path or as bytes, frames and sound, one error, and the limits.

Media        a path, or MediaBytes(name, data): a member of a tar that was read already
open_media   the one place that opens a media file: what it is follows from its bytes, never from its name
Video        sampled frames with their true times, and the sound that goes with them
MediaError   whatever is wrong with a file (missing, cut off, wrong bytes, no such stream, absurd size), named
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from megatron_omni.config.data import FrameChoice
from megatron_omni.foreign import ForeignError, is_exhausted, open_regular
from megatron_omni.positions import frame_count

MAX_PIXELS = 64_000_000
"""Largest picture or frame that is decoded: 192 MB as RGB."""
MAX_AUDIO_SECONDS = 4 * 3600.0
"""Longest sound that is decoded when the caller sets no limit."""
RATES = (1_000, 768_000)
"""Hz of sound that is decoded; the resampling filter grows with the rate."""
_SHOWN_NAME = 300
"""Characters of a file's name in a message: a data: URI is a whole picture."""
_URL = re.compile(r"(?:^|/)(?:([A-Za-z][A-Za-z0-9+.-]+):/|(data):)")
_ADDRESS = re.compile(r"<[^<>]* at 0x[0-9a-fA-F]+>")
"""An object as Python shows it: its address is another one in every process."""


@dataclass(frozen=True)
class MediaBytes:
    """A media file that is in memory; ``name`` is what messages call it."""

    name: str
    data: bytes

    def __str__(self) -> str:
        return self.name


Media = str | Path | MediaBytes
Frame = NDArray[np.uint8]
"""[height, width, 3] RGB."""


class MediaError(ValueError):
    """A media file that cannot be used; the message names the file and the cause."""

    def __init__(self, file: Media, cause: object, *, reason: str = "unreadable_media") -> None:
        name = str(file)
        shown = name if len(name) <= _SHOWN_NAME else name[:_SHOWN_NAME] + "..."
        super().__init__(f"media file {shown!r}: {cause}")
        self.file, self.reason = shown, reason


def open_media(file: Media) -> BinaryIO:
    """The bytes of a media file; MediaError for what is no regular file (a pipe would hold the reader for ever)."""
    if isinstance(file, MediaBytes):
        return io.BytesIO(file.data)
    try:
        return open_regular(file)
    except ForeignError as error:
        cause = error.__cause__
        if is_exhausted(error):
            raise
        if isinstance(cause, OSError):
            if url := _URL.search(str(file)):
                raise MediaError(file, _not_a_file(url[1] or url[2]), reason="missing_media") from error
            if isinstance(cause, FileNotFoundError):
                raise MediaError(file, "no such file", reason="missing_media") from error
        raise MediaError(file, error.problem) from error


def _not_a_file(scheme: str) -> str:
    if scheme == "data":
        return "is a data: URI; media are read from files: write its bytes into one"
    return f"is a URL ({scheme}://...); media are read from files: download it"


@contextmanager
def named(file: Media) -> Iterator[None]:
    """Turn whatever a decoding library raises into a MediaError of this file.

    ``Exception`` on purpose: damaged bytes make these libraries raise anything, IndexError and SyntaxError included.
    """
    try:
        yield
    except MediaError:
        raise
    except Exception as error:
        if is_exhausted(error):  # no reason to skip the file
            raise
        said = getattr(error, "strerror", None) or str(error)
        raise MediaError(file, f"{type(error).__name__}: {_ADDRESS.sub('the file', said)}") from error


@dataclass(frozen=True, kw_only=True)
class FrameSampling:
    """Which frames of a video are taken (positions.select_frames) and whether its sound is."""

    fps: float
    min_frames: int
    max_frames: int
    max_frames_with_audio: int
    sound: bool
    choice: FrameChoice = "rate"

    def limit(self, has_sound: bool) -> int:
        """Most frames of a video with or without sound."""
        return self.max_frames_with_audio if has_sound else self.max_frames


@dataclass(frozen=True, kw_only=True)
class Video:
    """A decoded video."""

    frames: list[Frame]
    """Upright; or what was to be kept of each."""
    times_seconds: tuple[float, ...]
    """True times of the frames, counted from the first of them."""
    sound: NDArray[np.float32] | None
    """[samples] mono 16 kHz from the time of the first frame to the end of the picture; None: none wanted or there."""


@dataclass(frozen=True, kw_only=True)
class VideoSize:
    """Sampled frames and sound that the headers of a video promise."""

    num_frames: int
    sound_samples: int
    """At 16 kHz; 0 without sound."""


@dataclass(frozen=True, kw_only=True)
class VideoHeader:
    """What the headers of a video say, whatever is sampled from it later."""

    width: int
    height: int
    num_frames: int
    seconds: float
    sound_samples: int
    """At 16 kHz, no longer than the picture; 0 without sound."""

    def sampled(self, sampling: FrameSampling) -> VideoSize:
        """What ``sampling`` takes of it."""
        sound_samples = self.sound_samples if sampling.sound else 0
        num_frames = frame_count(
            self.seconds,
            fps=sampling.fps,
            min_frames=sampling.min_frames,
            max_frames=sampling.limit(sound_samples > 0),
            num_available=self.num_frames,
            choice=sampling.choice,
        )
        return VideoSize(num_frames=num_frames, sound_samples=sound_samples)


def check_pixels(file: Media, width: int, height: int) -> None:
    """MediaError for a picture or frame above MAX_PIXELS."""
    if width * height > MAX_PIXELS:
        raise MediaError(file, f"{width} x {height} pixels, above the limit of {MAX_PIXELS}", reason="media_too_large")


def check_seconds(file: Media, seconds: float, max_seconds: float) -> None:
    """MediaError for sound above the caller's limit."""
    if seconds > max_seconds:
        raise MediaError(
            file, f"{seconds:.1f} s of sound, above the limit of {max_seconds:g} s", reason="media_too_large"
        )


def check_rate(file: Media, rate: int) -> None:
    """MediaError for a sample rate that no sound has."""
    if not RATES[0] <= rate <= RATES[1]:
        raise MediaError(file, f"{rate} samples a second: read are {RATES[0]} to {RATES[1]}")


def check_whole(file: Media, seconds: float, promised: float) -> None:
    """MediaError for a file that ends well before its header says: it was cut off. Headers are rarely exact."""
    if promised - seconds > max(0.5, 0.1 * promised):
        raise MediaError(file, f"is cut off: its header promises {promised:.1f} s, {seconds:.1f} s are there")
