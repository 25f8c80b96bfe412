"""Speaking: text in pieces, codes of every piece from the engine, sound from the codec while codes come (docs/speech.md).

    text -> pieces (data/speech_pieces.py)
    piece k: prompt, last ``prefix_codes`` codes before it, its text -> codes until ``codes_end`` (data/speech_sequence.py)
    codes of all pieces, one behind the other -> sound (models/generators/streaming.py)

Codes are chosen among codes and ``codes_end`` alone. A piece of n tokens of text has at least ``least_codes_per_token`` n
codes; one that has not ended after ``most_codes_per_token`` n + 40, or ``max_codes``, is cut there and counted. Draws are
named by the seed, the number of the piece and its text, so a piece sounds the same whatever is spoken beside it and
whatever the text goes on with.

Several utterances are spoken together, the pieces of each one after the other: a piece begins with the sound of the one
before. Without context (``context: none``) they need not wait for each other. What is kept of an utterance is its text, the
last codes and what the codec has not turned into sound: memory does not grow with its length.

The leader of a replica has the speaker; the other ranks follow the engine. An utterance is submitted whole, or opened and
fed while its text is written.
"""

import math
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from megatron_omni.config.generators import SpeechConfig
from megatron_omni.data.speech_pieces import PieceSplitter, spoken_ids
from megatron_omni.data.speech_sequence import sequence_length, speech_sample
from megatron_omni.data.tokenizer import Tokenizer
from megatron_omni.generation.engine import Engine
from megatron_omni.generation.request import Event, FinishedEvent, Request, TokenEvent
from megatron_omni.generation.speech_events import PieceEvent as PieceEvent
from megatron_omni.generation.speech_events import SoundEvent as SoundEvent
from megatron_omni.generation.speech_events import SpeechEvent as SpeechEvent
from megatron_omni.generation.speech_events import SpokenEvent as SpokenEvent
from megatron_omni.generation.utterance import Utterance as Utterance
from megatron_omni.models.generators.codec import Codec, StreamingDecoder
from megatron_omni.platform.seeds import named_seed

SPARE_CODES = 40
"""Codes that a piece may have beside those of its tokens before it is cut."""
LONGEST_PROMPT = 1000
"""Tokens of a prompt (the released limit in training)."""
CODES_AT_ONCE = 10
"""That the decoder is given together: a part of its window and of its context on the right."""


@dataclass(eq=False)
class _Piece:
    number: int
    text: list[int]
    codes: list[int] = field(default_factory=list)
    given: int = 0
    """Codes that the decoder has."""
    done: bool = False
    cut: bool = False


@dataclass(eq=False)
class _Speech:
    """An utterance under way."""

    utterance: Utterance
    prompt: list[int]
    splitter: PieceSplitter
    decoder: StreamingDecoder
    tokens: deque[int]
    """Text that the splitter has not got."""
    ended: bool
    """No more text comes."""
    began: int = 0
    under_way: deque[_Piece] = field(default_factory=deque)
    """In order; the sound of the first is next."""
    before: list[int] = field(default_factory=list)
    """The last codes of what is done."""
    codes: int = 0
    samples: int = 0
    cut: int = 0

    def next_piece(self) -> list[int] | None:
        """Tokens of the next piece, where it is known."""
        while self.tokens:
            if (piece := self.splitter.push(self.tokens.popleft())) is not None:
                return piece
        return self.splitter.finish() if self.ended else None


class Speaker:
    """Speaks utterances with an engine, which it has for itself."""

    def __init__(
        self,
        engine: Engine,
        codec: Codec,
        tokenizer: Tokenizer,
        config: SpeechConfig,
        *,
        release: bool | None = None,
    ) -> None:
        """``tokenizer`` and ``config`` of the speech generator that ``engine`` computes; ``release`` in place of the
        configuration's. ValueError for a codec of other codes."""
        if codec.config.num_codes != config.num_codes:
            raise ValueError(
                f"the codec has {codec.config.num_codes} codes and model.speech.num_codes is {config.num_codes}; give the "
                "codec whose codes the speech generator learned"
            )
        self.engine, self.codec, self.tokenizer, self.config = engine, codec, tokenizer, config
        self.release = config.release if release is None else release
        ids = config.ids
        self._banned = tuple(i for i in range(ids.num_codes, ids.num_outputs) if i != ids.codes_end)
        self._speeches: dict[str, _Speech] = {}
        self._pieces: dict[str, tuple[_Speech, _Piece]] = {}
        """By the name of the engine's request."""
        self._events: list[SpeechEvent] = []
        self._requests = 0
        self.codec_seconds = 0.0
        """Wall time in the codec since the start; ``engine.step_seconds`` is the engine's."""

    # ------------------------------------------------------------------------------------------------ what a caller uses

    def submit(self, utterance: Utterance, *, open: bool = False) -> None:
        """Take an utterance; nothing is computed before the next :meth:`step`. ``open``: more text may :meth:`feed` it.

        ValueError for a name that is taken, a prompt that is empty or has no room in a step of the engine, a token of no text.
        """
        if utterance.name in self._speeches:
            raise ValueError(f"name is {utterance.name!r}, which an utterance under way has")
        prompt, text = (
            self.tokenizer.encode(given) if isinstance(given, str) else [*given]
            for given in (utterance.prompt, utterance.text)
        )
        self._check(prompt, text)
        self._speeches[utterance.name] = _Speech(
            utterance,
            prompt,
            PieceSplitter(self.tokenizer, self.config),
            StreamingDecoder(self.codec),
            deque(text),
            ended=not open,
        )

    def feed(self, name: str, tokens: Iterable[int] = (), *, end: bool = False) -> None:
        """More text of an open utterance, and whether it is the last."""
        speech = self._speeches.get(name)
        if speech is None or speech.ended:
            raise ValueError(f"name is {name!r}, which no open utterance has")
        speech.tokens.extend(tokens)
        speech.ended = end

    def cancel(self, name: str) -> None:
        """End an utterance; an unknown or finished name is no error. The next :meth:`step` says so."""
        if (speech := self._speeches.get(name)) is not None:
            self._end(speech, cancelled=True)

    def step(self) -> list[SpeechEvent]:
        """A step of the engine and what followed from it. With expert parallelism all leaders call it together, as long
        as they are ``busy``, and at least once."""
        self._begin()
        for event in self.engine.step():
            self._take(event)
        self._begin()  # before other leaders hear that this one has nothing to do
        events, self._events = self._events, []
        return events

    @property
    def busy(self) -> bool:
        """Whether there is something to compute or to tell."""
        waiting = (speech.ended or speech.tokens for speech in self._speeches.values())
        return self.engine.busy or bool(self._events) or any(waiting)

    def events(self, utterances: Iterable[Utterance] = ()) -> Iterator[SpeechEvent]:
        """Speak ``utterances``, as many together as the engine computes, and tell what happens until all is said."""
        left = iter(utterances)
        more = True
        while True:
            while more and len(self._speeches) < self.engine.limits.max_running:
                utterance = next(left, None)
                more = utterance is not None
                if utterance is not None:
                    self.submit(utterance)
            yield from self.step()
            if not self.busy and not more:
                return

    def speak(self, text: str | Sequence[int], prompt: str | Sequence[int], **settings: object) -> Iterator[Tensor]:
        """The sound of one text, [n] float32 at a time; ``settings`` of :class:`Utterance`. FloatingPointError where the
        model's numbers are none."""
        utterance = Utterance(name="speak", text=text, prompt=prompt, **settings)  # type: ignore[arg-type]
        for event in self.events([utterance]):
            if isinstance(event, SoundEvent):
                yield event.wave
            elif isinstance(event, SpokenEvent) and event.error is not None:
                raise FloatingPointError(event.error)

    # ----------------------------------------------------------------------------------------------------------- pieces

    def _check(self, prompt: Sequence[int], text: Sequence[int]) -> None:
        if not prompt:
            raise ValueError("prompt has no token; name a voice or describe a style")
        if len(prompt) > LONGEST_PROMPT:
            raise ValueError(f"prompt has {len(prompt)} tokens; at most {LONGEST_PROMPT}: shorten it")
        text_tokens = 4 * self.config.max_split_tokens
        longest = sequence_length(prompt=len(prompt), prefix=self.config.prefix_codes, text=text_tokens, codes=0) - 1
        if longest > self.engine.largest_whole:
            limits = self.engine.limits
            raise ValueError(
                f"prompt has {len(prompt)} tokens, with context and text {longest}, and a step of the engine holds "
                f"{self.engine.largest_whole} together: shorten it, raise max_batch_tokens ({limits.max_batch_tokens}) or lower "
                f"max_running ({limits.max_running})"
            )
        table = self.config.text_vocab_size
        if beyond := [token for token in (*prompt, *text) if not 0 <= token < table]:
            raise ValueError(f"token {beyond[0]} of the prompt or the text; the speech generator has {table} of text")

    def _begin(self) -> None:
        """Have the engine compute the pieces that can begin; end what has none left."""
        for speech in list(self._speeches.values()):
            alone = self.release or speech.utterance.context == "none" or self.config.prefix_codes == 0
            while len(speech.under_way) < (self.engine.limits.max_running if alone else 1):
                tokens = speech.next_piece()
                if tokens is None:
                    break
                try:
                    self._submit(speech, _Piece(speech.began, spoken_ids(tokens, self.tokenizer)), alone)
                except ValueError as error:  # more than the engine has room for
                    self._end(speech, error=str(error))
                    break
            if speech.ended and not speech.tokens and not speech.under_way and self._is_open(speech):
                self._sound(speech, finish=True)
                self._end(speech)

    def _is_open(self, speech: _Speech) -> bool:
        return self._speeches.get(speech.utterance.name) is speech

    def _submit(self, speech: _Speech, piece: _Piece, alone: bool) -> None:
        config, wanted = self.config, speech.utterance.sampling
        least, most = code_limits(config, len(piece.text))
        prompt = speech_sample(
            config.ids,
            prompt=speech.prompt,
            prefix=() if alone else speech.before,
            text=piece.text,
            codes=None,
        )
        seed = named_seed(wanted.seed, "speech", piece.number, *piece.text)
        request = Request(
            name=str(self._requests),
            prompt=replace(prompt, attention=None) if self.release else prompt,
            max_new_tokens=most,
            min_new_tokens=least,
            sampling=replace(wanted, seed=seed),
            stop_ids=(config.ids.codes_end,),
            banned_ids=self._banned,
            ignore_eos=True,
            reuse_prefix=False,
        )
        self.engine.submit(request)
        self._requests += 1
        self._pieces[request.name] = speech, piece
        speech.began += 1
        speech.under_way.append(piece)

    def _take(self, event: Event) -> None:
        """What the engine says of a piece."""
        if event.name not in self._pieces:  # of an utterance that was cancelled
            return
        speech, piece = self._pieces[event.name]
        if isinstance(event, TokenEvent):
            if not event.is_end:
                piece.codes.append(event.id)
                if piece is speech.under_way[0] and len(piece.codes) - piece.given >= CODES_AT_ONCE:
                    self._sound(speech)
        elif isinstance(event, FinishedEvent):
            del self._pieces[event.name]
            if event.reason == "error":
                self._end(speech, error=event.message)
                return
            piece.done, piece.cut = True, event.reason == "length"
            self._told(speech)

    def _told(self, speech: _Speech) -> None:
        """Give the decoder what is done, in order, and tell it."""
        while speech.under_way and speech.under_way[0].done:
            piece = speech.under_way[0]
            self._sound(speech)
            speech.under_way.popleft()
            speech.codes += len(piece.codes)
            speech.cut += piece.cut
            if self.config.prefix_codes:
                speech.before = [*speech.before, *piece.codes][-self.config.prefix_codes :]
            self._events.append(
                PieceEvent(
                    name=speech.utterance.name,
                    number=piece.number,
                    text=tuple(piece.text),
                    codes=tuple(piece.codes),
                    cut=piece.cut,
                )
            )
        if speech.under_way and speech.under_way[0].codes:
            self._sound(speech)

    def _sound(self, speech: _Speech, *, finish: bool = False) -> None:
        """The sound of new codes of the first piece, or of all that is left."""
        start = time.perf_counter()
        if finish:
            wave = speech.decoder.finish()
        else:
            piece = speech.under_way[0]
            wave = speech.decoder.push(piece.codes[piece.given :])
            piece.given = len(piece.codes)
        self.codec_seconds += time.perf_counter() - start
        if len(wave):
            speech.samples += len(wave)
            self._events.append(SoundEvent(name=speech.utterance.name, wave=wave))

    def _end(self, speech: _Speech, *, cancelled: bool = False, error: str | None = None) -> None:
        del self._speeches[speech.utterance.name]
        for name, (owner, _) in list(self._pieces.items()):
            if owner is speech:
                del self._pieces[name]
                self.engine.cancel(name)
        self._events.append(
            SpokenEvent(
                name=speech.utterance.name,
                pieces=speech.began - len(speech.under_way),
                codes=speech.codes,
                samples=speech.samples,
                cut=speech.cut,
                cancelled=cancelled,
                error=error,
            )
        )


def code_limits(config: SpeechConfig, num_tokens: int) -> tuple[int, int]:
    """Least and most codes of a piece with so many tokens of text."""
    most = min(config.max_codes, math.floor(config.most_codes_per_token * num_tokens) + SPARE_CODES)
    return min(math.ceil(config.least_codes_per_token * num_tokens), most), most
