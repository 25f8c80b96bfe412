"""Sound as clients want it, encoded while it is made: what was pushed can be sent.

    wav     16-bit PCM behind a header of 44 bytes that does not say how long it is
    pcm     16-bit PCM at 24 kHz, little-endian, without a header: what OpenAI's clients expect
    mp3, flac, aac (ADTS), opus (Ogg)    by PyAV

``wav`` has the codec's rate and ``opus`` 48 kHz, the others the codec's where the format knows it.
"""

import av
import numpy as np
from av.audio.stream import AudioStream
from numpy.typing import NDArray

from megatron_omni.generation.wav import wav_header
from megatron_omni.serve.speech_link import SoundFormat

PCM_RATE, OPUS_RATE = 24_000, 48_000
_CODECS: dict[str, tuple[str, str]] = {
    "mp3": ("mp3", "libmp3lame"), "flac": ("flac", "flac"), "aac": ("adts", "aac"), "opus": ("ogg", "libopus"),
}  # fmt: skip


class SoundEncoder:
    """One sound."""

    def __init__(self, form: SoundFormat, sample_rate: int) -> None:
        self.form, self.sample_rate = form, sample_rate
        self._first = wav_header(sample_rate) if form == "wav" else b""
        self._resampler = None
        self._container = None
        if form == "pcm" and sample_rate != PCM_RATE:
            self._resampler = av.AudioResampler(format="s16", layout="mono", rate=PCM_RATE)
        elif form in _CODECS:
            self._sink = _Sink()
            container, codec = _CODECS[form]
            options = {"mp3": {"write_xing": "0"}, "opus": {"page_duration": "100000"}}.get(form, {})
            self._container = av.open(self._sink, mode="w", format=container, options=options)
            rate = OPUS_RATE if form == "opus" else _known_rate(codec, sample_rate)
            stream = self._container.add_stream(codec, rate=rate, layout="mono")
            assert isinstance(stream, AudioStream)
            self._stream = stream
            self._resampler = av.AudioResampler(format=self._stream.codec_context.format, layout="mono", rate=rate)

    def push(self, wave: NDArray[np.float32]) -> bytes:
        """Samples [n] from -1 to 1 that follow; what can be sent of them."""
        first, self._first = self._first, b""
        if not len(wave):
            return first
        samples = (wave.clip(-1.0, 1.0) * 32767.0).round().astype("<i2")
        if self._resampler is None:
            return first + samples.tobytes()
        frame = av.AudioFrame.from_ndarray(samples[None, :], format="s16", layout="mono")
        frame.sample_rate = self.sample_rate
        return first + self._encoded(self._resampler.resample(frame))

    def finish(self) -> bytes:
        """The rest."""
        first, self._first = self._first, b""
        if self._resampler is None:
            return first
        data = self._encoded(self._resampler.resample(None))
        if self._container is None:
            return first + data
        self._container.mux(self._stream.encode(None))
        self._container.close()
        return first + data + self._sink.taken()

    def _encoded(self, frames: list[av.AudioFrame]) -> bytes:
        if self._container is None:
            return b"".join(frame.to_ndarray().tobytes() for frame in frames)
        for frame in frames:
            self._container.mux(self._stream.encode(frame))
        return self._sink.taken()


def _known_rate(codec: str, sample_rate: int) -> int:
    """The nearest rate from ``sample_rate`` up that a codec knows."""
    rates = sorted(av.codec.Codec(codec, "w").audio_rates or [sample_rate])
    return next((rate for rate in rates if rate >= sample_rate), rates[-1])


class _Sink:
    """Takes what a container writes; it cannot go back in it."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def write(self, data: bytes) -> int:
        self._parts.append(bytes(data))
        return len(data)

    def taken(self) -> bytes:
        """What was written since the last call."""
        parts, self._parts = self._parts, []
        return b"".join(parts)
