"""Crops of sound, step by step, for training a codec: the records' recordings, cut, sped up or slowed down, made louder.

A record is an ordinary one with one ``<audio>`` (crops.py). A sample of a step is ``crop_codes`` codes of its recording from a
random place on, the whole recording and silence where it is shorter. Place, speed and gain are random; held-out crops are cut
and no more.

In the batch a crop is what every sound is: ``audio_features`` [B, 1, samples], a waveform here, and a placeholder token for
each code. All of these count as labels: the loss of a step is a mean over codes, and tokens are codes.
"""

from dataclasses import replace
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_omni.batch import Modality
from megatron_omni.config.data import SourceConfig
from megatron_omni.config.run import Recipe
from megatron_omni.data.crops import CropLoader, medium_alone
from megatron_omni.data.decode import cpu, open_decoder
from megatron_omni.data.record import MediaFile, Record, RecordError, loaded
from megatron_omni.data.sample import Sample, SampleBuilder
from megatron_omni.data.sizes import SampleSize, SizeRule
from megatron_omni.data.tokenizer import Tokenizer

SPEED_STEPS = 100
"""A speed is a hundredth: the filter that resamples is short then."""


class SoundBuilder(SampleBuilder):
    """Records to whole recordings; nothing of them is text."""

    indexed = False

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer | None = None) -> None:
        assert recipe.model.codec is not None
        self.data, self.crop_codes = recipe.data, recipe.codec.crop_codes
        self.sample_rate = recipe.model.codec.sample_rate
        self.decoder = open_decoder("cpu")
        # No text is read: whoever would ask these for something has gone wrong.
        self.tokenizer, self.sizes = cast(Tokenizer, tokenizer), cast(SizeRule, None)

    def size(self, record: Record) -> SampleSize:
        """That of every crop; RecordError or MediaError for a record without a sound that can be read."""
        cpu.probe_audio(loaded(one_sound(record)))
        return SampleSize(0, audio=self.crop_codes)

    def build_sample(self, record: Record) -> Sample:
        """The whole recording at the codec's rate, [1, 1, samples], as the sound of a sample of one crop."""
        wave = cpu.decode_audio(loaded(one_sound(record)), sample_rate=self.sample_rate)
        if not np.isfinite(wave).all():
            raise RecordError(
                record.where, field="audios", value=wave.shape, problem="holds samples that are not finite",
                fix="repair the medium or drop the record", reason="not_finite",
            )  # fmt: skip
        return medium_alone(Modality.AUDIO, self.crop_codes, chunks=torch.from_numpy(wave)[None, None])


class SoundLoader(CropLoader):
    """Batches of crops."""

    builder: SoundBuilder

    def __init__(self, recipe: Recipe, *, sources: list[SourceConfig] | None = None, **options: object) -> None:
        assert recipe.model.codec is not None
        self._settings = recipe.codec
        self._crop_samples = recipe.codec.crop_codes * recipe.model.codec.hop_size
        super().__init__(recipe, sources=sources, **options)

    def _builder(self, recipe: Recipe, tokenizer: Tokenizer | None) -> SoundBuilder:
        return SoundBuilder(recipe, tokenizer)

    def _crop(self, whole: Sample, rng: np.random.Generator) -> Sample:
        assert whole.chunks is not None
        speed, gain_db = 1.0, 0.0
        if not self._held_out:
            speed = 2 ** rng.uniform(-self._settings.speed_octaves, self._settings.speed_octaves)
            lowest, highest = self._settings.gain_db
            gain_db = rng.uniform(lowest, highest)
        wave = cut(whole.chunks[0, 0].numpy(), self._crop_samples, speed=speed, rng=rng)
        return replace(whole, chunks=torch.from_numpy(wave * np.float32(10 ** (gain_db / 20)))[None, None])


def cut(wave: NDArray[np.float32], length: int, *, speed: float, rng: np.random.Generator) -> NDArray[np.float32]:
    """``length`` samples from a random place of ``wave``, played at ``speed``; silence around it where it is too short."""
    from scipy.signal import resample_poly

    steps = max(1, round(SPEED_STEPS * speed))
    needed = -(-length * steps // SPEED_STEPS)
    first = int(rng.integers(min(0, len(wave) - needed), max(0, len(wave) - needed) + 1))
    piece = wave[max(first, 0) : first + needed]
    piece = np.pad(piece, (max(-first, 0), needed - len(piece) - max(-first, 0)))
    if steps != SPEED_STEPS:
        piece = resample_poly(piece, SPEED_STEPS, steps)
    return np.ascontiguousarray(piece[:length], dtype=np.float32)


def one_sound(record: Record) -> MediaFile:
    """The only sound of ``record``; RecordError for another number of them."""
    if len(record.audios) != 1:
        raise RecordError(
            record.where, field="audios", value=len(record.audios), problem="a codec learns one sound a record",
            fix="write a record for each", reason="no_sound",
        )  # fmt: skip
    return record.audios[0]
