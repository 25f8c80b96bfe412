"""Media of a page of results, beside it in ``media/``: what browsers play is linked, the rest converted.

    picture   PNG, JPEG, GIF, WebP, AVIF and BMP as they are; others as PNG
    sound     WAV, MP3, FLAC, Ogg and AAC as they are; others as WAV, 16 kHz mono, which is what the model heard
    video     MP4 and WebM of H.264, VP8, VP9 or AV1 as they are; others as MP4 (H.264, AAC)

Names are made here, of a digest of the path and an ending from a fixed list: nothing in a file's name or bytes decides how
a browser reads it.
"""

import hashlib
import os
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import soundfile

from megatron_omni.data.decode.container import open_container
from megatron_omni.data.decode.cpu import decode_audio, decode_image
from megatron_omni.data.decode.media import MediaError, named
from megatron_omni.positions import SAMPLE_RATE

FOLDER = "media"
_PLAYED = {
    "image": {".png", ".jpg", ".jpeg", ".gif", ".webp", ".avif", ".bmp"},
    "audio": {".wav", ".mp3", ".flac", ".ogg", ".oga", ".opus", ".m4a", ".aac", ".mp4"},
    "video": {".mp4", ".webm"},
}
_CONVERTED = {"image": ".png", "audio": ".wav", "video": ".mp4"}
_CODECS = {"h264", "vp8", "vp9", "av1"}
LONGEST_SIDE, MOST_SECONDS = 640, 120.0
"""Of a converted clip: it is to be looked at."""


@dataclass(frozen=True)
class Shown:
    """A medium on the page."""

    kind: str
    name: str
    """Of the file as the data has it."""
    file: str | None
    """Beside the page, ``media/NAME``; None where it cannot be shown."""
    problem: str | None = None


class PageMedia:
    """The media of one page; a file that several samples have is there once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._done: dict[tuple[str, str], Shown] = {}

    def show(self, kind: str, path: str) -> Shown:
        """The medium beside the page. What cannot be read is no error: the page says so."""
        if (kind, path) not in self._done:
            self._done[kind, path] = self._place(kind, path)
        return self._done[kind, path]

    def _place(self, kind: str, path: str) -> Shown:
        source = Path(path)
        if not source.is_file():
            return Shown(kind, path, None, "not a file on this machine")
        ending = source.suffix.lower()
        try:
            as_it_is = ending in _PLAYED[kind] and (kind != "video" or _is_played(source))
            digest = hashlib.sha256(f"{kind}\0{source.resolve()}".encode()).hexdigest()[:20]
            name = digest + (ending if as_it_is else _CONVERTED[kind])
            target = self._folder / FOLDER / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)  # of an earlier page: the file may have changed
            if as_it_is:
                _link(source, target)
            else:
                _CONVERT[kind](source, target)
        except (MediaError, OSError) as error:
            return Shown(kind, path, None, str(error))
        return Shown(kind, path, f"{FOLDER}/{name}")


def _link(source: Path, target: Path) -> None:
    """A second name of the same file, or a symbolic link: a set of clips may be larger than the disk has room for."""
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or a file of another user
        target.symlink_to(source.resolve())


def _is_played(path: Path) -> bool:
    with named(str(path)), open_container(str(path)) as container:
        return bool(container.streams.video) and container.streams.video[0].codec_context.name in _CODECS | {"libdav1d"}


def _png(source: Path, target: Path) -> None:
    decode_image(str(source)).save(target, "PNG")


def _wav(source: Path, target: Path) -> None:
    soundfile.write(target, decode_audio(str(source)), SAMPLE_RATE, format="WAV", subtype="PCM_16")


def _mp4(source: Path, target: Path) -> None:
    """Frames at their times, and the sound."""
    with named(str(source)), open_container(str(source)) as given:
        if not given.streams.video:
            raise MediaError(str(source), "has no picture")
        pictures = given.streams.video[0]
        scale = min(1.0, LONGEST_SIDE / max(pictures.width, pictures.height))
        width, height = (max(2, round(side * scale / 2) * 2) for side in (pictures.width, pictures.height))
        with av.open(str(target), "w", format="mp4", options={"movflags": "faststart"}) as made:
            video = made.add_stream("libx264", rate=Fraction(25), options={"preset": "veryfast", "crf": "23"})
            video.width, video.height, video.pix_fmt = width, height, "yuv420p"
            video.codec_context.time_base = Fraction(1, 1000)
            sound = made.add_stream("aac", rate=SAMPLE_RATE, layout="mono") if given.streams.audio else None
            last = -1
            for frame in given.decode(pictures):
                when = round(1000 * (frame.time or 0.0))
                if when > 1000 * MOST_SECONDS:
                    break
                if when > last:
                    last = when
                    picture = frame.reformat(width=width, height=height, format="yuv420p")
                    picture.pts, picture.time_base = when, Fraction(1, 1000)
                    made.mux(video.encode(picture))
            made.mux(video.encode(None))
            if sound is not None:
                wave = decode_audio(str(source))[None, : round(MOST_SECONDS * SAMPLE_RATE)]
                samples = av.AudioFrame.from_ndarray(np.ascontiguousarray(wave), format="fltp", layout="mono")
                samples.sample_rate, samples.pts = SAMPLE_RATE, 0
                made.mux(sound.encode(samples))
                made.mux(sound.encode(None))


_CONVERT = {"image": _png, "audio": _wav, "video": _mp4}
