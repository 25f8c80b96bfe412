"""The sounds that a server is making: text or the tokens of an answer into a ``Speaker``, encoded sound and transcripts out.

A text is one utterance. An answer is followed token by token (generation/speech_turn.py): each of its spoken turns is an
utterance whose text goes to the speaker while the model writes it; an answer without any is spoken when it is whole, its
thought left out, in the voice that was asked for. Utterances of one sound follow each other.

A listener who is slow holds the sound: the speaker then gets no more text. No more than ``AHEAD`` tokens are handed over
before they are spoken, so a long text takes no more memory than a short one.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_omni.data.spoken import split_thought
from megatron_omni.data.tokenizer import SPEECH_START, Tokenizer
from megatron_omni.generation import speech
from megatron_omni.generation.request import Sampling
from megatron_omni.generation.speech_turn import SpeechReader
from megatron_omni.generation.voices import prompt_for
from megatron_omni.serve.sound import SoundEncoder
from megatron_omni.serve.speech_link import Say, Sounded, SpeechEvent, Spoken, Told, Transcribed

AHEAD = 64
"""Tokens of a sound that the speaker has and has not spoken."""
_UNFINISHED = "\ufffd"


@dataclass(eq=False)
class _Turn:
    """One utterance of a sound."""

    prompt: str | tuple[int, ...]
    tokens: deque[int]
    whole: bool
    """No more tokens come."""
    name: str = ""
    """Of the utterance, when it has begun."""
    handed: int = 0
    spoken: int = 0
    """Tokens that the speaker got, and those of pieces that it has made."""
    closed: bool = False
    """The speaker knows that no more come."""


@dataclass(eq=False)
class _Sound:
    said: Say
    encoder: SoundEncoder
    reader: SpeechReader | None
    """Of an answer whose tokenizer has the marks of a spoken turn."""
    turns: deque[_Turn] = field(default_factory=deque)
    whole: bool = False
    held: bool = False
    written: list[int] = field(default_factory=list)
    """Tokens of an answer outside its turns."""
    begun: int = 0
    """Turns so far."""
    transcript: list[int] = field(default_factory=list)
    told: str = ""
    seconds: float = 0.0
    codes: int = 0
    pieces: int = 0
    cut: int = 0


class Utterances:
    """Everything that is being said."""

    def __init__(self, speaker: speech.Speaker) -> None:
        self.speaker = speaker
        self.tokenizer: Tokenizer = speaker.tokenizer
        self._sounds: dict[str, _Sound] = {}
        self._owner: dict[str, _Sound] = {}
        """By the name of the utterance under way."""
        self._events: list[SpeechEvent] = []
        self._count = 0

    @property
    def sample_rate(self) -> int:
        """Of the codec."""
        return self.speaker.codec.config.sample_rate

    @property
    def busy(self) -> bool:
        """Whether a step does something."""
        return self.speaker.busy or bool(self._events) or any(self._can_go_on(s) for s in self._sounds.values())

    def say(self, said: Say) -> None:
        """Begin a sound; what is wrong with it comes as its last event."""
        reads = said.text is None and SPEECH_START in self.tokenizer.specials
        sound = _Sound(said, SoundEncoder(said.form, self.sample_rate), SpeechReader(self.tokenizer) if reads else None)
        self._sounds[said.name] = sound
        if said.text is not None:
            sound.whole = True
            self._add_turn(sound, None, self.tokenizer.encode(said.text), whole=True)

    def told(self, told: Told) -> None:
        """More tokens of an answer."""
        if (sound := self._sounds.get(told.name)) is None or sound.whole:
            return
        for token in told.ids:
            self._follow(sound, token)
            if told.name not in self._sounds:  # its prompt cannot be spoken
                return
        if told.end:
            sound.whole = True
            self._end_turn(sound)
            if not sound.begun:
                _, text = split_thought(self.tokenizer.decode(sound.written))
                self._add_turn(sound, None, self.tokenizer.encode(text), whole=True)

    def hold(self, name: str, on: bool) -> None:
        """Whether the listener of a sound is slow."""
        if (sound := self._sounds.get(name)) is not None:
            sound.held = on

    def silence(self, name: str) -> None:
        """Nobody listens any more; an unknown name is no error."""
        if (sound := self._sounds.pop(name, None)) is not None:
            for utterance in [u for u, owner in self._owner.items() if owner is sound]:
                del self._owner[utterance]
                self.speaker.cancel(utterance)

    def step(self) -> list[SpeechEvent]:
        """Hand over text, take a step of the speaker, and say what happened."""
        for sound in list(self._sounds.values()):
            try:
                self._go_on(sound)
            except ValueError as error:
                self._end(sound, error=str(error))
        for event in self.speaker.step():
            if (owner := self._owner.get(event.name)) is not None:
                self._take(owner, event)
        events, self._events = self._events, []
        return events

    # ------------------------------------------------------------------------------------------------ text in

    def _follow(self, sound: _Sound, token: int) -> None:
        """One token of an answer."""
        reader = sound.reader
        if reader is None:
            sound.written.append(token)
            return
        was_open = reader.text is not None
        if reader.push(token) is not None and was_open:
            self._end_turn(sound)
        if reader.text is not None:
            if not was_open:
                self._add_turn(sound, tuple(reader.prompt or ()) or None, [], whole=False)
            elif reader.text and not self.tokenizer.is_special(token):
                sound.turns[-1].tokens.append(token)
                self._transcribe(sound, [token])
        elif reader.prompt is None and not self.tokenizer.is_special(token):
            sound.written.append(token)

    def _add_turn(self, sound: _Sound, prompt: tuple[int, ...] | None, tokens: Sequence[int], *, whole: bool) -> None:
        said = sound.said
        try:
            asked = prompt or prompt_for(
                self.speaker.config, self.tokenizer.decode(tokens), voice=said.voice, style=said.style
            )
        except ValueError as error:
            return self._end(sound, error=str(error))
        sound.turns.append(_Turn(asked, deque(tokens), whole))
        sound.begun += 1
        self._transcribe(sound, tokens)

    def _end_turn(self, sound: _Sound) -> None:
        if sound.turns:
            sound.turns[-1].whole = True

    def _can_go_on(self, sound: _Sound) -> bool:
        """Whether the speaker can be given something."""
        if not sound.turns:
            return sound.whole
        turn = sound.turns[0]
        if not turn.name:
            return not sound.held
        if turn.closed or sound.held or not (turn.tokens or turn.whole):
            return False
        # Tokens that no piece holds (white space) are never spoken: without work they count for nothing.
        return turn.handed - turn.spoken < AHEAD or not self.speaker.busy

    def _go_on(self, sound: _Sound) -> None:
        """Begin the next utterance, or hand over more of its text; ValueError for what cannot be spoken."""
        if not self._can_go_on(sound):
            return
        if not sound.turns:
            return self._end(sound)
        turn, said = sound.turns[0], sound.said
        if not turn.name:
            turn.name, self._count = str(self._count), self._count + 1
            sampling = Sampling(temperature=said.temperature, seed=said.seed)
            utterance = speech.Utterance(name=turn.name, prompt=turn.prompt, sampling=sampling)
            self.speaker.submit(utterance, open=True)
            self._owner[turn.name] = sound
        room = AHEAD - (turn.handed - turn.spoken) if self.speaker.busy else AHEAD
        tokens = [turn.tokens.popleft() for _ in range(min(max(room, 1), len(turn.tokens)))]
        turn.handed += len(tokens)
        turn.closed = turn.whole and not turn.tokens
        self.speaker.feed(turn.name, tokens, end=turn.closed)

    # ------------------------------------------------------------------------------------------------ sound out

    def _take(self, sound: _Sound, event: speech.SpeechEvent) -> None:
        match event:
            case speech.SoundEvent():
                seconds = len(event.wave) / self.sample_rate
                sound.seconds += seconds
                self._events.append(Sounded(sound.said.name, sound.encoder.push(event.wave.numpy()), seconds))
            case speech.PieceEvent():
                turn = sound.turns[0]
                turn.spoken = min(turn.handed, turn.spoken + len(event.text))
            case speech.SpokenEvent():
                del self._owner[event.name]
                sound.codes, sound.pieces, sound.cut = (
                    sound.codes + event.codes, sound.pieces + event.pieces, sound.cut + event.cut
                )  # fmt: skip
                sound.turns.popleft()
                if event.error is not None:
                    self._end(sound, error=event.error)

    def _transcribe(self, sound: _Sound, tokens: Sequence[int]) -> None:
        """Tell what more of the text is whole characters."""
        sound.transcript.extend(tokens)
        text = self.tokenizer.decode(sound.transcript)
        if not text.endswith(_UNFINISHED) and text != sound.told:
            self._events.append(Transcribed(sound.said.name, text[len(sound.told) :]))
            sound.told = text

    def _end(self, sound: _Sound, *, error: str | None = None) -> None:
        name = sound.said.name
        if self._sounds.get(name) is not sound:
            return
        if error is None and (rest := sound.encoder.finish()):
            self._events.append(Sounded(name, rest, 0.0))
        self.silence(name)
        self._events.append(
            Spoken(
                name=name, seconds=sound.seconds, codes=sound.codes, pieces=sound.pieces, cut=sound.cut, error=error
            )
        )  # fmt: skip
