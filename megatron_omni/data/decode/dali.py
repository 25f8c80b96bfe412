"""Decode with NVIDIA DALI's dynamic mode: on the GPU where there is one, else with its CPU operators.

Headers are read first, by Pillow, soundfile and PyAV, because they decide what DALI may get: its decoders allocate what
a header promises, drop transparency, and know fewer codecs. What each kind of file gets:

    pictures    JPEG, PNG, WebP, TIFF, BMP, PPM, JPEG 2000 with 8-bit RGB or grey     equal to Pillow's
    sound       WAV, FLAC, Ogg (Vorbis, Opus); mixing to mono and resampling as in cpu.py    within 2e-7 of soundfile's
    video       chosen frames by number: VP8, VP9, MJPEG on a CPU; also H.264, HEVC, AV1, MPEG-4 on a GPU
                its conversion to RGB differs from FFmpeg's by some 3 / 255 on average (docs/decode.md)

Everything else (transparency, 16 bits, GIF, mp3, AAC, a codec that is not listed, rotated video, a variable frame rate,
cut frames, whatever DALI refuses) goes to the CPU back end, file by file: counted in ``fallbacks`` by reason, and each
reason is logged once. The sound track of a video is always FFmpeg's. Only this file imports ``nvidia.dali``.
"""

import logging
import os
import threading
from collections import Counter
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import nvidia.dali.experimental.dynamic as ndd
from numpy.typing import NDArray
from nvidia.dali.types import DALIDataType, DALIImageType
from PIL import Image

from megatron_omni.data.decode import cpu
from megatron_omni.data.decode.container import Keep, Packets, decode_frames, decode_video
from megatron_omni.data.decode.media import (
    MAX_AUDIO_SECONDS,
    Frame,
    FrameSampling,
    Media,
    MediaBytes,
    MediaError,
    Video,
    check_rate,
    check_seconds,
    check_whole,
    named,
    open_media,
)
from megatron_omni.data.decode.resample import to_sample_rate
from megatron_omni.platform.device import accelerator_present

logger = logging.getLogger(__name__)

_PICTURE_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "PPM", "JPEG2000")
_PICTURE_MODES = ("RGB", "L")
_SOUND_FORMATS = ("WAV", "FLAC", "OGG")
_VIDEO_CODECS = {"cpu": ("vp8", "vp9", "mjpeg"), "gpu": ("vp8", "vp9", "mjpeg", "h264", "hevc", "av1", "mpeg4")}
_MOST_VALUES = 1 << 26
"""Values of sound that DALI may allocate at once, all channels: 256 MB."""
_MOST_FRAME_BYTES = 1 << 29
"""Of the chosen frames of a video, which DALI gives all at once in full size; the CPU back end needs one."""
_MOST_FILE_BYTES = 1 << 29
"""Of a file that is read as a whole for DALI."""
_JPEG_END = b"\xff\xd9"
_UNEVEN_TICKS = 1
"""Rounding of a time base makes a constant rate waver by this."""


class _Refused(Exception):
    """DALI is not asked for this file; the message is the reason."""


class DaliDecoder:
    """The DALI back end. ``fallbacks`` counts the files that the CPU back end took over, by reason."""

    def __init__(self) -> None:
        self.device = "gpu" if accelerator_present() else "cpu"
        self.fallbacks: Counter[str] = Counter()
        self._lock = threading.Lock()
        logger.info("media are decoded by DALI on the %s", self.device)

    def decode_image(self, file: Media) -> Image.Image:
        """As cpu.decode_image."""
        with named(file):
            try:
                data = _bytes_of(file)
                with cpu.open_image(data) as header:
                    _require_plain_picture(header, data.data)
                pixels = self._run(ndd.decoders.image, data.data, device=self.device, output_type=DALIImageType.RGB)
            except (_Refused, RuntimeError) as error:
                self._count("picture", error)
                return cpu.decode_image(file)
            return Image.fromarray(pixels)

    def decode_audio(self, file: Media, *, max_seconds: float = MAX_AUDIO_SECONDS) -> NDArray[np.float32]:
        """As cpu.decode_audio."""
        with named(file):
            try:
                data = _bytes_of(file)
                rate, promised = _require_plain_sound(data, max_seconds)
                values = self._run(ndd.decoders.audio, data.data, device="cpu", dtype=DALIDataType.FLOAT)
            except (_Refused, RuntimeError) as error:
                self._count("sound", error)
                return cpu.decode_audio(file, max_seconds=max_seconds)
            samples = values.reshape(len(values), -1).mean(axis=1, dtype=np.float32)
            if not len(samples):
                raise MediaError(file, "holds no sound samples")
            check_whole(file, len(samples) / rate, promised)
            return to_sample_rate(samples, rate)

    def decode_video(
        self,
        file: Media,
        *,
        sampling: FrameSampling,
        max_sound_seconds: float = MAX_AUDIO_SECONDS,
        keep: Callable[[Frame], Frame] | None = None,
    ) -> Video:
        """As cpu.decode_video."""
        return decode_video(
            file, sampling=sampling, max_sound_seconds=max_sound_seconds, keep=keep, pictures=self._frames
        )

    def _frames(self, packets: Packets, indices: list[int], keep: Keep) -> list[Frame]:
        try:
            self._require_plain_video(packets, len(indices))
            data = _bytes_of(packets.file).data
            frames = self._run(ndd.decoders.video, data, device=self.device, frames=indices)
        except (_Refused, RuntimeError) as error:
            self._count("video", error)
            return decode_frames(packets, indices, keep)
        return [keep(frame) for frame in frames]

    def _require_plain_video(self, packets: Packets, num_frames: int) -> None:
        if packets.codec not in _VIDEO_CODECS[self.device]:
            raise _Refused(f"codec {packets.codec}")
        if packets.frame_bytes * num_frames > _MOST_FRAME_BYTES:
            raise _Refused("more frames at once than memory is meant for")
        if packets.rotated:
            raise _Refused("rotated")
        if len(packets.shown) != len(packets.stamps):
            raise _Refused("an edit list leaves frames out")
        steps = [after - before for before, after in pairwise(packets.shown)]
        if steps and max(steps) - min(steps) > _UNEVEN_TICKS:
            raise _Refused("variable frame rate")

    def _run(self, operator: object, data: bytes, **options: object) -> NDArray:
        """One operator on one file; RuntimeError for whatever DALI says against it."""
        with ndd.EvalMode.sync_full:
            out = operator(np.frombuffer(data, np.uint8), **options)  # type: ignore[operator]
            out = out[0] if isinstance(out, tuple) else out  # audio: samples and rate
            return np.asarray(out.cpu() if self.device == "gpu" else out)

    def _count(self, kind: str, error: Exception) -> None:
        reason = f"{kind}: {error}" if isinstance(error, _Refused) else f"{kind}: refused by DALI"
        with self._lock:
            self.fallbacks[reason] += 1
            first = self.fallbacks[reason] == 1
        if first:
            detail = "" if isinstance(error, _Refused) else f" ({str(error).splitlines()[0][:200]})"
            logger.warning("%s%s: such files are decoded by the CPU back end", reason, detail)


def _bytes_of(file: Media) -> MediaBytes:
    """The file in memory; _Refused for one that is too large for that."""
    if isinstance(file, MediaBytes):
        return file
    with open_media(file) as stream:
        if os.fstat(stream.fileno()).st_size > _MOST_FILE_BYTES:
            raise _Refused("large file")
        return MediaBytes(str(file), stream.read())


def _require_plain_picture(header: Image.Image, data: bytes) -> None:
    if header.format not in _PICTURE_FORMATS:
        raise _Refused(f"format {header.format}")
    if header.mode not in _PICTURE_MODES:
        raise _Refused(f"pixels of mode {header.mode}")
    if header.has_transparency_data:
        raise _Refused("transparency")
    if header.format != "JPEG" and cpu.orientation(header) != 1:
        raise _Refused(f"{header.format} with an orientation")
    if header.format == "JPEG" and _JPEG_END not in data[-64:]:
        raise _Refused("JPEG without its end")  # perhaps cut off, which DALI would not say


def _require_plain_sound(data: MediaBytes, max_seconds: float) -> tuple[int, float]:
    """(rate, seconds that the header promises)."""
    if data.data[:4] not in (b"RIFF", b"fLaC", b"OggS"):
        raise _Refused("format other than WAV, FLAC and Ogg")
    with cpu.open_sound(data) as header:
        if header is None:
            raise _Refused("unreadable header")
        if header.format not in _SOUND_FORMATS:
            raise _Refused(f"format {header.format}")
        check_rate(data, header.samplerate)
        seconds = header.frames / header.samplerate
        check_seconds(data, seconds, max_seconds)
        if header.frames * header.channels > _MOST_VALUES:
            raise _Refused("long")
        return header.samplerate, seconds
