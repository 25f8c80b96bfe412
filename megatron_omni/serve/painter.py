"""Pictures of all requests, as many together as are alike: same size, steps and guidance, the oldest first.

Between two steps messages are read: a picture that nobody waits for is not begun, and a batch whose pictures all were forgotten
ends at once.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from megatron_omni.config.pictures import ImageGeneratorConfig
from megatron_omni.generation.blocks import from_bytes
from megatron_omni.generation.image import Picture, draw
from megatron_omni.generation.picture import PictureSettings, PictureWanted
from megatron_omni.generation.png import png_bytes
from megatron_omni.models.generators.image import ImageGenerator
from megatron_omni.models.generators.vae import PictureCodec
from megatron_omni.serve.picture_link import PICTURES_OF_A_SAMPLE, Forget, Paint, Painted, ToPainter

Receive = Callable[[], Iterable[ToPainter]]
"""Messages that have come; does not wait."""


class Forgotten(Exception):
    """Nobody waits for any picture of the batch."""


@dataclass(eq=False)
class _Waiting:
    paint: Paint
    settings: PictureSettings
    since: float
    forgotten: bool = False

    @property
    def alike(self) -> Any:
        """Equal in pictures that are drawn together."""
        return self.paint.source.size, replace(self.settings, seed=0)


class Painter:
    """A generator and its codec."""

    def __init__(
        self, image: ImageGenerator, codec: PictureCodec, *, model: str, batch_size: int, receive: Receive
    ) -> None:
        """``model`` is named in the files; ``receive`` is asked between steps."""
        self._image, self._codec, self._model, self._batch_size = image, codec, model, batch_size
        self._receive = receive
        self._waiting: list[_Waiting] = []
        self._under_way: list[_Waiting] = []
        self._refused: list[Painted] = []

    @property
    def busy(self) -> bool:
        """Whether there is something to draw or to tell."""
        return bool(self._waiting or self._refused)

    def take(self, message: ToPainter) -> None:
        """One message; what is wrong with a picture is told by the next :meth:`pictures`."""
        match message:
            case Paint():
                try:
                    settings = _settings(message, self._image.config)
                except ValueError as error:
                    self._refused.append(_error(message, str(error), refused=True))
                else:
                    self._waiting.append(_Waiting(message, settings, time.monotonic()))
            case Forget():
                self._waiting = [one for one in self._waiting if one.paint.name != message.name]
                for one in self._under_way:
                    one.forgotten |= one.paint.name == message.name

    def pictures(self) -> Iterator[Painted]:
        """Draw the oldest picture that waits and those that are drawn together with it."""
        refused, self._refused = self._refused, []
        yield from refused
        if not self._waiting:
            return
        batch = [one for one in self._waiting if one.alike == self._waiting[0].alike][: self._batch_size]
        self._waiting = [one for one in self._waiting if one not in batch]
        self._under_way = batch
        left = set(range(len(batch)))
        try:
            pictures = [self._picture(one) for one in batch]
            for i, pixels in draw(self._image, self._codec, pictures, batch_size=self._batch_size, on_step=self._step):
                left.discard(i)
                one, picture = batch[i], pictures[i]
                yield Painted(
                    name=one.paint.name,
                    sample=one.paint.sample,
                    number=one.paint.number,
                    data=png_bytes(pixels, self._facts(one, picture), prompt=one.paint.source.prompt),
                    seconds=time.monotonic() - one.since,
                )
        except Forgotten:
            return
        except ValueError as error:
            for i in sorted(left):
                yield _error(batch[i].paint, str(error))
        finally:
            self._under_way = []

    def _step(self, _: int) -> None:
        for message in self._receive():
            self.take(message)
        if self._under_way and all(one.forgotten for one in self._under_way):
            raise Forgotten

    def _picture(self, one: _Waiting) -> Picture:
        paint, width = one.paint, self._image.hidden_size
        shown = paint.source.pixels
        pixels = None
        if shown is not None:
            columns, rows = paint.source.size
            pixels = torch.frombuffer(bytearray(shown), dtype=torch.uint8).view(3, rows, columns)
        return Picture(
            name="0",  # as of one prompt of the command line
            number=PICTURES_OF_A_SAMPLE * paint.sample + paint.number,
            size=paint.source.size,
            settings=one.settings,
            hidden=from_bytes(paint.hidden, width),
            vision=from_bytes(paint.vision, width),
            source=pixels,
        )

    def _facts(self, one: _Waiting, picture: Picture) -> dict[str, Any]:
        width, height = picture.size
        return {
            "model": self._model, "width": width, "height": height, "name": picture.name, "number": picture.number,
            **vars(one.settings), "source": picture.source is not None,
        }  # fmt: skip


def _settings(paint: Paint, config: ImageGeneratorConfig) -> PictureSettings:
    options = paint.options
    wanted = PictureWanted(
        steps=options.steps,
        text_guidance=options.text_guidance,
        image_guidance=options.image_guidance,
        seed=options.seed,
    )
    return wanted.settings(config.sampling)


def _error(paint: Paint, message: str, *, refused: bool = False) -> Painted:
    return Painted(name=paint.name, sample=paint.sample, number=paint.number, error=message, refused=refused)
