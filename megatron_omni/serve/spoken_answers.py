"""Chat completions that are spoken: the tokens of the answer go on to the speaker, its sound and transcript are the answer.

    message.audio   {"id", "data" (base64), "transcript", "expires_at"}; content is null, a thought stays reasoning_content
    delta.audio     {"id", "transcript"} and {"id", "data"} as they come, then {"id", "expires_at"}

Nothing is stored: an ``id`` cannot be sent back, and expires with the answer.
"""

from base64 import b64encode
from collections.abc import Callable, Sequence
from typing import Any

from megatron_omni.generation.request import Event, FinishedEvent, TokenEvent
from megatron_omni.serve.answers import ChatAnswer, Choice
from megatron_omni.serve.errors import server_fault
from megatron_omni.serve.speech_link import Sounded, SoundFormat, SpeechEvent, Spoken, Transcribed, with_length

Tell = Callable[[Sequence[int], bool], None]
"""Hand tokens to the speaker, and whether they are the last."""


class SpokenAnswer(ChatAnswer):
    """One choice with its sound."""

    def __init__(self, name: str, *args: Any, form: SoundFormat, tell: Tell, **settings: Any) -> None:
        super().__init__(name, *args, **settings)
        self._form, self._tell = form, tell
        self._audio_id = f"audio_{name}"
        self._parts: list[Sounded | Transcribed] = []
        self._sent_parts = 0
        self._spoken: Spoken | None = None

    def take(self, events: Sequence[Event | SpeechEvent]) -> None:
        """More of the answer or of its sound; ApiError where either failed."""
        written: list[Event] = []
        for event in events:
            match event:
                case Sounded() | Transcribed():
                    self._parts.append(event)
                case Spoken():
                    if event.error is not None:
                        raise server_fault(f"the answer cannot be spoken: {event.error}")
                    self._spoken = event
                case _:
                    written.append(event)
        if ids := [event.id for event in written if isinstance(event, TokenEvent) and not event.is_end]:
            self._tell(ids, False)
        super().take(written)
        if any(isinstance(event, FinishedEvent) for event in written):
            self._tell((), True)

    def usage(self) -> dict[str, Any]:
        """Counts of tokens, codes of the sound among them."""
        usage = super().usage()
        usage["completion_tokens_details"]["audio_tokens"] = self._spoken.codes if self._spoken is not None else 0
        return usage

    def _is_over(self, choice: Choice) -> bool:
        return super()._is_over(choice) and self._spoken is not None

    def _add_text(self, choice: Choice, text: str, reasoning: str) -> None:
        super()._add_text(choice, "", reasoning)

    def _choice_chunks(self, choice: Choice) -> list[dict[str, Any]]:
        parts: list[dict[str, Any]] = []
        if not choice.begun:
            choice.begun = True
            parts.append({"delta": {"role": "assistant", "content": None}})
        _, reasoning, _ = choice.unsent()
        if reasoning:
            parts.append({"delta": {"reasoning_content": reasoning}})
        for part in self._parts[self._sent_parts :]:
            said = {"transcript": part.text} if isinstance(part, Transcribed) else {"data": _base64(part.data)}
            if any(said.values()):
                parts.append({"delta": {"audio": {"id": self._audio_id, **said}}})
        self._sent_parts = len(self._parts)
        if self._is_over(choice):
            parts.append({"delta": {"audio": {"id": self._audio_id, "expires_at": self._head["created"]}}})
            parts.append({"delta": {}} | self._end_of(choice))
        return parts

    def _whole(self, index: int, choice: Choice) -> dict[str, Any]:
        data = b"".join(part.data for part in self._parts if isinstance(part, Sounded))
        audio = {
            "id": self._audio_id,
            "data": _base64(with_length(data) if self._form == "wav" else data),
            "expires_at": self._head["created"],
            "transcript": "".join(part.text for part in self._parts if isinstance(part, Transcribed)),
        }
        message: dict[str, Any] = {"role": "assistant", "content": None, "refusal": None, "audio": audio}
        if choice.reasoning:
            message["reasoning_content"] = "".join(choice.reasoning)
        return {"message": message, "logprobs": None} | self._end_of(choice)


def _base64(data: bytes) -> str:
    return b64encode(data).decode()
