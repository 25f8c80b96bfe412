"""The painter as the process that speaks HTTP sees it: blocks of answers go in, pictures come out into mailboxes."""

from collections.abc import Iterator
from contextlib import contextmanager

from megatron_omni.serve.engine_client import Mailbox
from megatron_omni.serve.maker_client import MakerClient
from megatron_omni.serve.picture_link import Forget, Paint, PainterReady, ToPainter


class PictureClient(MakerClient[PainterReady, ToPainter]):
    """See :class:`MakerClient`."""

    ready_kind = PainterReady
    who = "what draws"
    dead_code = "painter_dead"

    def check(self) -> None:
        """ApiError 503 while it is loaded, 500 when it has ended."""
        _ = self.facts

    @contextmanager
    def ask(self, name: str, box: Mailbox) -> Iterator[None]:
        """Have pictures of the request ``name`` come into ``box``; what is not drawn at the end is left."""
        self.check()
        self._boxes[name] = box
        try:
            yield
        finally:
            del self._boxes[name]
            self._outgoing.put(Forget(name))

    def paint(self, paint: Paint) -> None:
        """One more picture."""
        self._outgoing.put(paint)
