"""``POST /v1/audio/speech`` and ``GET /v1/audio/voices``: a text out loud, whole or while it is made.

    body -> schema -> speaker -> encoded sound: one body, chunks of it (``stream``), or OpenAI's events (``stream_format``)

Errors before the first sound have their own status. Where a stream of bytes cannot go on, it is cut off: a client then sees
that it is not whole.
"""

import time
import uuid
from base64 import b64encode
from collections.abc import AsyncIterator
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from megatron_omni.serve.engine_client import Mailbox
from megatron_omni.serve.errors import ApiError, bad_request, server_fault, unavailable
from megatron_omni.serve.intake import ClientGone, Place, read_json, while_connected, within
from megatron_omni.serve.schema import SpeechRequest, parse
from megatron_omni.serve.server import Server
from megatron_omni.serve.speech_link import MEDIA_TYPES, Say, Sounded, Spoken, with_length
from megatron_omni.serve.streams import EventStream


class Speech:
    """Both end points."""

    def __init__(self, server: Server) -> None:
        self._server = server

    async def voices(self, _: Request) -> Response:
        """The names that may be asked for; none are listed where any is taken."""
        assert self._server.speech is not None
        facts = self._server.speech.facts
        return JSONResponse({
            "object": "list", "data": [{"id": name, "object": "voice", "name": name} for name in facts.voices],
            "voices": list(facts.voices), "model": facts.name, "sample_rate": facts.sample_rate,
        })  # fmt: skip

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        server, headers = self._server, Headers(scope=scope)
        server.check_takes_requests()
        try:
            with server.door.place() as place:
                body = await read_json(headers, receive, place, server.settings.max_body_bytes)
                wanted = parse(SpeechRequest, body, ignore_unknown=server.settings.ignore_unknown_fields)
                await while_connected(receive, _answer(server, wanted, place, scope, receive, send))
        except ClientGone:
            server.metrics.aborted.inc()


async def _answer(
    server: Server, wanted: SpeechRequest, place: Place, scope: Scope, receive: Receive, send: Send
) -> None:
    assert server.speech is not None
    server.check_model(wanted.model, server.speech.facts.name)
    if wanted.style is None:
        server.speech.check_voice(wanted.voice, param="voice")
    name = f"speech-{uuid.uuid4().hex}"
    said = Say(
        name=name, form=wanted.response_format, voice=wanted.voice if wanted.style is None else None, style=wanted.style,
        text=wanted.input, temperature=wanted.temperature, seed=wanted.seed,
    )  # fmt: skip
    server.metrics.started.inc()
    with server.speech.ask(said) as box:
        parts = sounds(server, box, place)
        headers = {"Content-Type": MEDIA_TYPES[wanted.response_format], "X-Request-Id": name}
        if wanted.stream and wanted.stream_format == "sse":
            await _events(server, parts, name, send)
        elif wanted.stream:
            await _stream(server, parts, headers, send)
        else:
            found = [part async for part in parts]
            spoken = next(part for part in found if isinstance(part, Spoken))
            data = b"".join(part.data for part in found if isinstance(part, Sounded))
            if wanted.response_format == "wav":
                data = with_length(data)
            headers |= {"X-Audio-Seconds": f"{spoken.seconds:.3f}", "X-Audio-Pieces-Cut": str(spoken.cut)}
            await within(server.settings.patience_seconds, Response(data, headers=headers)(scope, receive, send))
    server.metrics.succeeded.labels("stop").inc()
    server.metrics.whole.observe(time.monotonic() - place.arrived)


async def sounds(server: Server, box: Mailbox, place: Place) -> AsyncIterator[Sounded | Spoken]:
    """What is spoken, its end last; ApiError where it takes too long or cannot be spoken."""
    settings, begun = server.settings, False
    while True:
        limit = settings.request_seconds if begun else min(settings.queue_seconds, settings.request_seconds)
        left = place.arrived + limit - time.monotonic()
        if left <= 0:
            raise unavailable(f"the sound was not whole after {limit:g} s: the server is busy", code="timeout")
        for event in await box.take(left):
            if isinstance(event, Spoken):
                if event.error is not None:
                    raise server_fault(event.error) if event.pieces else bad_request(event.error, code="not_speakable")
                if not event.pieces:
                    raise bad_request("input has no letter and no digit: nothing can be said", param="input",
                                      code="not_speakable")  # fmt: skip
                yield event
                return
            if isinstance(event, Sounded) and event.data:
                if not begun and event.seconds:
                    begun = True
                    server.metrics.first_token.observe(time.monotonic() - place.arrived)
                    place.starts()
                yield event


async def _stream(server: Server, parts: AsyncIterator[Sounded | Spoken], headers: dict[str, str], send: Send) -> None:
    begun = False
    raw = [(key.lower().encode(), value.encode()) for key, value in headers.items()]
    try:
        async for part in parts:
            if isinstance(part, Sounded):
                if not begun:
                    begun = True
                    await send({"type": "http.response.start", "status": 200, "headers": raw})
                message = {"type": "http.response.body", "body": part.data, "more_body": True}
                await within(server.settings.patience_seconds, send(message))
    except ApiError as error:
        if not begun:
            raise
        server.metrics.errors.labels(str(error.status)).inc()
        raise ClientGone from error  # the connection is closed before the last chunk
    await send({"type": "http.response.body", "body": b""})


async def _events(server: Server, parts: AsyncIterator[Sounded | Spoken], name: str, send: Send) -> None:
    stream = EventStream(send, name, server.settings.patience_seconds)
    try:
        async for part in parts:
            if isinstance(part, Sounded):
                await stream.send({"type": "speech.audio.delta", "audio": b64encode(part.data).decode()})
            else:
                await stream.send({"type": "speech.audio.done", "usage": _usage(part)})
    except ApiError as error:
        if not stream.begun:
            raise
        server.metrics.errors.labels(str(error.status)).inc()
        await stream.send({"type": "error"} | error.body())
    await stream.end()


def _usage(spoken: Spoken) -> dict[str, Any]:
    return {
        "output_tokens": spoken.codes, "seconds": round(spoken.seconds, 3), "pieces": spoken.pieces, "cut": spoken.cut,
    }  # fmt: skip
