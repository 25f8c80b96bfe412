"""Chat completions with pictures: blocks of the answer go on to the painter, whose pictures are a part of the answer.

    message.images   [{"type": "image_url", "index": 0, "image_url": {"url": "data:image/png;base64,..."}}]
    delta.images     the same, each when it is drawn; the choice ends with the last

A picture says in its file how it was drawn. Nothing is stored: clients that send an answer back leave its pictures out, or send
one as a part of a question.
"""

from base64 import b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_omni.generation.request import BlockEvent, Event
from megatron_omni.serve.answers import ChatAnswer, Choice
from megatron_omni.serve.errors import ApiError, bad_request, server_fault
from megatron_omni.serve.picture_link import Paint, Painted, PictureOptions, PictureSource
from megatron_omni.serve.speech_link import SpeechEvent


@dataclass
class Drawn:
    """The pictures of one choice."""

    begun: int = 0
    pictures: dict[int, bytes] = field(default_factory=dict)
    """By their number, as PNG files."""
    sent: int = 0

    @property
    def complete(self) -> bool:
        """Whether all that were begun are there."""
        return len(self.pictures) == self.begun

    def unsent(self) -> list[dict[str, Any]]:
        """Those since the last call, in order, as parts of a message."""
        parts = []
        while self.sent in self.pictures:
            parts.append(image_part(self.sent, self.pictures[self.sent]))
            self.sent += 1
        return parts


class DrawnAnswer(ChatAnswer):
    """Choices with their pictures."""

    def __init__(
        self,
        name: str,
        *args: Any,
        source: PictureSource,
        options: PictureOptions,
        paint: Callable[[Paint], None],
        **settings: Any,
    ) -> None:
        super().__init__(name, *args, **settings)
        self._name, self._source, self._options, self._paint = name, source, options, paint
        self._drawn = {id(choice): Drawn() for choice in self.choices}

    def take(self, events: Sequence[Event | SpeechEvent | Painted]) -> None:
        """More of the answer or its pictures; ApiError where either failed."""
        written: list[Any] = []
        for event in events:
            match event:
                case BlockEvent():
                    self._of(event.sample).begun += 1
                    self._paint(paint_of(event, self._source, self._options))
                case Painted():
                    self._of(event.sample).pictures[event.number] = data_of(event)
                case _:
                    written.append(event)
        super().take(written)

    def usage(self) -> dict[str, Any]:
        """Counts of tokens, and of pictures."""
        usage = super().usage()
        usage["completion_tokens_details"]["images"] = sum(drawn.begun for drawn in self._drawn.values())
        return usage

    def _of(self, sample: int) -> Drawn:
        return self._drawn[id(self.choices[sample])]

    def _is_over(self, choice: Choice) -> bool:
        return super()._is_over(choice) and self._drawn[id(choice)].complete

    def _choice_chunks(self, choice: Choice) -> list[dict[str, Any]]:
        end = choice.end
        if not self._is_over(choice):
            choice.end = None  # not yet: a picture is to come
        parts = super()._choice_chunks(choice)
        choice.end = end
        if images := self._drawn[id(choice)].unsent():
            parts.insert(len(parts) - self._is_over(choice), {"delta": {"images": images}})
        return parts

    def _whole(self, index: int, choice: Choice) -> dict[str, Any]:
        whole = super()._whole(index, choice)
        drawn = Drawn(pictures=self._drawn[id(choice)].pictures)
        if images := drawn.unsent():
            whole["message"]["images"] = images
        if self._source.note and images:
            whole["message"]["annotations"] = [{"type": "note", "note": self._source.note}]
        return whole


def paint_of(event: BlockEvent, source: PictureSource, options: PictureOptions) -> Paint:
    """What the painter is told of a block."""
    return Paint(
        name=event.name,
        sample=event.sample,
        number=event.number,
        hidden=event.hidden,
        vision=event.vision,
        source=source,
        options=options,
    )


def data_of(painted: Painted) -> bytes:
    """The file; ApiError where there is none."""
    if painted.error is None:
        return painted.data
    raise bad_request(painted.error) if painted.refused else _fault(painted.error)


def _fault(message: str) -> ApiError:
    return server_fault(f"the picture cannot be drawn: {message}")


def image_part(index: int, data: bytes) -> dict[str, Any]:
    """A picture as a part of a message."""
    return {"type": "image_url", "index": index, "image_url": {"url": data_url(data)}}


def data_url(data: bytes) -> str:
    """Of a PNG file."""
    return "data:image/png;base64," + b64encode(data).decode()
