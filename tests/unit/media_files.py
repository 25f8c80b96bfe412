"""Real encoded files of every kind that the decoders meet, made with the encoders at hand."""

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import soundfile
from PIL import Image

CODECS = {".mp4": "libx264", ".webm": "libvpx-vp9", ".mkv": "libx264", ".avi": "mjpeg"}


def tone(seconds: float, *, rate: int = 16000, hertz: float = 440.0, level: float = 0.5) -> np.ndarray:
    return (level * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def scene(width: int, height: int, *, shift: int = 0) -> np.ndarray:
    """[height, width, 3]: smooth colours with a bright square at ``shift``, so that frames and sides differ."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    picture = np.stack([200 * x, 120 + 100 * y * (1 - x), 230 * (1 - y)], axis=2).astype(np.uint8)
    picture[height // 4 : height // 2, shift % width : shift % width + max(width // 5, 1)] = (250, 240, 30)
    return picture


def write_scenes(
    path: Path, *, codec: str, num_frames: int = 24, times: list[float] | None = None, rate: int = 8,
    size: tuple[int, int] = (96, 64), options: dict[str, str] | None = None, turned: int = 0,
    sound: np.ndarray | None = None,
) -> Path:  # fmt: skip
    """A clip of ``scene`` moving by 4 px a frame, ``rate`` frames a second or at ``times``; sound at 48 kHz, AAC or Opus."""
    ticks = 1000 if times else rate
    times = times or [i / rate for i in range(num_frames)]
    with av.open(str(path), "w") as container:
        video = container.add_stream(codec, rate=ticks, options=options or {})
        video.width, video.height = size
        video.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        video.codec_context.time_base = Fraction(1, ticks)
        video.codec_context.thread_count = 1
        if turned:
            video.set_display_rotation(turned)
        audio = None
        if sound is not None:
            audio = container.add_stream("libopus" if path.suffix == ".webm" else "aac", rate=48000, layout="mono")
        for index, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(scene(*size, shift=4 * index), format="rgb24")
            frame.time_base = video.codec_context.time_base
            frame.pts = round(time / frame.time_base)
            container.mux(video.encode(frame))
        container.mux(video.encode())
        if audio is not None and sound is not None:
            samples = av.AudioFrame.from_ndarray(np.atleast_2d(sound), format="fltp", layout="mono")
            samples.sample_rate, samples.pts, samples.time_base = 48000, 0, Fraction(1, 48000)
            container.mux(audio.encode(samples))
            container.mux(audio.encode())
    return path


def write_pictures(folder: Path) -> Iterator[Path]:
    """JPEG (baseline, progressive, grey, CMYK, turned), PNG (RGB, alpha, palette, grey, 16 bit), WebP, GIF, TIFF, ...;
    odd sizes, one pixel, several megapixels."""
    picture = Image.fromarray(scene(75, 51))
    turned = Image.Exif()
    turned[0x0112] = 6
    alpha = picture.copy()
    alpha.putalpha(Image.fromarray(np.linspace(0, 255, 75 * 51).reshape(51, 75).astype(np.uint8)))
    deep = Image.fromarray((np.arange(75 * 51).reshape(51, 75) * 17).astype(np.uint16))
    for name, image, options in (
        ("rgb.jpg", picture, {"quality": 90}),
        ("progressive.jpg", picture, {"progressive": True}),
        ("chroma.jpg", picture, {"subsampling": 0}),
        ("grey.jpg", picture.convert("L"), {}),
        ("cmyk.jpg", picture.convert("CMYK"), {}),
        ("turned.jpg", picture, {"exif": turned}),
        ("one.jpg", picture.crop((0, 0, 1, 1)), {}),
        ("rgb.png", picture, {}),
        ("turned.png", picture, {"exif": turned}),
        ("grey.png", picture.convert("L"), {}),
        ("bits.png", picture.convert("1"), {}),
        ("palette.png", picture.quantize(16), {}),
        ("alpha.png", alpha, {}),
        ("deep.png", deep, {}),
        ("one.png", picture.crop((0, 0, 1, 1)), {}),
        ("lossy.webp", picture, {"quality": 80}),
        ("lossless.webp", picture, {"lossless": True}),
        ("alpha.webp", alpha, {"lossless": True}),
        ("a.gif", picture, {}),
        ("a.bmp", picture, {}),
        ("a.tiff", picture, {"compression": "tiff_lzw"}),
        ("a.ppm", picture, {}),
        ("large.jpg", Image.fromarray(scene(2601, 1733)), {}),
    ):
        image.save(folder / name, **options)
        yield folder / name


def write_sounds(folder: Path) -> Iterator[Path]:
    """WAV (8, 16, 24 bit, float), FLAC, Ogg, MP3, AAC in MP4; one to six channels at 8 to 48 kHz."""
    for name, rate, channels, options in (
        ("a.wav", 44100, 2, {}),
        ("b.wav", 8000, 1, {"subtype": "PCM_U8"}),
        ("c.wav", 48000, 6, {"subtype": "PCM_24"}),
        ("d.wav", 22050, 1, {"subtype": "FLOAT"}),
        ("a.flac", 16000, 1, {}),
        ("b.flac", 44100, 2, {}),
        ("a.ogg", 48000, 2, {}),
        ("b.ogg", 48000, 1, {"subtype": "OPUS"}),
        ("a.mp3", 44100, 2, {}),
    ):
        wave = np.stack([tone(0.8, rate=rate, hertz=300.0 * (i + 1)) for i in range(channels)], axis=1)
        soundfile.write(folder / name, wave, rate, **options)
        yield folder / name
    with av.open(str(folder / "a.m4a"), "w") as container:
        stream = container.add_stream("aac", rate=44100, layout="stereo")
        frame = av.AudioFrame.from_ndarray(np.stack([tone(0.8, rate=44100)] * 2), format="fltp", layout="stereo")
        frame.sample_rate, frame.pts = 44100, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    yield folder / "a.m4a"


def write_videos(folder: Path) -> Iterator[Path]:
    """H.264, HEVC, VP8, VP9, MPEG-4, MJPEG, AV1; B frames, open groups of pictures, gradual refresh, variable rate,
    turned, with and without sound."""
    uneven = [0.0, 0.1, 0.15, 0.4, 0.9, 1.0, 1.3, 2.0]
    x264 = {"x264-params": "keyint=8:min-keyint=8:bframes=3:scenecut=0"}
    sound = tone(3.0, rate=48000)
    yield write_scenes(folder / "h264.mp4", codec="libx264", options=x264, sound=sound)
    yield write_scenes(folder / "h264_plain.mp4", codec="libx264")
    open_groups = {"x264-params": "keyint=8:min-keyint=8:bframes=3:scenecut=0:open-gop=1:b-pyramid=normal"}
    yield write_scenes(folder / "h264_open.mkv", codec="libx264", options=open_groups)
    gradual = {"x264-params": "keyint=8:intra-refresh=1:bframes=0:scenecut=0"}
    yield write_scenes(folder / "h264_gradual.mkv", codec="libx264", options=gradual)
    yield write_scenes(folder / "h264_uneven.mp4", codec="libx264", times=uneven)
    yield write_scenes(folder / "h264_turned.mp4", codec="libx264", turned=90)
    yield write_scenes(folder / "h264.avi", codec="libx264", options=x264)
    yield write_scenes(folder / "h264.ts", codec="libx264", options=x264)
    yield write_scenes(folder / "hevc.mp4", codec="libx265", options={"x265-params": "keyint=8:log-level=none"})
    yield write_scenes(folder / "vp9.webm", codec="libvpx-vp9", options={"g": "8"}, sound=sound)
    yield write_scenes(folder / "vp9_uneven.webm", codec="libvpx-vp9", times=uneven)
    yield write_scenes(folder / "vp8.webm", codec="libvpx", options={"g": "8"})
    yield write_scenes(folder / "mpeg4.mp4", codec="mpeg4", options={"bf": "2", "g": "8"}, sound=sound)
    yield write_scenes(folder / "mpeg4.avi", codec="mpeg4", options={"bf": "2", "g": "8"})
    yield write_scenes(folder / "mjpeg.mov", codec="mjpeg")
    yield write_scenes(folder / "av1.mp4", codec="libsvtav1", options={"preset": "12", "g": "8"})
