"""Texts spoken on all ranks: each model replica speaks its share, and all ranks learn what became of every text.

What is heard is told to the leader of the replica while it is made (``take``), so that it can be written or played.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_omni.config.generators import SpeechConfig
from megatron_omni.data.speech_sequence import sequence_length
from megatron_omni.data.tokenizer import Tokenizer
from megatron_omni.generation.batches import shared
from megatron_omni.generation.engine import Engine, EngineLimits
from megatron_omni.generation.speech import LONGEST_PROMPT, SoundEvent, Speaker, SpeechEvent, SpokenEvent, Utterance
from megatron_omni.generation.wav import SoundFile
from megatron_omni.models.generators.codec import Codec
from megatron_omni.models.omni import OmniModel
from megatron_omni.parallel.sharing import PeerFailed

Take = Callable[[SpeechEvent], None]


def speech_limits(config: SpeechConfig, *, batch_size: int, deterministic: bool = False) -> EngineLimits:
    """Of an engine that speaks ``batch_size`` pieces together: a step holds the longest condition beside them."""
    longest = sequence_length(
        prompt=LONGEST_PROMPT, prefix=config.prefix_codes, text=8 * config.max_split_tokens, codes=0
    )
    return EngineLimits(
        max_running=batch_size,
        max_batch_tokens=2 * batch_size + longest,
        longest=longest + config.max_codes,
        deterministic=deterministic,
    )


def speak_all(
    model: OmniModel,
    utterances: Sequence[Utterance],
    *,
    codec: Codec,
    tokenizer: Tokenizer,
    batch_size: int = 8,
    deterministic: bool = False,
    release: bool | None = None,
    take: Take = lambda event: None,
    before: Callable[[Speaker], None] = lambda speaker: None,
) -> dict[str, SpokenEvent]:
    """Speak ``utterances``, the same on every rank, and say on every rank how each ended; all ranks call this together.

    ``take`` is told every event on the leader of the replica that speaks. ``before`` is shown the speaker there. Whatever
    either raises ends all ranks, the others with PeerFailed.
    """
    config = model.language.model_config.speech
    assert config is not None, "a speech generator speaks"
    pg = model.language.pg_collection
    limits = speech_limits(config, batch_size=batch_size, deterministic=deterministic)
    with Engine(model, tokenizer=tokenizer, pg=pg, limits=limits) as engine:
        ended: dict[str, SpokenEvent] | None = {}
        try:
            if not engine.leads:
                engine.follow()
            else:
                with engine.leading():
                    speaker = Speaker(engine, codec, tokenizer, config, release=release)
                    before(speaker)
                    ended = dict(_told(speaker, utterances[pg.dp.rank() :: pg.dp.size()], take))
        except Exception as error:
            if not engine.broken:
                with suppress(PeerFailed):
                    shared(None, pg)
            raise error
        return shared(ended, pg)


def _told(speaker: Speaker, utterances: Sequence[Utterance], take: Take) -> Iterator[tuple[str, SpokenEvent]]:
    for event in speaker.events(utterances):
        take(event)
        if isinstance(event, SpokenEvent):
            yield event.name, event


class SoundFiles:
    """Utterances as files, each opened with its first sound and closed with its end. A context; give it :meth:`take`."""

    def __init__(self, target: Callable[[str], str | Path], sample_rate: int) -> None:
        """``target`` of an utterance's name (wav.py)."""
        self._target, self._sample_rate = target, sample_rate
        self._open: dict[str, SoundFile] = {}
        self._start = time.perf_counter()
        self.first_sound_seconds: float | None = None
        """From when this was made to the first sound of all."""

    def take(self, event: SpeechEvent) -> None:
        """Write what follows."""
        if isinstance(event, SoundEvent):
            if event.name not in self._open:
                self._open[event.name] = SoundFile(self._target(event.name), self._sample_rate)
            self._open[event.name].write(event.wave)
            if self.first_sound_seconds is None:
                self.first_sound_seconds = time.perf_counter() - self._start
        elif isinstance(event, SpokenEvent) and event.name in self._open:
            self._open.pop(event.name).close()

    def started(self, speaker: Speaker) -> None:
        """Time is counted from here."""
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.perf_counter() - self._start

    def __enter__(self) -> "SoundFiles":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._open.values():
            file.close()


def said_of(event: SpokenEvent, utterance: Utterance, *, file: str, sample_rate: int) -> dict[str, Any]:
    """What a line says of an utterance: {"file", "seconds", "codes", "pieces", "cut", "prompt"}, or {"error", "prompt"}."""
    error = event.error or (
        None if event.pieces else "the text has neither a letter nor a digit: there is nothing to say"
    )
    if error is not None:
        return {"error": error, "prompt": utterance.prompt}
    return {
        "file": file,
        "seconds": round(event.samples / sample_rate, 3),
        "codes": event.codes,
        "pieces": event.pieces,
        "cut": event.cut,
        "prompt": utterance.prompt,
    }
