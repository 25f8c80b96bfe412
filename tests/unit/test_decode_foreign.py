"""Files as other programs write them: late starts, no duration, deep grey, cover pictures; and what is no media file."""

import os
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from megatron_omni.config.model import AudioConfig
from megatron_omni.data.decode.cpu import (
    FrameSampling,
    decode_audio,
    decode_image,
    decode_video,
    probe_audio,
    probe_image,
    read_video_header,
)
from megatron_omni.data.decode.media import MediaBytes, MediaError
from megatron_omni.data.processors import log_mel
from tests.unit.media_files import tone

READERS = (decode_image, probe_image, decode_audio, probe_audio, read_video_header)
SAMPLING = FrameSampling(fps=2, min_frames=1, max_frames=8, max_frames_with_audio=8, sound=True)
CODECS = {".mkv": ("libx264", "aac"), ".webm": ("libvpx-vp9", "libopus"), ".flv": ("flv", "aac"),
          ".ts": ("libx264", "aac"), ".mp4": ("libx264", "aac")}  # fmt: skip


def write_recording(path: Path, *, start: int, picture: bool = True, live: bool = False) -> Path:
    """Two seconds of sound, and four frames a second, whose clock starts at ``start`` seconds."""
    codec, sound_codec = CODECS[path.suffix]
    with av.open(str(path), "w", options={"live": "1"} if live else {}) as out:
        video = out.add_stream(codec, rate=4) if picture else None
        audio = out.add_stream(sound_codec, rate=48000, layout="mono")
        if video is not None:
            video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
            video.codec_context.thread_count = 1
            for number in range(8):
                frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 20 * number, np.uint8), format="rgb24")
                frame.pts, frame.time_base = 4 * start + number, Fraction(1, 4)
                out.mux(video.encode(frame))
            out.mux(video.encode())
        sound = av.AudioFrame.from_ndarray(tone(2.0, rate=48000)[None], format="fltp", layout="mono")
        sound.sample_rate, sound.pts, sound.time_base = 48000, 48000 * start, Fraction(1, 48000)
        out.mux(audio.encode(sound))
        out.mux(audio.encode())
    return path


@pytest.mark.parametrize("suffix", CODECS)
def test_a_recording_that_starts_late_is_whole(tmp_path: Path, suffix: str) -> None:
    """Matroska and FLV say when a file ends, the others how long it is."""
    path = write_recording(tmp_path / f"a{suffix}", start=10)
    header = read_video_header(path)
    assert (header.num_frames, header.seconds, header.sound_samples) == (8, 2.0, 32000)
    video = decode_video(path, sampling=SAMPLING)
    assert np.allclose(video.times_seconds, [0.0, 0.5, 1.0, 1.5])
    assert video.sound is not None and abs(len(video.sound) - 32000) <= 400
    assert abs(probe_audio(path) - 32000) <= 1100 and abs(len(decode_audio(path)) - 32000) <= 800


@pytest.mark.parametrize("suffix", [".mkv", ".webm"])
@pytest.mark.parametrize("start", [0, 5])
def test_sound_alone_that_starts_late_or_was_recorded_live(tmp_path: Path, suffix: str, start: int) -> None:
    for live in (False, True):
        path = write_recording(tmp_path / f"a{suffix}", start=start, picture=False, live=live)
        with av.open(str(path)) as container:
            assert (container.duration is None) == live
        assert abs(probe_audio(path) - 32000) <= 1100 and abs(len(decode_audio(path)) - 32000) <= 400


def test_a_live_recording_has_no_duration_and_is_read(tmp_path: Path) -> None:
    path = write_recording(tmp_path / "a.webm", start=0, live=True)
    assert read_video_header(path).sound_samples == 32000
    assert len(decode_video(path, sampling=SAMPLING).frames) == 4
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])  # nothing promises what is missing
    assert read_video_header(path).num_frames < 8


def test_a_matroska_file_that_was_cut_off_is_still_found(tmp_path: Path) -> None:
    path = write_recording(tmp_path / "a.mkv", start=10, picture=False)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(MediaError, match="is cut off"):
        decode_audio(path)


def test_a_cover_picture_is_no_video_and_the_recording_is_sound(tmp_path: Path) -> None:
    path = tmp_path / "song.m4a"
    with av.open(str(path), "w", format="mp4") as out:
        audio = out.add_stream("aac", rate=48000, layout="mono")
        cover = out.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 48, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 20, np.uint8), format="rgb24")
        frame.pts, frame.time_base = 0, Fraction(1, 1)
        out.mux(cover.encode(frame))
        sound = av.AudioFrame.from_ndarray(tone(1.0, rate=48000)[None], format="fltp", layout="mono")
        sound.sample_rate, sound.pts, sound.time_base = 48000, 0, Fraction(1, 48000)
        out.mux(audio.encode(sound))
        out.mux(audio.encode())
    with pytest.raises(MediaError, match="no picture track but only the cover picture of a recording"):
        read_video_header(path)
    assert len(decode_audio(path)) == probe_audio(path) == 16000


# ------------------------------------------------------------------------------------------------ deep grey


def tiff(pixels: bytes, *, bits: int, width: int = 64, height: int = 8, white_is_zero: bool = False, form: int = 1,
         orientation: int = 1) -> MediaBytes:  # fmt: skip
    """A plain TIFF of one grey channel; ``form``: 1 unsigned, 2 signed."""
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: int(not white_is_zero), 273: 8, 274: orientation, 277: 1,
            278: height, 279: len(pixels), 339: form}  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = b"II*\0" + struct.pack("<I", 8 + len(pixels))
    return MediaBytes("a.tif", head + pixels + struct.pack("<H", len(tags)) + entries + bytes(4))


RAMP = np.linspace(0, 1, 64)[None].repeat(8, 0)
DEEP = (RAMP * 65535).astype("<u2").tobytes()
TWELVE = (RAMP * 4095).astype(np.uint16).reshape(-1, 2)
"""Two values in three bytes."""
TWELVE_BYTES = np.stack(
    [TWELVE[:, 0] >> 4, (TWELVE[:, 0] & 15) << 4 | TWELVE[:, 1] >> 8, TWELVE[:, 1] & 255], axis=1
).astype(np.uint8)


@pytest.mark.parametrize(
    ("picture", "expected"),
    [
        (tiff(DEEP, bits=16), RAMP),
        (tiff(DEEP, bits=16, white_is_zero=True), 1 - RAMP),
        (tiff(TWELVE_BYTES.tobytes(), bits=12), RAMP),
        (tiff((RAMP * 255).astype(np.uint8).tobytes(), bits=8), RAMP),
    ],
    ids=["16 bits", "0 is white", "12 bits", "8 bits"],
)
def test_deep_grey_is_scaled_by_its_own_depth(picture: MediaBytes, expected: np.ndarray) -> None:
    assert np.abs(np.asarray(decode_image(picture))[:, :, 0] - 255 * expected).max() <= 1


@pytest.mark.parametrize(
    ("dtype", "form", "said"),
    [("<i2", 2, "signed"), ("<i4", 2, "signed"), ("<u4", 1, "32-bit")],
)
def test_integers_without_a_range_are_refused(dtype: str, form: int, said: str) -> None:
    """They came out black or white, as the clip to 16 bits had it."""
    pixels = (RAMP * 255).astype(dtype)
    with pytest.raises(MediaError, match=f"{said} integers: their range is unknown; store it with 8 or 16 bits"):
        decode_image(tiff(pixels.tobytes(), bits=8 * pixels.itemsize, form=form))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_tiff_is_measured_as_it_is_decoded(orientation: int) -> None:
    picture = tiff(DEEP, bits=16, orientation=orientation)
    assert probe_image(picture) == decode_image(picture).size == ((8, 64) if orientation > 4 else (64, 8))


# ------------------------------------------------------------------------------------------------ no media


def test_a_pipe_is_refused_at_once_and_named(tmp_path: Path) -> None:
    """It held prepare_data, and a run without threads, for ever."""
    os.mkfifo(tmp_path / "pipe")
    for read in READERS:
        with pytest.raises(MediaError, match=r"pipe': no ordinary file \(a folder, a pipe or a device\)"):
            read(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("https://example.org/a.png", r"is a URL \(https://...\); media are read from files: download it"),
        ("/data/s3://bucket/a.wav", r"is a URL \(s3://...\)"),
        ("data:image/png;base64," + "/9jA" * 100_000, "is a data: URI; media are read from files"),
    ],
)
def test_urls_are_named_as_what_they_are(name: str, said: str) -> None:
    for read in READERS:
        with pytest.raises(MediaError, match=said) as caught:
            read(name)
        assert caught.value.reason == "missing_media" and len(str(caught.value)) < 500


def test_containers_that_are_not_read_are_told_which_are(tmp_path: Path) -> None:
    (tmp_path / "a.amr").write_bytes(b"#!AMR\n" + (b"\x3c" + bytes(31)) * 100)
    (tmp_path / "a.raw").write_bytes(bytes(32000))
    frames = [Image.new("RGB", (64, 48), (20 * i, 0, 0)) for i in range(4)]
    frames[0].save(tmp_path / "a.apng", format="PNG", save_all=True, append_images=frames[1:])
    with av.open(str(tmp_path / "a.ac3"), "w", format="ac3") as out:
        audio = out.add_stream("ac3", rate=48000, layout="mono")
        sound = av.AudioFrame.from_ndarray(tone(1.0, rate=48000)[None], format="fltp", layout="mono")
        sound.sample_rate, sound.pts, sound.time_base = 48000, 0, Fraction(1, 48000)
        out.mux(audio.encode(sound))
        out.mux(audio.encode())
    for name, read in (("a.amr", decode_audio), ("a.raw", decode_audio), ("a.ac3", probe_audio),
                       ("a.apng", read_video_header)):  # fmt: skip
        with pytest.raises(MediaError, match=r"no container that is read \(MP4, MOV, .* AV1\): convert it to one"):
            read(tmp_path / name)
    with pytest.raises(MediaError, match=r"is no picture that is read \(.*JPEG, .*PNG"):
        decode_image(tmp_path / "a.amr")


def test_no_message_holds_an_address() -> None:
    """An index keeps messages, and has to be the same bytes whenever it is made."""
    for data in (b"", b"xx", bytes(5000), b"RIFF" + bytes(60), b"\x89PNG\r\n\x1a\n" + bytes(60)):
        for read in READERS:
            with pytest.raises(MediaError) as caught:
                read(MediaBytes("a", data))
            assert " at 0x" not in str(caught.value) and "BytesIO" not in str(caught.value)


@pytest.mark.parametrize("value", [17.0, 1e5, 1e20, 3e38, -3e38, np.inf, np.nan])
def test_samples_far_beyond_sound_are_refused(value: float) -> None:
    """The power of 1e20 overflows, and the features of one such sample are NaN for the whole chunk."""
    wave = tone(2.0)
    wave[100] = value
    with pytest.raises(ValueError, match=r"samples (up to .* sound lies in \[-1, 1\]|that are not finite)"):
        log_mel(wave, AudioConfig())
    wave[100] = np.clip(np.nan_to_num(value), -15, 15)  # mixed far too loud, and finite
    assert log_mel(wave, AudioConfig()).isfinite().all()
