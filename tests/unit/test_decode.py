"""Decoding of really encoded files: values, times, rotation, sound in step, and one named error for every bad file."""

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from PIL import Image

from megatron_omni.data.decode import media
from megatron_omni.data.decode.cpu import (
    FrameSampling,
    MediaError,
    decode_audio,
    decode_image,
    decode_video,
    probe_audio,
    probe_image,
    probe_video,
)

ALL_FRAMES = FrameSampling(fps=100.0, min_frames=1, max_frames=64, max_frames_with_audio=64, sound=False)
CODECS = {".mp4": "libx264", ".webm": "libvpx-vp9", ".mkv": "libx264", ".avi": "mjpeg"}


def tone(seconds: float, *, rate: int = 16000, hertz: float = 440.0, level: float = 0.5) -> np.ndarray:
    return (level * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def write_video(
    path: Path, levels: list[int], *, times: list[float] | None = None, rate: int = 2, sound: np.ndarray | None = None,
    sound_start: float = 0.0, size: int = 64, marked: bool = False,
) -> Path:  # fmt: skip
    """Frames of one grey level each (``marked``: upper left quarter white), at ``times`` or at ``rate`` a second."""
    ticks = 1000 if times else rate  # a variable rate needs a fine clock
    times = times or [i / rate for i in range(len(levels))]
    with av.open(str(path), "w") as container:
        video = container.add_stream(CODECS[path.suffix], rate=ticks)
        video.width = video.height = size
        video.pix_fmt = "yuvj420p" if path.suffix == ".avi" else "yuv420p"
        video.codec_context.time_base = Fraction(1, ticks)
        video.codec_context.thread_count = 1
        codec = "libopus" if path.suffix == ".webm" else "aac"
        audio = container.add_stream(codec, rate=48000, layout="mono") if sound is not None else None
        for level, time in zip(levels, times):
            picture = np.full((size, size, 3), level, np.uint8)
            if marked:
                picture[: size // 2, : size // 2] = 255
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.time_base = video.codec_context.time_base
            frame.pts = round(time / frame.time_base)
            container.mux(video.encode(frame))
        container.mux(video.encode())
        if audio is not None:
            frame = av.AudioFrame.from_ndarray(np.atleast_2d(sound), format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 48000, round(sound_start * 48000), Fraction(1, 48000)
            container.mux(audio.encode(frame))
            container.mux(audio.encode())
    return path


def levels_of(frames: list[np.ndarray]) -> list[float]:
    return [float(frame.mean()) for frame in frames]


# ------------------------------------------------------------------------------------------------ pictures


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.webp", "a.tiff", "a.gif", "a.jpg"])
def test_pictures_of_every_format(tmp_path, name):
    pixels = np.zeros((6, 9, 3), np.uint8)
    pixels[:, 4:] = (200, 100, 50)
    Image.fromarray(pixels).save(tmp_path / name, **({"lossless": True} if name == "a.webp" else {}))
    image = decode_image(tmp_path / name)
    assert probe_image(tmp_path / name) == image.size == (9, 6)
    error = np.abs(np.asarray(image.convert("RGB")).astype(int) - pixels).max()
    assert error == 0 if name != "a.jpg" else error < 60


def test_probe_gives_the_size_of_the_upright_picture(tmp_path):
    image = Image.new("RGB", (8, 4))
    for orientation, size in ((1, (8, 4)), (3, (8, 4)), (6, (4, 8)), (8, (4, 8))):
        exif = Image.Exif()
        exif[0x0112] = orientation
        image.save(tmp_path / "a.jpg", exif=exif)
        assert probe_image(tmp_path / "a.jpg") == size


def test_a_picture_above_the_limit_is_refused_unread(tmp_path, monkeypatch):
    """The file ends where its pixels would begin: reading any of them would be another error."""
    Image.new("1", (300, 200)).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "bomb.png").write_bytes(whole[: whole.index(b"IDAT") + 4])
    monkeypatch.setattr(media, "MAX_PIXELS", 59_999)
    for function in (decode_image, probe_image):
        with pytest.raises(MediaError, match=r"bomb.png': 300 x 200 pixels, above the limit of 59999") as caught:
            function(tmp_path / "bomb.png")
        assert caught.value.reason == "media_too_large"


# ------------------------------------------------------------------------------------------------ sound


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg", "a.mp3", "a.m4a", "a.mka"])
@pytest.mark.parametrize("rate", [16000, 44100, 8000])
def test_sound_of_every_format_and_rate_keeps_its_tone(tmp_path, name, rate):
    """Stereo with a tone on one side becomes 16 kHz mono of the same length, at the same pitch and half the level."""
    path, wave = tmp_path / name, tone(1.0, rate=rate)
    stereo = np.stack([wave, np.zeros_like(wave)])
    if path.suffix in (".m4a", ".mka"):
        with av.open(str(path), "w") as container:
            stream = container.add_stream("aac" if path.suffix == ".m4a" else "flac", rate=rate, layout="stereo")
            frame = av.AudioFrame.from_ndarray((stereo * 32767).astype(np.int16), format="s16p", layout="stereo")
            frame.sample_rate, frame.pts = rate, 0
            resampler = av.AudioResampler(format=stream.codec_context.format, layout="stereo", rate=rate)
            for part in resampler.resample(frame):
                container.mux(stream.encode(part))
            container.mux(stream.encode())
    else:
        soundfile.write(path, stereo.T, rate)
    samples = decode_audio(path)
    assert samples.dtype == np.float32 and samples.ndim == 1
    assert abs(len(samples) - 16000) <= 400 and abs(probe_audio(path) - len(samples)) <= 1100
    middle = samples[4000:12000]
    spectrum = np.abs(np.fft.rfft(middle))
    assert spectrum.argmax() * 2 == 440  # bins of 2 Hz
    assert np.sqrt((middle**2).mean()) == pytest.approx(0.25 / np.sqrt(2), rel=0.05)


def test_sound_at_16_khz_is_read_exactly(tmp_path):
    wave = np.random.default_rng(0).integers(-(2**15), 2**15, 1234).astype(np.float32) / 2**15
    soundfile.write(tmp_path / "a.flac", wave, 16000, subtype="PCM_16")
    assert np.array_equal(decode_audio(tmp_path / "a.flac"), wave)
    assert probe_audio(tmp_path / "a.flac") == 1234


def test_length_after_resampling_is_what_the_probe_says(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(1.0001, rate=44100), 44100)
    assert len(decode_audio(tmp_path / "a.wav")) == probe_audio(tmp_path / "a.wav") == 16002


def test_the_sound_track_of_a_video_is_sound(tmp_path):
    path = write_video(tmp_path / "a.mp4", [10, 20], sound=tone(1.0, rate=48000))
    samples = decode_audio(path)
    assert abs(len(samples) - 16000) <= 400
    spectrum = np.abs(np.fft.rfft(samples[2000:14000]))
    assert spectrum.argmax() * 16000 / 12000 == pytest.approx(440, abs=2)
    assert samples[2000:14000].std() == pytest.approx(0.5 / 2**0.5, rel=0.05)


def test_a_clip_above_the_limit_is_refused_unread(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(32000, np.float32), 16000)
    for function in (decode_audio, probe_audio):
        with pytest.raises(MediaError, match=r"2.0 s of sound, above the limit of 1.5 s"):
            function(tmp_path / "a.wav", max_seconds=1.5)
    path = write_video(tmp_path / "a.mp4", [10, 20], sound=tone(1.0, rate=48000))
    with pytest.raises(MediaError, match=r"s of sound, above the limit of 0.5 s"):
        decode_audio(path, max_seconds=0.5)


# ------------------------------------------------------------------------------------------------ video


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".mkv", ".avi"])
def test_all_frames_with_their_times(tmp_path, suffix):
    path = write_video(tmp_path / f"a{suffix}", [20, 90, 160, 230])
    video = decode_video(path, sampling=ALL_FRAMES)
    assert video.times_seconds == pytest.approx((0.0, 0.5, 1.0, 1.5), abs=2e-3)
    assert levels_of(video.frames) == pytest.approx([20, 90, 160, 230], abs=4)
    assert all(frame.shape == (64, 64, 3) and frame.dtype == np.uint8 for frame in video.frames)
    assert video.sound is None
    assert probe_video(path, sampling=ALL_FRAMES).num_frames == 4


def test_frames_nearest_to_the_wanted_times(tmp_path):
    path = write_video(tmp_path / "a.mp4", list(range(20, 240, 10)), rate=10)  # 2.2 s
    sampling = FrameSampling(fps=2.0, min_frames=1, max_frames=8, max_frames_with_audio=8, sound=True)
    video = decode_video(path, sampling=sampling)
    assert video.times_seconds == pytest.approx((0.0, 0.5, 1.0, 1.5))
    assert levels_of(video.frames) == pytest.approx([20, 70, 120, 170], abs=4)


def test_frames_of_a_variable_rate_keep_their_true_times(tmp_path):
    """Sampled at 1 a second; times count from the first frame, which the file has at 0.3 s."""
    times = [0.3, 0.4, 1.1, 1.25, 2.7, 3.3]
    path = write_video(tmp_path / "a.mkv", [10, 50, 90, 130, 170, 210], times=times)
    video = decode_video(
        path, sampling=FrameSampling(fps=1.0, min_frames=1, max_frames=3, max_frames_with_audio=3, sound=False)
    )
    assert video.times_seconds == pytest.approx((0.0, 0.95, 2.4), abs=2e-3)  # wanted 0.3, 1.3, 2.3
    assert levels_of(video.frames) == pytest.approx([10, 130, 170], abs=4)


def test_rotation_metadata_turns_the_frames_upright(tmp_path):
    path = write_video(tmp_path / "a.mp4", [0, 0], marked=True)
    data = path.read_bytes()
    upright = struct.pack(">9i", 0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)
    quarter_turn = struct.pack(">9i", 0, 0x10000, 0, -0x10000, 0, 0, 0, 0, 0x40000000)  # x' = -y, y' = x: clockwise
    place = data.index(upright, data.index(b"tkhd"))
    path.write_bytes(data[:place] + quarter_turn + data[place + 36 :])
    frame = decode_video(path, sampling=ALL_FRAMES).frames[0]
    quarters = [frame[:32, :32], frame[:32, 32:], frame[32:, :32], frame[32:, 32:]]
    assert [int(q.mean() > 128) for q in quarters] == [0, 1, 0, 0]  # upper left went to the upper right


def test_sound_starts_with_the_first_frame_and_ends_with_the_picture(tmp_path):
    """A click 1.0 s into the sound track; the picture runs from 0.5 s to 1.5 s (its last frame lasts one tick)."""
    wave = np.zeros(3 * 48000, np.float32)
    wave[48000:48480] = tone(0.01, rate=48000, hertz=1000.0)
    path = write_video(tmp_path / "a.mkv", [50, 60, 70], times=[0.5, 1.0, 1.5], sound=wave)
    sampling = FrameSampling(fps=2.0, min_frames=1, max_frames=8, max_frames_with_audio=8, sound=True)
    video = decode_video(path, sampling=sampling)
    assert video.sound is not None
    assert len(video.sound) == pytest.approx(16000, abs=20)
    assert np.abs(video.sound).argmax() / 16000 == pytest.approx(0.5, abs=0.03)


def test_sound_that_starts_late_is_preceded_by_silence(tmp_path):
    path = write_video(tmp_path / "a.mkv", [50, 60, 70, 80], sound=tone(1.0, rate=48000), sound_start=1.0)
    video = decode_video(
        path, sampling=FrameSampling(fps=2.0, min_frames=1, max_frames=8, max_frames_with_audio=8, sound=True)
    )
    assert video.sound is not None
    assert np.abs(video.sound[:14000]).max() < 0.01 and np.abs(video.sound[18000:30000]).max() > 0.4


def test_the_limit_of_frames_depends_on_sound(tmp_path):
    sampling = FrameSampling(fps=2.0, min_frames=1, max_frames=6, max_frames_with_audio=3, sound=True)
    levels = list(range(10, 90, 10))
    silent = write_video(tmp_path / "a.mp4", levels)
    voiced = write_video(tmp_path / "b.mp4", levels, sound=tone(4.0, rate=48000))
    assert len(decode_video(silent, sampling=sampling).frames) == probe_video(silent, sampling=sampling).num_frames == 6
    assert len(decode_video(voiced, sampling=sampling).frames) == probe_video(voiced, sampling=sampling).num_frames == 3
    assert probe_video(voiced, sampling=sampling).sound_samples == 64000


# ------------------------------------------------------------------------------------------------ bad files


@pytest.mark.parametrize(
    "function",
    [decode_image, probe_image, decode_audio, probe_audio,
     lambda f: decode_video(f, sampling=ALL_FRAMES), lambda f: probe_video(f, sampling=ALL_FRAMES)],
)  # fmt: skip
def test_missing_empty_and_wrong_files_are_named(tmp_path, function):
    with pytest.raises(MediaError, match=r"media file '.*absent.mp4': no such file") as caught:
        function(tmp_path / "absent.mp4")
    assert caught.value.reason == "missing_media"
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    for name in ("empty.mp4", "noise.mp4", "."):
        with pytest.raises(MediaError, match="media file '"):
            function(tmp_path / name)


def test_a_picture_cut_short_is_named(tmp_path):
    Image.effect_noise((64, 64), 50).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:2000])
    with pytest.raises(MediaError, match=r"a.png': OSError"):
        decode_image(tmp_path / "a.png")


def test_a_video_cut_short_is_named(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (40, 64, 64, 3), dtype=np.uint8)
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=10, options={"g": "5", "bf": "0"})
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for picture in noise:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 6 // 10])
    with pytest.raises(MediaError, match=r"a.mp4': "):
        decode_video(path, sampling=ALL_FRAMES)


def test_a_file_without_the_wanted_track_is_named(tmp_path):
    silent = write_video(tmp_path / "a.mp4", [1, 2])
    with pytest.raises(MediaError, match="has no sound track"):
        decode_audio(silent)
    soundfile.write(tmp_path / "a.wav", tone(0.1), 16000)
    with pytest.raises(MediaError, match="has no picture track"):
        decode_video(tmp_path / "a.wav", sampling=ALL_FRAMES)
    soundfile.write(tmp_path / "b.wav", np.zeros(0, np.float32), 16000)
    with pytest.raises(MediaError, match="holds no sound samples"):
        decode_audio(tmp_path / "b.wav")


def test_a_playlist_cannot_lead_to_another_file(tmp_path):
    video = write_video(tmp_path / "a.mp4", [1, 2])
    (tmp_path / "list.mp4").write_text(f"ffconcat version 1.0\nfile {video.name}\n")
    (tmp_path / "list.m3u8").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{video}\n#EXT-X-ENDLIST\n")
    for name in ("list.mp4", "list.m3u8"):
        with pytest.raises(MediaError):
            decode_video(tmp_path / name, sampling=ALL_FRAMES)


def test_random_damage_is_an_error_or_a_result_never_anything_else(tmp_path):
    write_video(tmp_path / "a.mp4", [10, 90, 170], sound=tone(1.5, rate=48000))
    Image.effect_noise((32, 32), 50).save(tmp_path / "a.png")
    soundfile.write(tmp_path / "a.ogg", tone(0.5), 16000)
    sampling = FrameSampling(fps=2.0, min_frames=1, max_frames=8, max_frames_with_audio=8, sound=True)
    cases = [("a.mp4", lambda f: decode_video(f, sampling=sampling)), ("a.png", decode_image), ("a.ogg", decode_audio)]
    rng, outcomes = np.random.default_rng(7), []
    for name, function in cases:
        good = (tmp_path / name).read_bytes()
        for _ in range(25):
            data = bytearray(good)
            for place in rng.integers(0, len(data), 8):
                data[place] ^= 1 << int(rng.integers(8))
            (tmp_path / f"bad_{name}").write_bytes(bytes(data))
            try:
                function(tmp_path / f"bad_{name}")
                outcomes.append("result")
            except MediaError:
                outcomes.append("error")
    assert outcomes.count("error") > 20
