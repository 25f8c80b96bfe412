"""Server-sent events, as OpenAI's clients read them."""

import json
from collections.abc import Mapping
from typing import Any

from starlette.types import Send

from megatron_omni.serve.intake import within

_as_json = json.JSONEncoder(ensure_ascii=False).encode


class EventStream:
    """Server-sent events, begun with the first of them."""

    def __init__(self, send: Send, name: str, seconds: float) -> None:
        self._send, self._name, self._seconds = send, name, seconds
        self.begun = False

    async def send(self, *values: Mapping[str, Any]) -> None:
        """One event for each value, all in one write."""
        if values:
            await self._write("".join(f"data: {_as_json(v)}\n\n" for v in values).encode())

    async def ping(self) -> None:
        """A comment, which keeps proxies from closing the connection."""
        await self._write(b": ping\n\n")

    async def end(self) -> None:
        """The last event, and the end of the response."""
        await self._write(b"data: [DONE]\n\n")
        await self._send({"type": "http.response.body", "body": b""})

    async def _write(self, data: bytes) -> None:
        if not self.begun:
            self.begun = True
            headers = {
                "Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache",
                "X-Accel-Buffering": "no", "X-Request-Id": self._name,
            }  # fmt: skip
            raw = [(key.lower().encode(), value.encode()) for key, value in headers.items()]
            await self._send({"type": "http.response.start", "status": 200, "headers": raw})
        await within(self._seconds, self._send({"type": "http.response.body", "body": data, "more_body": True}))
