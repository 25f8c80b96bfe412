"""Decode pictures, sound and video on the CPU: Pillow, soundfile and PyAV. The reference for every other decoder.

    decode_image(file) -> upright 8-bit RGB picture
    decode_audio(file) -> [samples] float32, mono, 16 kHz
    decode_video(file) -> sampled frames with their true times, and the sound that goes with them

``probe_*`` read headers only (of a video without frame count, the packet list) and say how large the result will be;
the loader balances lengths with them. What ``decode_*`` returns is the truth: it may differ slightly from the header.
A file is given by its path or as ``MediaBytes``; whatever is wrong with it is one ``MediaError`` (decode/media.py).
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from math import ceil
from typing import BinaryIO

import numpy as np
import soundfile
from numpy.typing import NDArray
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

from megatron_omni.data.decode.container import (
    decode_track,
    decode_video,
    open_container,
    read_video_header,
    track_seconds,
)
from megatron_omni.data.decode.media import (
    MAX_AUDIO_SECONDS,
    FrameSampling,
    Media,
    MediaBytes,
    MediaError,
    Video,
    VideoHeader,
    VideoSize,
    check_pixels,
    check_rate,
    check_seconds,
    check_whole,
    named,
    open_media,
)
from megatron_omni.data.decode.resample import to_sample_rate
from megatron_omni.positions import SAMPLE_RATE

__all__ = [
    "FrameSampling", "Media", "MediaBytes", "MediaError", "Video", "VideoHeader", "VideoSize",
    "decode_audio", "decode_image", "decode_video", "fallbacks", "open_image", "open_sound", "orientation", "probe_audio",
    "probe_image", "probe_video", "read_video_header", "to_rgb", "to_sample_rate",
]  # fmt: skip

_PICTURE_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")
_EXIF_ORIENTATION, _EXIF_TRANSPOSED = 0x0112, (5, 6, 7, 8)
_TIFF_WIDTH, _TIFF_HEIGHT, _TIFF_BITS, _TIFF_PHOTOMETRIC, _TIFF_SAMPLES = 256, 257, 258, 262, 339
_STRIP_PIXELS = 1 << 20
_BLOCK_VALUES = 1 << 22
"""Values of sound that are read at once, over all channels: a header may promise more than the file holds."""

fallbacks: Mapping[str, int] = {}
"""Of the interface: this back end reads everything itself."""

# ------------------------------------------------------------------------------------------------ pictures


def decode_image(file: Media) -> Image.Image:
    """The picture as 8-bit RGB, upright (the first one of an animation)."""
    with named(file), open_image(file) as image:
        return to_rgb(image)


def probe_image(file: Media) -> tuple[int, int]:
    """(width, height) of the upright picture."""
    with named(file), open_image(file) as image:
        width, height = image.size
        if isinstance(image, TiffImagePlugin.TiffImageFile):  # Pillow has swapped a turned one's sides already, or not
            width, height = image.tag_v2[_TIFF_WIDTH], image.tag_v2[_TIFF_HEIGHT]
        return (height, width) if orientation(image) in _EXIF_TRANSPOSED else (width, height)


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB with the EXIF orientation applied and transparency laid over white.

    White, because most transparent pictures are dark drawings meant for a page. 16-bit grey is scaled to 8 bits
    (Pillow's own conversion clips it). ValueError for pictures of floats, signed or 32-bit integers: their range is not
    known.
    """
    grey = _deep_grey(image)
    image.load()
    if orientation(image) != 1:  # exif_transpose copies every picture
        image = ImageOps.exif_transpose(image)
    if grey is not None:
        bits, inverted = grey
        values = np.clip(np.asarray(image), 0, (1 << bits) - 1) >> (bits - 8)
        image = Image.fromarray((255 - values if inverted else values).astype(np.uint8))
    if image.has_transparency_data:
        return _over_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _deep_grey(image: Image.Image) -> tuple[int, bool] | None:
    """(bits, whether 0 is white) of grey with more than 8 bits, None for other pictures; ask before the pixels are read."""
    if image.mode == "F":
        raise ValueError("picture of 32-bit floats: their range is unknown; store it with 8 or 16 bits a channel")
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return None
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        if image.mode == "I" and image.format not in ("PNG", "PPM"):  # these two mean 0 to 65535 by it
            raise ValueError("picture of 32-bit integers: their range is unknown; store it with 8 or 16 bits a channel")
        return 16, False
    bits, signed = image.tag_v2.get(_TIFF_BITS, (16,))[0], image.tag_v2.get(_TIFF_SAMPLES, (1,))[0] != 1
    if signed or bits > 16:
        kind = "signed" if signed else f"{bits}-bit"
        raise ValueError(f"picture of {kind} integers: their range is unknown; store it with 8 or 16 bits a channel")
    return bits, image.tag_v2.get(_TIFF_PHOTOMETRIC, 1) == 0


def _over_white(image: Image.Image) -> Image.Image:
    """In strips: a whole picture would be there four times."""
    out = Image.new("RGB", image.size)
    rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height))).convert("RGBA")
        out.paste(Image.alpha_composite(Image.new("RGBA", strip.size, "white"), strip).convert("RGB"), (0, top))
    return out


@contextmanager
def open_image(file: Media) -> Iterator[Image.Image]:
    """The picture with its header read; MediaError above MAX_PIXELS or for no picture, Pillow's errors for the rest."""
    with open_media(file) as stream:
        try:
            image = Image.open(stream, formats=_picture_formats())
        except UnidentifiedImageError as error:
            raise MediaError(file, f"is no picture that is read ({', '.join(_picture_formats())})") from error
        with image:
            check_pixels(file, image.width, image.height)
            yield image


def orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 for upright."""
    return image.getexif().get(_EXIF_ORIENTATION, 1)


@lru_cache(maxsize=1)
def _picture_formats() -> tuple[str, ...]:
    """The wanted formats that this build of Pillow has: the others would be a KeyError on every picture."""
    Image.init()
    return tuple(sorted(_PICTURE_FORMATS & Image.OPEN.keys()))


# ------------------------------------------------------------------------------------------------ sound


def decode_audio(
    file: Media, *, max_seconds: float = MAX_AUDIO_SECONDS, sample_rate: int = SAMPLE_RATE
) -> NDArray[np.float32]:
    """[samples] float32 mono, 16 kHz or ``sample_rate``: channels averaged, resampled with a polyphase filter.

    soundfile reads wav, flac, ogg, opus and mp3; PyAV reads the rest (m4a, aac, the sound track of a video).
    """
    with named(file):
        with open_sound(file) as sound:
            if sound is not None:
                check_rate(file, sound.samplerate)
                rate, promised = sound.samplerate, sound.frames / sound.samplerate
                check_seconds(file, promised, max_seconds)
                samples = _read_mono(sound)
        if sound is None:
            samples, rate, promised = decode_track(file, max_seconds)
        if not len(samples):
            raise MediaError(file, "holds no sound samples")
        check_whole(file, len(samples) / rate, promised)
        return to_sample_rate(samples, rate, wanted=sample_rate)


def probe_audio(file: Media, *, max_seconds: float = MAX_AUDIO_SECONDS) -> int:
    """Samples at 16 kHz, from the header."""
    with named(file):
        with open_sound(file) as sound:
            seconds = sound.frames / sound.samplerate if sound is not None else 0.0
        if sound is None:
            with open_container(file) as container:
                seconds = track_seconds(container, file)
        check_seconds(file, seconds, max_seconds)
        return ceil(seconds * SAMPLE_RATE)


def _read_mono(sound: soundfile.SoundFile) -> NDArray[np.float32]:
    """[samples] float32: mean of the channels."""
    block, parts, left = max(1, _BLOCK_VALUES // sound.channels), [], sound.frames
    while left > 0:
        values = sound.read(min(left, block), dtype="float32", always_2d=True)
        if not len(values):
            break
        parts.append(values[:, 0] if sound.channels == 1 else values.mean(axis=1))
        left -= len(values)
    return parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0, np.float32), *parts])


@contextmanager
def open_sound(file: Media) -> Iterator[soundfile.SoundFile | None]:
    """The file opened by soundfile, None for a format that it does not know; MediaError for a WAV that was cut off."""
    with open_media(file) as stream:
        start, size = stream.read(8), stream.seek(0, os.SEEK_END)
        stream.seek(0)
        # mp4 and matroska: libsndfile searches long before it refuses.
        sound = None if start[4:] == b"ftyp" or start[:4] == b"\x1aE\xdf\xa3" else _sound_of(stream)
        if sound is None:
            yield None
            return
        with sound:
            if start[:4] == b"RIFF":  # libsndfile takes what is there, however much the header promises
                promised_bytes = int.from_bytes(start[4:], "little")
                streamed = promised_bytes == 0 or promised_bytes % (1 << 31) >= (1 << 31) - 4096  # written to a pipe
                check_rate(file, sound.samplerate)
                seconds = sound.frames / sound.samplerate
                check_whole(file, seconds, 0.0 if streamed else seconds * (promised_bytes + 8) / size)
            yield sound


def _sound_of(stream: BinaryIO) -> soundfile.SoundFile | None:
    try:
        return soundfile.SoundFile(stream)
    except soundfile.LibsndfileError:
        return None


# ------------------------------------------------------------------------------------------------ video


def probe_video(file: Media, *, sampling: FrameSampling) -> VideoSize:
    """Sampled frames and samples of sound that the headers promise."""
    return read_video_header(file).sampled(sampling)
