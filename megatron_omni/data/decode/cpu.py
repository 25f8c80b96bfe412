"""Decode pictures, sound and video on the CPU: Pillow, soundfile and PyAV. The reference for every other decoder.

    decode_image(file) -> Pillow picture, EXIF orientation still to be applied (processors.py does)
    decode_audio(file) -> [samples] float32, mono, 16 kHz
    decode_video(file) -> sampled frames with their true times, and the sound that goes with them

``probe_*`` read headers only (of a video without frame count, the packet list) and say how large the result will be;
the loader balances lengths with them. What ``decode_*`` returns is the truth: it may differ slightly from the header.

Whatever is wrong with a file (missing, cut off, wrong bytes, no such stream, absurd size) is one ``MediaError`` that
names file and cause. FFmpeg may open the listed container formats only: playlists could lead it to other files.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, gcd
from pathlib import Path

import av
import numpy as np
import soundfile
from numpy.typing import NDArray
from PIL import Image
from scipy.signal import resample_poly

from megatron_omni.positions import SAMPLE_RATE, frame_targets, select_frames

MAX_PIXELS = 64_000_000
"""Largest picture or frame that is decoded: 192 MB as RGB."""
MAX_AUDIO_SECONDS = 4 * 3600.0
"""Longest sound that is decoded when the caller sets no limit."""
_PICTURE_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")
_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,wav,flac,mp3,aac,gif,h264,hevc,obu"
_EXIF_ORIENTATION, _EXIF_TRANSPOSED = 0x0112, (5, 6, 7, 8)
_GAP_SECONDS = 0.05
"""A jump of the sound's clock beyond this is a hole that is filled with silence."""


class MediaError(ValueError):
    """A media file that cannot be used; the message names the file and the cause."""

    def __init__(self, file: str | Path, cause: object, *, reason: str = "unreadable_media") -> None:
        super().__init__(f"media file {str(file)!r}: {cause}")
        self.file, self.reason = str(file), reason


@dataclass(frozen=True, kw_only=True)
class FrameSampling:
    """Which frames of a video are taken (positions.select_frames) and whether its sound is."""

    fps: float
    min_frames: int
    max_frames: int
    max_frames_with_audio: int
    sound: bool

    def limit(self, has_sound: bool) -> int:
        """Most frames of a video with or without sound."""
        return self.max_frames_with_audio if has_sound else self.max_frames


@dataclass(frozen=True, kw_only=True)
class Video:
    """A decoded video."""

    frames: list[NDArray[np.uint8]]
    """[height, width, 3] RGB each, upright."""
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
        targets = frame_targets(
            self.seconds,
            fps=sampling.fps,
            min_frames=sampling.min_frames,
            max_frames=sampling.limit(sound_samples > 0),
            num_available=self.num_frames,
        )
        return VideoSize(num_frames=len(targets), sound_samples=sound_samples)


@contextmanager
def _named(file: str | Path) -> Iterator[None]:
    """Turn whatever a decoding library raises into a MediaError of this file.

    ``Exception`` on purpose: damaged bytes make these libraries raise anything, IndexError and SyntaxError included.
    """
    try:
        yield
    except MediaError:
        raise
    except FileNotFoundError as error:
        raise MediaError(file, "no such file", reason="missing_media") from error
    except Exception as error:
        raise MediaError(file, f"{type(error).__name__}: {error}") from error


# ------------------------------------------------------------------------------------------------ pictures


def decode_image(file: str | Path) -> Image.Image:
    """The picture, fully read (first frame of an animation)."""
    with _named(file):
        image = _open_image(file)
        image.load()
        return image


def probe_image(file: str | Path) -> tuple[int, int]:
    """(width, height) of the upright picture."""
    with _named(file), _open_image(file) as image:
        transposed = image.getexif().get(_EXIF_ORIENTATION) in _EXIF_TRANSPOSED
        return (image.height, image.width) if transposed else (image.width, image.height)


def _open_image(file: str | Path) -> Image.Image:
    image = Image.open(file, formats=_picture_formats())
    _check_pixels(file, image.width, image.height)
    return image


@lru_cache(maxsize=1)
def _picture_formats() -> tuple[str, ...]:
    """The wanted formats that this build of Pillow has: the others would be a KeyError on every picture."""
    Image.init()
    return tuple(sorted(_PICTURE_FORMATS & Image.OPEN.keys()))


def _check_pixels(file: str | Path, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise MediaError(file, f"{width} x {height} pixels, above the limit of {MAX_PIXELS}", reason="media_too_large")


# ------------------------------------------------------------------------------------------------ sound


def decode_audio(file: str | Path, *, max_seconds: float = MAX_AUDIO_SECONDS) -> NDArray[np.float32]:
    """[samples] float32 mono 16 kHz: channels averaged, resampled with a polyphase filter.

    soundfile reads wav, flac, ogg, opus and mp3; PyAV reads the rest (m4a, aac, the sound track of a video).
    """
    with _named(file):
        if (sound := _open_sound(file)) is None:
            with _open_container(file) as container:
                # The track of a video may be shorter than the picture, and its header then says the longer of both.
                promised = 0.0 if container.streams.video else _track_seconds(container, file)
                samples, rate, _ = _decode_track(container, file, max_seconds)
        else:
            with sound:
                rate = sound.samplerate
                promised = sound.frames / rate
                _check_seconds(file, promised, max_seconds)
                samples = sound.read(dtype="float32", always_2d=True).mean(axis=1)
        if not len(samples):
            raise MediaError(file, "holds no sound samples")
        _check_whole(file, len(samples) / rate, promised)
        return to_sample_rate(samples, rate)


def probe_audio(file: str | Path, *, max_seconds: float = MAX_AUDIO_SECONDS) -> int:
    """Samples at 16 kHz, from the header."""
    with _named(file):
        if (sound := _open_sound(file)) is not None:
            with sound:
                seconds = sound.frames / sound.samplerate
        else:
            with _open_container(file) as container:
                seconds = _track_seconds(container, file)
        _check_seconds(file, seconds, max_seconds)
        return ceil(seconds * SAMPLE_RATE)


def to_sample_rate(samples: NDArray[np.float32], rate: int) -> NDArray[np.float32]:
    """[samples] at ``rate`` Hz to 16 kHz; length ceil(n 16000 / rate)."""
    if rate == SAMPLE_RATE:
        return np.ascontiguousarray(samples, dtype=np.float32)
    divisor = gcd(rate, SAMPLE_RATE)
    return resample_poly(samples, SAMPLE_RATE // divisor, rate // divisor).astype(np.float32)


def _open_sound(file: str | Path) -> soundfile.SoundFile | None:
    """The file opened by soundfile, None for a format that it does not know."""
    with open(file, "rb") as head:
        start = head.read(8)
    # mp4 and matroska: libsndfile searches long before it refuses.
    if start[4:] == b"ftyp" or start[:4] == b"\x1aE\xdf\xa3":
        return None
    try:
        return soundfile.SoundFile(file)
    except soundfile.LibsndfileError:
        return None


def _check_seconds(file: str | Path, seconds: float, max_seconds: float) -> None:
    if seconds > max_seconds:
        raise MediaError(
            file, f"{seconds:.1f} s of sound, above the limit of {max_seconds:g} s", reason="media_too_large"
        )


def _check_whole(file: str | Path, seconds: float, promised: float) -> None:
    """A file that ends well before its header says was cut off; headers are rarely exact to the frame."""
    if promised - seconds > max(0.5, 0.1 * promised):
        raise MediaError(file, f"is cut off: its header promises {promised:.1f} s, {seconds:.1f} s are there")


def _open_container(file: str | Path) -> av.container.InputContainer:
    if not Path(file).is_file():
        raise FileNotFoundError(file)
    # "file:" keeps a colon in the name from being read as a protocol.
    return av.open(f"file:{file}", options={"format_whitelist": _CONTAINERS})


def _sound_stream(container: av.container.InputContainer, file: str | Path) -> av.AudioStream:
    if not container.streams.audio:
        raise MediaError(file, "has no sound track")
    return container.streams.audio[0]


def _track_seconds(container: av.container.InputContainer, file: str | Path) -> float:
    stream = _sound_stream(container, file)
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    if container.duration is not None:
        return container.duration / av.time_base
    raise MediaError(file, "its header does not say how long the sound is")


def _decode_track(
    container: av.container.InputContainer, file: str | Path, max_seconds: float
) -> tuple[NDArray[np.float32], int, float]:
    """The first sound track: [samples] mono at its own rate, the rate, and the time of the first sample in seconds."""
    stream = _sound_stream(container, file)
    stream.codec_context.thread_count = 1
    parts: list[NDArray[np.float32]] = []
    rate, start, have = 0, 0.0, 0
    to_float: av.AudioResampler | None = None
    for decoded in container.decode(stream):
        if to_float is None:
            rate, start = decoded.sample_rate, decoded.time or 0.0
            to_float = av.AudioResampler(format="fltp", layout=decoded.layout, rate=rate)
        if decoded.time is not None:
            hole = round((decoded.time - start) * rate) - have
            if hole > _GAP_SECONDS * rate:
                _check_seconds(file, (have + hole) / rate, max_seconds)
                parts.append(np.zeros(hole, np.float32))
                have += hole
        for frame in to_float.resample(decoded):
            parts.append(frame.to_ndarray().mean(axis=0, dtype=np.float32))
            have += len(parts[-1])
        _check_seconds(file, have / rate, max_seconds)
    return (np.concatenate(parts) if parts else np.zeros(0, np.float32)), rate, start


# ------------------------------------------------------------------------------------------------ video


def decode_video(file: str | Path, *, sampling: FrameSampling, max_sound_seconds: float = MAX_AUDIO_SECONDS) -> Video:
    """Frames nearest to the wanted times, turned upright, and the sound from the first of them to the picture's end."""
    with _named(file):
        with _open_container(file) as container:
            times, picture_seconds = _frame_times(container, file)
        sound, rate, sound_start = None, SAMPLE_RATE, 0.0
        if sampling.sound:
            with _open_container(file) as container:
                if container.streams.audio:
                    sound, rate, sound_start = _decode_track(container, file, max_sound_seconds)
        has_sound = sound is not None and len(sound) > 0
        selection = select_frames(
            times,
            duration_seconds=picture_seconds,
            fps=sampling.fps,
            min_frames=sampling.min_frames,
            max_frames=sampling.limit(has_sound),
        )
        frames = _decode_frames(file, set(selection.times_seconds))
        first = selection.times_seconds[0]
        if has_sound:
            assert sound is not None
            sound = _between(sound, rate, sound_start, first, times[0] + picture_seconds)
        return Video(
            frames=[frames[time] for time in selection.times_seconds],
            times_seconds=tuple(time - first for time in selection.times_seconds),
            sound=sound if has_sound and sound is not None and len(sound) else None,
        )


def probe_video(file: str | Path, *, sampling: FrameSampling) -> VideoSize:
    """Sampled frames and samples of sound that the headers promise."""
    return read_video_header(file).sampled(sampling)


def read_video_header(file: str | Path) -> VideoHeader:
    """Size, frames and lengths from headers (of a video without frame count, from the packet list)."""
    with _named(file):
        num_frames, seconds = 0, 0.0
        with _open_container(file) as container:
            stream = _picture_stream(container, file)
            width, height = stream.width, stream.height
            if stream.frames and stream.duration and stream.time_base:
                num_frames, seconds = stream.frames, float(stream.duration * stream.time_base)
            sound_seconds = _track_seconds(container, file) if container.streams.audio else 0.0
        if not num_frames:
            with _open_container(file) as container:
                times, seconds = _frame_times(container, file)
            num_frames = len(times)
        sound_samples = ceil(min(sound_seconds, seconds) * SAMPLE_RATE)
        return VideoHeader(
            width=width, height=height, num_frames=num_frames, seconds=seconds, sound_samples=sound_samples
        )


def _picture_stream(container: av.container.InputContainer, file: str | Path) -> av.VideoStream:
    if not container.streams.video:
        raise MediaError(file, "has no picture track")
    stream = container.streams.video[0]
    _check_pixels(file, stream.width, stream.height)
    return stream


def _frame_times(container: av.container.InputContainer, file: str | Path) -> tuple[list[float], float]:
    """Times of all frames in seconds, ascending, and how long the picture lasts; from packets, nothing is decoded."""
    stream = _picture_stream(container, file)
    stamps, last_duration, end_seconds = [], 0, 0.0
    for packet in container.demux(stream, *container.streams.audio[:1]):
        if not packet.size or packet.is_discard:  # the flush packet is empty; edit lists discard frames
            continue
        if packet.pts is not None and packet.time_base is not None:
            end_seconds = max(end_seconds, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        if packet.stream_index == stream.index:
            if packet.pts is None:
                raise MediaError(file, "has a frame without a time stamp")
            stamps.append(packet.pts)
            last_duration = packet.duration or last_duration
    if not stamps:
        raise MediaError(file, "has no frames")
    if container.duration is not None:
        promised = (container.duration + (container.start_time or 0)) / av.time_base
        _check_whole(file, end_seconds, promised)
    base = stream.time_base
    assert base is not None
    stamps.sort()
    if not last_duration and len(stamps) > 1:
        last_duration = round((stamps[-1] - stamps[0]) / (len(stamps) - 1))
    return [float(stamp * base) for stamp in stamps], float((stamps[-1] - stamps[0] + last_duration) * base)


def _decode_frames(file: str | Path, wanted: set[float]) -> dict[float, NDArray[np.uint8]]:
    """RGB of the frames at exactly these times."""
    frames: dict[float, NDArray[np.uint8]] = {}
    with _open_container(file) as container:
        stream = _picture_stream(container, file)
        stream.codec_context.thread_count = 1  # ranks and loader threads already fill the cores
        for frame in container.decode(stream):
            if frame.pts is None or stream.time_base is None:
                raise MediaError(file, "has a frame without a time stamp")
            time = float(frame.pts * stream.time_base)
            if time in wanted:
                if frame.is_corrupt:
                    raise MediaError(file, f"the frame at {time:.3f} s is damaged")
                # The display matrix turns counter-clockwise by ``rotation`` degrees, as rot90 does.
                frames[time] = np.ascontiguousarray(
                    np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
                )
                if len(frames) == len(wanted):
                    break
    if missing := sorted(wanted - frames.keys()):
        raise MediaError(file, f"the frame at {missing[0]:.3f} s cannot be decoded")
    return frames


def _between(samples: NDArray[np.float32], rate: int, start: float, first: float, last: float) -> NDArray[np.float32]:
    """Sound from time ``first`` to ``last`` at 16 kHz; silence where the track starts later, cut where it is longer."""
    offset = round((first - start) * rate)
    aligned = samples[offset:] if offset >= 0 else np.concatenate([np.zeros(-offset, np.float32), samples])
    if offset < 0 and -offset >= round((last - first) * rate):
        return np.zeros(0, np.float32)  # the sound starts after the picture has ended
    return to_sample_rate(aligned[: ceil((last - first) * rate - 1e-6)], rate)
