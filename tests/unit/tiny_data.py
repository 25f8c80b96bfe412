"""A tiny recipe with real files: a tokenizer, pictures, sound and clips written into a folder, and their records."""

import json
import threading
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import soundfile
import torch
from PIL import Image

from megatron_omni.batch import OmniBatch
from megatron_omni.config.data import DataConfig, SourceConfig
from megatron_omni.config.model import AudioConfig, ModelConfig, VisionConfig
from megatron_omni.config.run import Recipe
from megatron_omni.data import workers
from megatron_omni.data.prepare import index_files
from megatron_omni.data.tokenizer import train_sentencepiece

CORPUS = ["the cat is left of the dog", "a banana and a violin: what do you hear?", "user system assistant"] * 4


def tokenizer_file(folder: Path) -> str:
    path = folder / "t.model"
    if not path.exists():
        train_sentencepiece(CORPUS, path, vocab_size=295)
    return str(path)


def tiny_recipe(folder: Path, sources: list[SourceConfig], *, seed: int = 11, **data) -> Recipe:
    """Tiles of 28 px and 4 tokens, sound chunks of 1 s and 20 tokens."""
    model = ModelConfig(
        vocab_size=512,
        vision=VisionConfig(image_size=28, pooled_side=2, max_tiles_per_side=3),
        audio=AudioConfig(num_mel_bins=80, chunk_seconds=1.0, num_query_tokens=20, max_chunks=4),
    )
    defaults = dict(seq_length=256, micro_batch_size=2, global_batch_size=8, video_fps=2.0, min_frames=1, max_frames=8)
    config = DataConfig(sources=sources, tokenizer=tokenizer_file(folder), **{**defaults, **data})
    return Recipe(seed=seed, model=model, data=config)


def row(question: str, answer: str = "a cat", **media) -> dict:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns, **media}


def write_source(folder: Path, name: str, rows: list[dict | str], **config) -> SourceConfig:
    lines = [line if isinstance(line, str) else json.dumps(line) for line in rows]
    (folder / f"{name}.jsonl").write_text("".join(line + "\n" for line in lines))
    return SourceConfig(name=name, path=str(folder / f"{name}.jsonl"), **config)


def write_image(path: Path, *, level: int = 128, size: tuple[int, int] = (28, 28)) -> Path:
    Image.new("RGB", size, (level, level, level)).save(path)
    return path


def write_sound(path: Path, seconds: float, *, hertz: float = 440.0) -> Path:
    wave = 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * 16000)) / 16000)
    soundfile.write(path, wave.astype(np.float32), 16000)
    return path


def write_clip(path: Path, levels: list[int], *, sound: bool = False) -> Path:
    """Grey frames at 2 a second; with sound, a tone as long as the picture."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=2)
        video.width = video.height = 32
        video.pix_fmt = "yuv420p"
        video.codec_context.thread_count = 1
        audio = container.add_stream("aac", rate=16000, layout="mono") if sound else None
        for i, level in enumerate(levels):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), level, np.uint8), format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, 2)
            container.mux(video.encode(frame))
        container.mux(video.encode())
        if audio is not None:
            wave = 0.5 * np.sin(2 * np.pi * 440 * np.arange(len(levels) * 8000) / 16000)
            samples = av.AudioFrame.from_ndarray(wave[None].astype(np.float32), format="fltp", layout="mono")
            samples.sample_rate, samples.pts = 16000, 0
            container.mux(audio.encode(samples))
            container.mux(audio.encode())
    return path


def three_sources(folder: Path) -> list[SourceConfig]:
    """30 text, 12 picture and 7 sound records of various lengths."""
    for i in range(3):
        write_image(folder / f"{i}.png", level=40 * i, size=(28 * (i + 1), 28))
        write_sound(folder / f"{i}.wav", 0.5 + i)
    return [
        write_source(folder, "text", [row("what?", "x" * (1 + 5 * (i % 9))) for i in range(30)], weight=2),
        write_source(folder, "picture", [row("<image>", f"p{i}", images=[f"{i % 3}.png"]) for i in range(12)]),
        write_source(folder, "sound", [row("<audio>", f"s{i}", audios=[f"{i % 3}.wav"]) for i in range(7)]),
    ]


def indexed(folder: Path, sources: list[SourceConfig]) -> list[SourceConfig]:
    """The sources with an index each."""
    index_files([Path(source.path) for source in sources], tokenizer_file(folder))
    return sources


def bad_source(tmp_path) -> list:
    """24 records: 2 bad rows, 1 missing file, 1 too long, and 2 pictures with a whole header and half of the pixels."""
    write_image(tmp_path / "ok.png", size=(56, 56))
    Image.effect_noise((56, 56), 50).save(tmp_path / "whole.png")
    data = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "damaged.png").write_bytes(data[: len(data) // 2])
    rows: list[dict | str] = [row("<image>", f"a{i}", images=["ok.png"]) for i in range(24)]
    rows[3], rows[4] = "{broken", row("<image>", "b")
    rows[9] = row("<image>", "c", images=["gone.png"])
    rows[10] = row("q" * 300, "d")
    rows[15] = row("<image>", "e", images=["damaged.png"])
    rows[16] = row("<image>", "f", images=["damaged.png"])
    return [write_source(tmp_path, "pictures", rows)]


BAD_ROWS = {
    3: "not_json",
    4: "marker_count",
    9: "missing_media",
    10: "too_long",
    15: "unreadable_media",
    16: "unreadable_media",
}


def rows_of(batches: list[OmniBatch]) -> dict[int, tuple]:
    """What each sample looks like, without padding."""
    return {
        int(batch.sample_ids[i, 0]): (int(batch.source_ids[i, 0]), *batch.input_ids[i][~batch.padding_mask[i]].tolist())
        for batch in batches
        for i in range(len(batch.input_ids))
    }


def assert_equal(a: list[OmniBatch], b: list[OmniBatch]) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b):
        for name, tensor in vars(x).items():
            other = getattr(y, name)
            same = torch.equal(tensor, other) if isinstance(tensor, torch.Tensor) else tensor == other
            assert same, name


def hang_until(released: threading.Event) -> None:
    """Work on a record beyond every limit: its thread counts as stalled at once, however slow the machine is."""
    workers._here.beat.since -= 1e9
    released.wait()
