"""Sound files that are written as sound comes: what others read of them, in a file, in a pipe and without a header."""

import io
import os
import threading
from pathlib import Path

import numpy as np
import soundfile
import torch

from megatron_omni.generation.wav import SoundFile, pcm16, wav_header

WAVE = torch.linspace(-1.5, 1.5, 1001)


def test_a_file_says_how_long_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    with SoundFile(path, 24_000) as file:
        file.write(WAVE[:400])
        while_made = path.read_bytes()
        file.write(WAVE[400:])
    assert len(while_made) == 44 + 800, "what is written can be read at once"
    samples, rate = soundfile.read(path, dtype="float32")
    assert rate == 24_000 and file.num_samples == len(samples) == 1001 and soundfile.info(path).subtype == "PCM_16"
    np.testing.assert_allclose(samples, WAVE.clamp(-1, 1).numpy(), atol=1e-4)


def test_a_pipe_is_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "pipe.wav"
    os.mkfifo(path)
    received: list[bytes] = []
    reader = threading.Thread(target=lambda: received.append(path.read_bytes()))
    reader.start()
    with SoundFile(path, 8000) as file:
        file.write(WAVE)
    reader.join()
    assert received[0] == wav_header(8000) + pcm16(WAVE)
    assert len(soundfile.read(io.BytesIO(received[0]))[0]) == 1001


def test_samples_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.pcm"
    with SoundFile(path, 8000) as file:
        file.write(WAVE)
    assert path.read_bytes() == pcm16(WAVE)
    assert np.frombuffer(path.read_bytes(), "<i2")[[0, 500, -1]].tolist() == [-32767, 0, 32767]


def test_more_than_a_header_can_say() -> None:
    assert wav_header(24_000, 1 << 31) == wav_header(24_000)
    assert int.from_bytes(wav_header(24_000, 1000)[4:8], "little") == 36 + 2000
