"""Both back ends on the same files: every frame that is sampled equals a plain decode, and DALI agrees with the CPU."""

import importlib.util
import logging
import shutil
import sys
import weakref
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from megatron_omni.config.model import VisionConfig
from megatron_omni.data.decode import Decoder, container, cpu, open_decoder
from megatron_omni.data.decode.media import FrameSampling, MediaBytes, MediaError
from megatron_omni.data.loader import StepLoader
from megatron_omni.data.processors import frame_tiles, square
from tests.unit.media_files import scene, write_pictures, write_scenes, write_sounds, write_videos
from tests.unit.tiny_data import row, tiny_recipe, write_source

needs_dali = pytest.mark.skipif(
    importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None,
    reason="NVIDIA DALI is not installed (extra [dali], 700 MB)",
)
ASSETS = Path(__file__).resolve().parents[2] / "examples" / "quickstart" / "assets"
ALL = FrameSampling(fps=1000.0, min_frames=1, max_frames=1000, max_frames_with_audio=1000, sound=True)
SPARSE = FrameSampling(fps=1.0, min_frames=1, max_frames=8, max_frames_with_audio=8, sound=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("media")


@pytest.fixture(scope="module")
def videos(folder: Path) -> list[Path]:
    return list(write_videos(folder))


def plain_frames(path: Path) -> tuple[list[np.ndarray], list[float]]:
    """All frames by PyAV alone, in the order in which they leave the decoder, and their times after the first."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    times = sorted(frame.time for frame in frames)
    pictures = [np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90)) for frame in frames]
    return pictures, [time - times[0] for time in times]


def as_bytes(path: Path) -> MediaBytes:
    return MediaBytes(path.name, path.read_bytes())


# ------------------------------------------------------------------------------------------------ CPU


def test_sampled_frames_are_those_of_a_plain_decode(videos: list[Path]) -> None:
    """All of them and one a second: decoding only what is needed changes no bit, whatever refers to what."""
    for path in videos:
        frames, times = plain_frames(path)
        for sampling in (ALL, SPARSE):
            video = cpu.decode_video(path, sampling=sampling)
            numbers = [times.index(pytest.approx(time, abs=1e-6)) for time in video.times_seconds]
            assert all(np.array_equal(frame, frames[n]) for frame, n in zip(video.frames, numbers)), path.name
            if "uneven" in path.name:  # uniform wishes fall on one frame twice; nearest to 0 and 1 s
                assert len(numbers) >= 5 if sampling is ALL else numbers == [0, 5]
            else:  # 24 frames at 8 a second
                assert numbers == list(range(24)) if sampling is ALL else numbers == [0, 8, 16], path.name


def test_less_is_decoded_where_few_frames_are_wanted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_scenes(folder / "long.mp4", codec="libx264", num_frames=160, options={"g": "16"})
    sampling = FrameSampling(fps=0.1, min_frames=1, max_frames=2, max_frames_with_audio=2, sound=False)
    fed: list[range] = []
    plan = container._plan
    monkeypatch.setattr(container, "_plan", lambda *a: fed.extend(plan(*a)) or plan(*a))
    video = cpu.decode_video(path, sampling=sampling)
    assert np.array_equal(video.frames[1], plain_frames(path)[0][80])
    assert sum(map(len, fed)) == 2  # frames 0 and 80 are key frames


def test_bytes_are_decoded_like_files(folder: Path, videos: list[Path]) -> None:
    for path in write_pictures(folder):
        assert np.array_equal(cpu.decode_image(as_bytes(path)), cpu.decode_image(path))
        assert cpu.probe_image(as_bytes(path)) == cpu.probe_image(path)
    for path in write_sounds(folder):
        assert np.array_equal(cpu.decode_audio(as_bytes(path)), cpu.decode_audio(path))
        assert cpu.probe_audio(as_bytes(path)) == cpu.probe_audio(path)
    for path in videos[:2]:
        one, other = cpu.decode_video(as_bytes(path), sampling=ALL), cpu.decode_video(path, sampling=ALL)
        assert one.times_seconds == other.times_seconds and np.array_equal(one.frames, other.frames)
        assert cpu.read_video_header(as_bytes(path)) == cpu.read_video_header(path)
    with pytest.raises(MediaError, match=r"media file 'shard\.tar/7\.png': "):
        cpu.decode_image(MediaBytes("shard.tar/7.png", b"no picture"))


def test_files_too_large_to_keep_are_read_again(videos: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    kept = cpu.decode_video(videos[0], sampling=ALL)
    monkeypatch.setattr(container, "_KEPT_BYTES", 100)
    again = cpu.decode_video(videos[0], sampling=ALL)
    assert np.array_equal(kept.frames, again.frames) and kept.sound is not None and again.sound is not None
    assert np.array_equal(kept.sound, again.sound)


def test_one_frame_of_full_size_is_in_memory_however_many_are_taken(folder: Path) -> None:
    path = write_scenes(folder / "wide.mp4", codec="libx264", num_frames=32, size=(640, 360))
    seen: list[weakref.ref[np.ndarray]] = []
    alive: list[int] = []

    def tile(frame: np.ndarray) -> np.ndarray:
        assert frame.shape == (360, 640, 3)
        seen.append(weakref.ref(frame))
        alive.append(sum(reference() is not None for reference in seen))
        return square(frame, 28)

    whole, small = (cpu.decode_video(path, sampling=ALL, keep=keep) for keep in (None, tile))
    assert len(alive) == 32 and max(alive) <= 2
    config = VisionConfig(image_size=28)
    assert torch.equal(frame_tiles(whole.frames, config), frame_tiles(small.frames, config))


def test_transparency_is_laid_over_white_strip_by_strip(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = Image.fromarray(scene(75, 51))
    clear = picture.copy()
    clear.putalpha(Image.fromarray(np.linspace(0, 255, 75 * 51).reshape(51, 75).astype(np.uint8)))
    for image in (clear, clear.quantize(16), clear.convert("LA")):
        whole = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA")).convert("RGB")
        for pixels in (1 << 20, 7 * 75, 1):
            monkeypatch.setattr(cpu, "_STRIP_PIXELS", pixels)
            assert np.array_equal(cpu.to_rgb(image), whole)
    picture.save(folder / "key.png", transparency=tuple(scene(75, 51)[0, 0].tolist()))
    with Image.open(folder / "key.png") as image:
        assert np.asarray(cpu.to_rgb(image))[0, 0].tolist() == [255, 255, 255]


# ------------------------------------------------------------------------------------------------ DALI


@pytest.fixture(scope="module")
def dali() -> Decoder:
    return open_decoder("dali")


def test_a_back_end_that_is_not_installed_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor one that is: what Python says of ``None`` here is what it says of a module that it does not find."""
    for name in [n for n in sys.modules if n.startswith("nvidia.dali")] + ["nvidia.dali"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "megatron_omni.data.decode.dali", raising=False)
    with pytest.raises(ValueError, match=r"data\.decoder = 'dali': NVIDIA DALI cannot be imported"):
        open_decoder("dali")


def taken_over(dali: Decoder, before: Counter[str]) -> Counter[str]:
    return Counter(dali.fallbacks) - before


@needs_dali
def test_dali_pictures_equal_pillow(folder: Path, dali: Decoder, caplog: pytest.LogCaptureFixture) -> None:
    own = {"rgb.jpg", "progressive.jpg", "chroma.jpg", "grey.jpg", "turned.jpg", "one.jpg", "large.jpg", "rgb.png",
           "grey.png", "one.png", "lossy.webp", "lossless.webp", "a.bmp", "a.tiff", "a.ppm"}  # fmt: skip
    for path in [*write_pictures(folder), *write_pictures(folder)]:
        before = Counter(dali.fallbacks)
        with caplog.at_level(logging.WARNING):
            ours, reference = dali.decode_image(path), cpu.decode_image(path)
        assert ours.mode == "RGB" and np.array_equal(ours, reference), path.name
        assert sum(taken_over(dali, before).values()) == (path.name not in own), path.name
    reasons = [record.message for record in caplog.records if "picture" in record.message]
    assert len(reasons) == len(set(reasons)) and any("transparency" in r or "RGBA" in r for r in reasons)


@needs_dali
def test_dali_sound_equals_soundfile(folder: Path, dali: Decoder) -> None:
    for path in write_sounds(folder):
        before = Counter(dali.fallbacks)
        ours, reference = dali.decode_audio(path), cpu.decode_audio(path)
        assert ours.dtype == np.float32 and np.abs(ours - reference).max() <= 5e-7, path.name
        assert sum(taken_over(dali, before).values()) == (path.suffix in (".mp3", ".m4a")), path.name


@needs_dali
def test_a_recipe_chooses_dali_and_its_art_and_recordings_come_out_the_same(tmp_path: Path) -> None:
    """Files of the quickstart through the loader: the same batches, and what DALI does not take is counted."""
    notes = sorted((ASSETS / "notes").iterdir())[:3]
    for file in (*notes, ASSETS / "noto.png", ASSETS / "twemoji.png"):
        shutil.copy(file, tmp_path)
    clip = write_scenes(tmp_path / "a.mp4", codec="libx264")
    rows = [row("<audio>", f"note {i}", audios=[note.name]) for i, note in enumerate(notes)]
    rows += [row("<image>", "art", images=["noto.png"]), row("<image>", "art", images=["twemoji.png"])]
    rows += [row("<video>", "clip", videos=[clip.name]) for _ in range(3)]
    sources = [write_source(tmp_path, "media", rows)]
    loaders = []
    for decoder in ("cpu", "dali"):
        recipe = tiny_recipe(tmp_path, sources, decoder=decoder, seq_length=4096)
        recipe.model.audio.max_chunks = 60  # type: ignore[union-attr]
        loaders.append(StepLoader(recipe, data_rank=0, data_size=1))
    for ours, theirs in zip(*(loader.next_step() for loader in loaders), strict=True):
        assert torch.equal(ours.input_ids, theirs.input_ids)
        assert (ours.pixel_values is None) == (theirs.pixel_values is None)
        assert ours.pixel_values is None or torch.equal(ours.pixel_values, theirs.pixel_values)
        if ours.audio_features is not None:  # logarithms: where a note has died away, 2e-7 of the samples is much
            apart = (ours.audio_features - theirs.audio_features).abs()
            assert apart.median() < 1e-5 and (apart > 1e-3).float().mean() < 0.05
    assert not loaders[0].fallbacks and loaders[1].fallbacks["video: codec h264"] == 3
    assert not any(reason.startswith("sound") for reason in loaders[1].fallbacks)


@needs_dali
def test_dali_frames_are_the_same_frames(videos: list[Path], dali: Decoder) -> None:
    """Within what two conversions from YUV to RGB differ by; another frame would be further off."""
    for path in videos:
        before = Counter(dali.fallbacks)
        for sampling in (ALL, SPARSE):
            ours, reference = dali.decode_video(path, sampling=sampling), cpu.decode_video(path, sampling=sampling)
            assert ours.times_seconds == reference.times_seconds
            assert (ours.sound is None) == (reference.sound is None)
            if ours.sound is not None and reference.sound is not None:
                assert np.array_equal(ours.sound, reference.sound)
            for one, other in zip(ours.frames, reference.frames, strict=True):
                assert np.abs(one.astype(int) - other).mean() <= 3.5, path.name
        reasons = taken_over(dali, before)
        if path.name in ("vp9.webm", "vp8.webm", "mjpeg.mov"):
            assert not reasons, reasons
        if "uneven" in path.name and path.suffix == ".webm":
            assert reasons == {"video: variable frame rate": 2}


@needs_dali
def test_dali_does_not_get_what_would_not_fit_into_memory(
    folder: Path, videos: list[Path], dali: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = next(path for path in videos if path.name == "vp9.webm")
    small = dali.decode_video(path, sampling=ALL, keep=lambda frame: square(frame, 28))
    assert all(frame.shape == (28, 28, 3) for frame in small.frames) and len(small.frames) == 24
    before = Counter(dali.fallbacks)
    module = sys.modules["megatron_omni.data.decode.dali"]
    monkeypatch.setattr(module, "_MOST_FRAME_BYTES", 24 * 96 * 64 * 3 - 1)
    reference = cpu.decode_video(path, sampling=ALL)
    assert np.array_equal(dali.decode_video(path, sampling=ALL).frames, reference.frames)
    monkeypatch.setattr(module, "_MOST_FILE_BYTES", 100)
    for picture in list(write_pictures(folder))[:1]:
        assert np.array_equal(dali.decode_image(picture), cpu.decode_image(picture))
    assert taken_over(dali, before) == {
        "video: more frames at once than memory is meant for": 1,
        "picture: large file": 1,
    }


@needs_dali
def test_bad_files_are_one_error_with_dali_too(folder: Path, dali: Decoder) -> None:
    (folder / "empty").write_bytes(b"")
    (folder / "noise").write_bytes(np.random.default_rng(0).bytes(3000))
    jpeg = next(iter(write_pictures(folder)))
    (folder / "cut.jpg").write_bytes(jpeg.read_bytes()[:900])
    bomb = Image.new("1", (30000, 30000))
    bomb.save(folder / "bomb.png")
    for name in ("absent", "empty", "noise", "cut.jpg", "bomb.png", "."):
        with pytest.raises(MediaError, match="media file '"):
            dali.decode_image(folder / name)
    for name in ("absent", "empty", "noise", "."):
        with pytest.raises(MediaError, match="media file '"):
            dali.decode_audio(folder / name)
        with pytest.raises(MediaError, match="media file '"):
            dali.decode_video(folder / name, sampling=ALL)
