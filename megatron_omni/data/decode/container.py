"""Sound tracks and video through PyAV: the part of the CPU decoder that FFmpeg does.

A file is opened once and its packets are read once (they are small: compressed data up to ``_KEPT_BYTES`` is kept, a
larger file is read again for each use). The packets alone give the true times of all frames; then the sound is decoded,
the frames are chosen (positions.select_frames), and only what these frames need is decoded: of each group of pictures
the part up to the wanted frame, without frames that nothing refers to. FFmpeg may open the listed container formats
only: playlists could lead it to other files.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, inf

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from megatron_omni.data.decode import media
from megatron_omni.data.decode.media import (
    Frame,
    FrameSampling,
    Media,
    MediaError,
    Video,
    VideoHeader,
    check_pixels,
    check_rate,
    check_seconds,
    check_whole,
    open_media,
)
from megatron_omni.data.decode.resample import to_sample_rate
from megatron_omni.positions import SAMPLE_RATE, select_frames

_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,wav,flac,mp3,aac,gif,h264,hevc,obu"
_READ = (
    "MP4, MOV, M4A, 3GP, Matroska, WebM, AVI, MPEG-TS, MPEG-PS, FLV, ASF/WMV, Ogg, WAV, FLAC, MP3, AAC, GIF and bare "
    "H.264, HEVC and AV1"
)
"""The same for people."""
_END_AS_DURATION = ("matroska,webm", "flv")
"""Formats whose header says when the file ends, counted from 0, and not how long it is: one cut out of a longer file
with its time stamps kept starts late."""
_GAP_SECONDS = 0.05
"""A jump of the sound's clock beyond this is a hole that is filled with silence."""
_SPARE_SECONDS = 1.0
"""The last frame of sound, or what comes before the picture, may exceed the limit until it is cut off."""
_KEPT_BYTES = 64 << 20
_SKIPS_FRAMES = ("h264", "hevc")
"""Decoders that can leave out, packet by packet, a frame that no other refers to."""


@contextmanager
def open_container(file: Media) -> Iterator[av.container.InputContainer]:
    """The file opened by FFmpeg; MediaError for a container that is not on the list, or an error of FFmpeg."""
    # max_pixels: FFmpeg refuses a larger frame before it allocates it.
    options = {"format_whitelist": _CONTAINERS, "max_pixels": str(media.MAX_PIXELS)}
    with open_media(file) as stream:
        try:
            container = av.open(stream, "r", options=options)
        except (av.ArgumentError, av.InvalidDataError) as error:  # the first: known to FFmpeg, and not on the list
            raise MediaError(file, f"damaged, or no container that is read ({_READ}): convert it to one") from error
        with container:
            yield container


def track_seconds(container: av.container.InputContainer, file: Media) -> float:
    """Length of the first sound track by its header, or by its packets where the header does not say."""
    stream = _sound_stream(container, file)
    return _header_seconds(container, stream) or _header_seconds(container) or _packet_seconds(file, stream.index)


def _header_seconds(
    container: av.container.InputContainer, stream: av.VideoStream | av.AudioStream | None = None
) -> float | None:
    """How long a stream, or the whole file, is by its header; None where it does not say."""
    timed = container if stream is None else stream
    base = Fraction(1, av.time_base) if stream is None else stream.time_base
    if timed.duration is None or base is None:
        return None
    length = timed.duration
    if container.format.name in _END_AS_DURATION:
        length -= max(timed.start_time or 0, 0)
    return float(length * base) if length > 0 else None


def _packet_seconds(file: Media, stream_index: int) -> float:
    first, end = inf, -inf
    with open_container(file) as container:
        stream = container.streams[stream_index]
        for packet in container.demux(stream):
            if packet.size and packet.pts is not None:
                first, end = min(first, packet.pts), max(end, packet.pts + (packet.duration or 0))
        if end <= first or stream.time_base is None:
            raise MediaError(file, "neither its header nor its time stamps say how long the sound is")
        return (end - first) * float(stream.time_base)


def decode_track(file: Media, max_seconds: float) -> tuple[NDArray[np.float32], int, float]:
    """The first sound track: [samples] mono at its own rate, the rate, and the seconds that the header promises."""
    with open_container(file) as container:
        # The track of a video may be shorter than the picture, and its header then says the longer of both.
        promised = 0.0 if _pictures(container) else track_seconds(container, file)
        check_seconds(file, promised, max_seconds)
        track = _Track(file, max_seconds)
        track.decode(container.demux(_sound_stream(container, file)))
        return track.samples(), track.rate, promised


def read_video_header(file: Media) -> VideoHeader:
    """Size, frames and lengths from headers (of a video without frame count, from the packet list)."""
    with media.named(file), open_container(file) as container:
        stream = _picture_stream(container, file)
        sound_seconds = track_seconds(container, file) if container.streams.audio else 0.0
        if stream.frames and stream.duration and stream.time_base:
            num_frames, seconds = stream.frames, float(stream.duration * stream.time_base)
        else:
            packets = _read_packets(container, file)
            num_frames, seconds = len(packets.times), packets.seconds
        return VideoHeader(
            width=stream.width,
            height=stream.height,
            num_frames=num_frames,
            seconds=seconds,
            sound_samples=ceil(min(sound_seconds, seconds) * SAMPLE_RATE),
        )


def decode_video(
    file: Media,
    *,
    sampling: FrameSampling,
    max_sound_seconds: float = media.MAX_AUDIO_SECONDS,
    keep: Callable[[Frame], Frame] | None = None,
    pictures: "Pictures | None" = None,
) -> Video:
    """Frames nearest to the wanted times, turned upright, and the sound from the first of them to the picture's end.

    ``keep`` makes of each frame what is kept of it; ``pictures`` decodes the chosen frames in the place of FFmpeg.
    """
    with media.named(file), open_container(file) as container:
        packets = _read_packets(container, file)
        sound, end = None, packets.times[0] + packets.seconds
        if sampling.sound and packets.sound_index is not None:
            sound = _Track(file, max_sound_seconds + _SPARE_SECONDS, end=end)
            sound.decode(packets.of(packets.sound_index))
        has_sound = sound is not None and sound.length > 0
        selection = select_frames(
            packets.times,
            duration_seconds=packets.seconds,
            fps=sampling.fps,
            min_frames=sampling.min_frames,
            max_frames=sampling.limit(has_sound),
            choice=sampling.choice,
        )
        frames = (pictures or decode_frames)(packets, list(selection.indices), keep or np.asarray)
        first = selection.times_seconds[0]
        samples = sound.between(first, end) if has_sound and sound is not None else None
        check_seconds(file, 0.0 if samples is None else len(samples) / SAMPLE_RATE, max_sound_seconds)
        return Video(
            frames=frames,
            times_seconds=tuple(time - first for time in selection.times_seconds),
            sound=samples if samples is not None and len(samples) else None,
        )


def _sound_stream(container: av.container.InputContainer, file: Media) -> av.AudioStream:
    if not container.streams.audio:
        raise MediaError(file, "has no sound track")
    stream = container.streams.audio[0]
    stream.codec_context.thread_count = 1  # ranks and loader threads already fill the cores
    return stream


def _pictures(container: av.container.InputContainer) -> list[av.VideoStream]:
    """The picture tracks; a cover picture is none."""
    return [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]


def _picture_stream(container: av.container.InputContainer, file: Media) -> av.VideoStream:
    if not (pictures := _pictures(container)):
        cover = " but only the cover picture of a recording" if container.streams.video else ""
        raise MediaError(file, f"has no picture track{cover}")
    stream = pictures[0]
    check_pixels(file, stream.width, stream.height)
    stream.codec_context.thread_count = 1
    return stream


# ------------------------------------------------------------------------------------------------ packets


@dataclass(frozen=True, kw_only=True)
class Packets:
    """The compressed data of a video, and what it says without being decoded."""

    file: Media
    stamps: list[int]
    """Of the picture's packets in the order of the file, in ticks."""
    is_key: list[bool]
    shown: list[int]
    """Stamps in the order of showing."""
    times: list[float]
    """Of the frames in the order of showing, in seconds."""
    seconds: float
    """How long the picture lasts."""
    codec: str
    """FFmpeg's name of the picture's codec."""
    rotated: bool
    """Whether the frames are stored turned."""
    frame_bytes: int
    """Of one frame as RGB."""
    picture_index: int
    sound_index: int | None
    kept: list[av.Packet] | None
    """All packets, None where they are too many to keep."""
    in_order: bool
    """The stamps belong to the frames in the order of showing: AVI has no others, so FFmpeg guesses them."""

    def of(self, stream_index: int) -> Iterator[av.Packet]:
        """The packets of one stream in the order of the file."""
        if self.kept is not None:
            yield from (packet for packet in self.kept if packet.stream_index == stream_index)
            return
        with open_container(self.file) as again:
            stream = again.streams[stream_index]
            stream.codec_context.thread_count = 1
            yield from (packet for packet in again.demux(stream) if packet.size)


def _read_packets(container: av.container.InputContainer, file: Media) -> Packets:
    picture = _picture_stream(container, file)
    sound = _sound_stream(container, file) if container.streams.audio else None
    stamps: list[int] = []
    is_key: list[bool] = []
    shown: list[int] = []
    kept: list[av.Packet] | None = []
    picture_index, kept_bytes, last_duration = picture.index, 0, 0
    ends = {stream.index: 0 for stream in (picture, sound) if stream is not None}
    for packet in container.demux(*(stream for stream in (picture, sound) if stream is not None)):
        if not packet.size:  # the flush packet
            continue
        index, stamp = packet.stream_index, packet.pts
        if kept is not None:
            kept.append(packet)
            kept_bytes += packet.size
            if kept_bytes > _KEPT_BYTES:
                kept = None
        if index == picture_index:
            if stamp is None:
                raise MediaError(file, "has a frame without a time stamp")
            stamps.append(stamp)
            is_key.append(packet.is_keyframe)
            if not packet.is_discard:  # edit lists discard frames
                shown.append(stamp)
                last_duration = packet.duration or last_duration
        if stamp is not None and not packet.is_discard:
            ends[index] = max(ends[index], stamp + (packet.duration or 0))
    if not shown:
        raise MediaError(file, "has no frames")
    if (promised := _header_seconds(container)) is not None:
        promised += (container.start_time or 0) / av.time_base
        end = max(_seconds(ends[stream.index], stream) for stream in (picture, sound) if stream is not None)
        check_whole(file, end, promised)
    shown.sort()
    if not last_duration and len(shown) > 1:
        last_duration = round((shown[-1] - shown[0]) / (len(shown) - 1))
    return Packets(
        file=file,
        stamps=stamps,
        is_key=is_key,
        shown=shown,
        times=[_seconds(stamp, picture) for stamp in shown],
        seconds=_seconds(shown[-1] - shown[0] + last_duration, picture),
        codec=picture.codec_context.name,
        rotated="display_matrix" in picture.codec_context.coded_side_data,
        frame_bytes=3 * picture.width * picture.height,
        picture_index=picture_index,
        sound_index=sound.index if sound is not None else None,
        kept=kept,
        in_order=container.format.name == "avi" and picture.codec_context.name in _SKIPS_FRAMES,
    )


def _seconds(ticks: int, stream: av.VideoStream | av.AudioStream) -> float:
    base = stream.time_base
    assert base is not None
    return ticks * base.numerator / base.denominator


# ------------------------------------------------------------------------------------------------ frames


Keep = Callable[[Frame], Frame]
"""What is kept of a frame."""
Pictures = Callable[[Packets, list[int], Keep], list[Frame]]
"""Frames, numbered in the order of showing."""


def decode_frames(packets: Packets, indices: list[int], keep: Keep) -> list[Frame]:
    """What is kept of these frames, numbered in the order of showing; one at a time in full size."""
    convert = _to_rgb(packets.file, keep)
    if packets.in_order:
        return _decode_in_order(packets, indices, convert)
    wanted = [packets.shown[index] for index in indices]
    frames = _decode_stamps(packets, set(wanted), _plan(packets, set(wanted)), convert)
    if frames.keys() != set(wanted):
        # A key frame that the decoder cannot start at (a file that only refreshes bit by bit): from the beginning.
        frames = _decode_stamps(packets, set(wanted), [range(len(packets.stamps))], convert)
    if missing := sorted(set(wanted) - frames.keys()):
        time = packets.times[packets.shown.index(missing[0])]
        raise MediaError(packets.file, f"the frame at {time:.3f} s cannot be decoded")
    return [frames[stamp] for stamp in wanted]


def _plan(packets: Packets, wanted: set[int]) -> list[range]:
    """Runs of packets, by number, that hold all that the wanted frames need: each from a key frame to a wanted one.

    A frame refers to nothing before the last key frame that comes before it both in the file and on the screen.
    """
    keys = [i for i, is_key in enumerate(packets.is_key) if is_key]
    runs: list[range] = []
    for index, stamp in enumerate(packets.stamps):
        if stamp not in wanted:
            continue
        at = bisect_right(keys, index) - 1
        while at >= 0 and packets.stamps[keys[at]] > stamp:
            at -= 1
        start = keys[at] if at >= 0 else 0
        if runs and start <= runs[-1].stop:
            runs[-1] = range(runs[-1].start, index + 1)
        else:
            runs.append(range(start, index + 1))
    return runs


def _decode_stamps(packets: Packets, wanted: set[int], runs: list[range], convert: "_to_rgb") -> dict[int, Frame]:
    """The frames with these stamps, from these runs of packets."""
    frames: dict[int, Frame] = {}
    left = iter(runs)
    run = next(left)
    for index, packet in enumerate(packets.of(packets.picture_index)):
        if index < run.start:
            continue
        context = packet.stream.codec_context
        if index == run.start:
            context.flush_buffers()
        if context.name in _SKIPS_FRAMES:
            context.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
        shown = packet.decode()
        last = index == run.stop - 1
        if last:
            shown += packet.stream.decode(None)
        for frame in shown:
            if frame.pts in wanted and frame.pts not in frames:
                frames[frame.pts] = convert(frame)
        if last and (run := next(left, range(0))) == range(0):
            context.flush_buffers()
            break
    return frames


def _decode_in_order(packets: Packets, indices: list[int], convert: "_to_rgb") -> list[Frame]:
    """These frames, counted as they leave the decoder."""
    wanted = set(indices)
    pictures = _decoded(packets.of(packets.picture_index))
    frames = [convert(frame) for index, frame in enumerate(pictures) if index in wanted]  # all of it: the count matters
    if len(frames) < len(indices):
        raise MediaError(packets.file, f"only {len(frames)} of {len(indices)} frames can be decoded")
    return frames


def _decoded(packets: Iterable[av.Packet]) -> Iterator[av.VideoFrame]:
    stream = None
    for packet in packets:
        stream = packet.stream
        yield from packet.decode()
    if stream is not None:
        yield from stream.decode(None)


class _to_rgb:
    """Frame -> what is kept of it as RGB, upright."""

    def __init__(self, file: Media, keep: Keep) -> None:
        self.file, self.keep, self.reformatter = file, keep, VideoReformatter()

    def __call__(self, frame: av.VideoFrame) -> Frame:
        if frame.is_corrupt:
            raise MediaError(self.file, f"the frame at {frame.time:.3f} s is damaged")
        check_pixels(self.file, frame.width, frame.height)
        picture = self.reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
        # The display matrix turns counter-clockwise by ``rotation`` degrees, as rot90 does.
        return self.keep(np.ascontiguousarray(np.rot90(picture, round(frame.rotation / 90))))


# ------------------------------------------------------------------------------------------------ sound


class _Track:
    """A sound track while it is decoded: [length] float32 samples, mono, at its own ``rate``, nothing after ``end``."""

    def __init__(self, file: Media, max_seconds: float, *, end: float = inf) -> None:
        self.rate, self.length = 0, 0
        self._file, self._max_seconds, self._end = file, max_seconds, end
        self._start = 0.0  # time of the first sample in seconds
        self._parts: list[NDArray[np.float32]] = []
        self._form = ("", "", 0)
        self._to_float: av.AudioResampler | None = None

    def decode(self, packets: Iterable[av.Packet]) -> None:
        """Decode all of the track."""
        stream = None
        for packet in packets:
            stream = packet.stream if packet.size else None  # the flush packet needs no flush behind it
            for frame in packet.decode():
                self._add(frame)
        if stream is not None:
            for frame in stream.decode(None):
                self._add(frame)

    def samples(self) -> NDArray[np.float32]:
        """All of it."""
        return np.concatenate(self._parts) if self._parts else np.zeros(0, np.float32)

    def between(self, first: float, last: float) -> NDArray[np.float32]:
        """From time ``first`` to ``last`` at 16 kHz; silence where the track starts later, cut where it is longer."""
        samples, offset = self.samples(), round((first - self._start) * self.rate)
        if offset < 0 and -offset >= round((last - first) * self.rate):
            return np.zeros(0, np.float32)  # the sound starts after the picture has ended
        aligned = samples[offset:] if offset >= 0 else np.concatenate([np.zeros(-offset, np.float32), samples])
        return to_sample_rate(aligned[: ceil((last - first) * self.rate - 1e-6)], self.rate)

    def _add(self, frame: av.AudioFrame | av.VideoFrame) -> None:
        assert isinstance(frame, av.AudioFrame)
        form = frame.format.name, frame.layout.name, frame.sample_rate
        base = frame.time_base
        time = frame.pts * base.numerator / base.denominator if frame.pts is not None and base is not None else None
        if time is not None and time >= self._end:
            return
        if not self.rate:
            check_rate(self._file, frame.sample_rate)
            self._form, self.rate, self._start = form, frame.sample_rate, time or 0.0
            if form[0] != "fltp":
                self._to_float = av.AudioResampler(format="fltp", layout=frame.layout, rate=self.rate)
        elif form != self._form:
            raise MediaError(self._file, f"its sound changes from {self._form} to {form}")
        if time is not None:
            hole = round((time - self._start) * self.rate) - self.length
            if hole > _GAP_SECONDS * self.rate:
                self._append(np.broadcast_to(np.float32(0), hole))
        for part in [frame] if self._to_float is None else self._to_float.resample(frame):
            if len(part.planes) == 1:
                self._append(np.frombuffer(part.planes[0], np.float32, part.samples))
            else:
                self._append(part.to_ndarray().mean(axis=0, dtype=np.float32))

    def _append(self, samples: NDArray[np.float32]) -> None:
        self.length += len(samples)
        check_seconds(self._file, self.length / self.rate, self._max_seconds)
        self._parts.append(samples)
