"""The speaker as the process that speaks HTTP sees it: what is to be said goes in, sound comes out into mailboxes."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from megatron_omni.serve.engine_client import Mailbox
from megatron_omni.serve.errors import bad_request
from megatron_omni.serve.maker_client import MakerClient
from megatron_omni.serve.speech_link import (
    Hold,
    Say,
    Silence,
    SpeakerReady,
    Told,
    ToSpeaker,
)


class SpeechClient(MakerClient[SpeakerReady, ToSpeaker]):
    """See :class:`MakerClient`."""

    ready_kind = SpeakerReady
    who = "the speaker"
    dead_code = "speaker_dead"

    def check_voice(self, voice: str | None, *, param: str) -> None:
        """ApiError 400 for a voice that the speaker does not know; it lists those that there are."""
        voices = self.facts.voices
        if voice is None or ";" in voice:
            raise bad_request(f"{param}: a voice's name has no semicolon", param=param, code="unknown_voice")
        if voices and voice not in voices:
            raise bad_request(f"{param}: no voice {voice[:60]!r} here; there are {', '.join(voices)}", param=param,
                              code="unknown_voice")  # fmt: skip

    @contextmanager
    def ask(self, said: Say, box: Mailbox | None = None) -> Iterator[Mailbox]:
        """Have it said into ``box``, or one of its own; what is not said at the end is left."""
        _ = self.facts
        box = box if box is not None else Mailbox(0)
        box.also(1, lambda on: self._outgoing.put(Hold(said.name, on)))
        self._boxes[said.name] = box
        try:
            self._outgoing.put(said)
            yield box
        finally:
            del self._boxes[said.name]
            self._outgoing.put(Silence(said.name))

    def tell(self, name: str, ids: Sequence[int], *, end: bool = False) -> None:
        """More tokens of an answer that is spoken."""
        self._outgoing.put(Told(name, tuple(ids), end))

    async def until_it_ends(self, tokenizer: str) -> None:
        """Wait for its end, which is also that it has another tokenizer than the model whose answers it speaks."""
        await self.told.wait()
        if self.ready is not None and tokenizer and self.ready.tokenizer != tokenizer:
            other = "the speaker's tokenizer is another than that of the model whose answers it is to speak"
            print(
                f"error: {other}: give a speech generator that was trained with the same", file=sys.stderr, flush=True
            )
            return self.fail(other)
        await self.ended.wait()
