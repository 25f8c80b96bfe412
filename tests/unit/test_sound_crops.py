"""Crops of sound for the codec: the same whoever reads them, cut at one speed, refused where there is no single sound."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from megatron_omni.config.load import recipe_from_dict
from megatron_omni.config.run import Recipe
from megatron_omni.data.sound_crops import SoundLoader, cut

RATE = 8000


def tone(hertz: float, seconds: float) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * RATE)) / RATE)).astype(np.float32)


def recipe(folder: Path, **codec: Any) -> Recipe:
    rows = []
    for number, seconds in enumerate((1.0, 0.05, 2.0, 1.5)):
        soundfile.write(folder / f"{number}.wav", tone(200 + 100 * number, seconds), RATE)
        rows.append({"messages": [{"role": "user", "content": "<audio>"}], "audios": [f"{number}.wav"]})
    (folder / "sounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return recipe_from_dict(
        {
            "task": "codec",
            "model": {"moe": None, "vision": None, "audio": None, "codec": {"sample_rate": RATE, "strides": [4, 50]}},
            "data": {
                "sources": [{"name": "sounds", "path": str(folder / "sounds.jsonl")}],
                "seq_length": 10,
                "micro_batch_size": 2,
                "global_batch_size": 4,
            },
            "codec": {"crop_codes": 10, **codec},
        }
    )


def crops(loader: SoundLoader, steps: int) -> dict[int, torch.Tensor]:
    found = {}
    for _ in range(steps):
        for batch in loader.next_step():
            assert batch.audio_features is not None
            assert batch.num_label_tokens == batch.num_tokens == 2 * 10
            for sample, wave in zip(batch.sample_ids[:, 0].tolist(), batch.audio_features[:, 0]):
                found[sample] = wave
    return found


def test_crops_are_the_same_on_any_number_of_ranks_and_after_a_pause(tmp_path: Path) -> None:
    settings = recipe(tmp_path, speed_octaves=0.3, gain_db=[-6, 3])
    alone = crops(SoundLoader(settings, data_rank=0, data_size=1), 3)
    halves = [crops(SoundLoader(settings, data_rank=rank, data_size=2), 3) for rank in range(2)]
    later = crops(SoundLoader(settings, data_rank=0, data_size=1, consumed_samples=8), 1)
    assert len(alone) == 12 and {**halves[0], **halves[1]}.keys() == alone.keys()
    for sample, wave in {**halves[0], **halves[1], **later}.items():
        assert wave.shape == (2000,) and torch.equal(wave, alone[sample])
    assert len({wave.abs().sum().item() for wave in alone.values()}) == 12  # each crop is another
    held_out = SoundLoader(settings, data_rank=0, data_size=1, sources=settings.data.sources)
    loudest = [wave.abs().max().item() for wave in crops(held_out, 1).values()]
    assert all(value == pytest.approx(0.5, abs=0.01) for value in loudest)  # no gain


def test_speed_moves_the_pitch_and_short_sounds_lie_in_silence() -> None:
    rng = np.random.default_rng(0)
    faster = cut(tone(400, 1.0), 4000, speed=1.25, rng=rng)
    peak = np.abs(np.fft.rfft(faster * np.hanning(4000))).argmax() * RATE / 4000
    assert len(faster) == 4000 and peak == pytest.approx(500, abs=3)
    short = cut(tone(400, 0.1), 4000, speed=1.0, rng=rng)
    assert len(short) == 4000 and np.isclose(np.square(short).sum(), np.square(tone(400, 0.1)).sum())


def test_a_record_without_a_single_sound_is_skipped_and_counted(tmp_path: Path) -> None:
    settings = recipe(tmp_path)
    settings.data.max_bad_fraction = 1.0
    with (tmp_path / "sounds.jsonl").open("a") as file:
        row = {"messages": [{"role": "user", "content": "<audio><audio>"}], "audios": ["0.wav", "1.wav"]}
        file.write(json.dumps(row) + "\n")
    loader = SoundLoader(settings, data_rank=0, data_size=1)
    crops(loader, 3)
    assert loader.own_skips() == {("sounds", "no_sound"): 2}
