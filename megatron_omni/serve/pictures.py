"""``POST /v1/images/generations`` and ``/v1/images/edits``: pictures of words, and of words and a picture.

    body -> schema -> builder -> engine (one forward behind the prompt) -> painter -> PNG in base64

The words are a user's turn, behind its pictures, and the answer begins with a picture. Edits come as OpenAI's form or as JSON with
``images``: a list of {"url": "data:..."}.
"""

import time
import uuid
from base64 import b64encode
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from megatron_omni.generation.request import BlockEvent, FinishedEvent
from megatron_omni.serve.drawn_answers import data_of, paint_of
from megatron_omni.serve.engine_client import Mailbox
from megatron_omni.serve.errors import bad_request, server_fault, unavailable
from megatron_omni.serve.forms import Field, is_form, read_form
from megatron_omni.serve.intake import ClientGone, Place, read_body, read_json, while_connected, within
from megatron_omni.serve.jobs import Built, Job, Medium, PicturesWanted
from megatron_omni.serve.media import Link, read_medium
from megatron_omni.serve.picture_link import Painted, PictureOptions
from megatron_omni.serve.picture_schema import EditRequest, ImageRequest
from megatron_omni.serve.schema import parse
from megatron_omni.serve.server import Server

_NUMBERS = {"n": int, "seed": int, "steps": int, "guidance": float, "image_guidance": float}
"""Of a form, whose values are text."""


class Pictures:
    """One of the two end points."""

    def __init__(self, server: Server, *, edits: bool) -> None:
        self._server, self._edits = server, edits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        server, headers = self._server, Headers(scope=scope)
        server.check_takes_requests()
        try:
            with server.door.place() as place:
                wanted, media = await self._read(headers, receive, place)
                await while_connected(receive, self._answer(wanted, media, place, scope, receive, send))
        except ClientGone:
            server.metrics.aborted.inc()

    async def _read(
        self, headers: Headers, receive: Receive, place: Place
    ) -> tuple[ImageRequest | EditRequest, list[Medium]]:
        """What is asked, and the pictures of a form."""
        settings = self._server.settings
        content_type = headers.get("content-type", "")
        if not (self._edits and is_form(content_type)):
            body = await read_json(headers, receive, place, settings.max_body_bytes)
            model: type[ImageRequest] | type[EditRequest] = EditRequest if self._edits else ImageRequest
            return parse(model, body, ignore_unknown=settings.ignore_unknown_fields), []
        fields = read_form(content_type, await read_body(headers, receive, place, settings.max_body_bytes))
        media = [_picture(field, settings.max_image_bytes) for field in fields if field.name == "image"]
        if not media:
            raise bad_request("image: is missing: send the picture that is to be changed", param="image")
        values = {field.name: _value(field) for field in fields if field.name != "image"}
        return parse(ImageRequest, values, ignore_unknown=settings.ignore_unknown_fields), media

    async def _answer(
        self,
        wanted: ImageRequest | EditRequest,
        media: list[Medium],
        place: Place,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        server = self._server
        assert server.pictures is not None
        if wanted.model is not None:
            server.check_model(wanted.model)
        if isinstance(wanted, EditRequest):
            links = [Link("image", f"images[{i}].url", image.url) for i, image in enumerate(wanted.images)]
            media = [await read_medium(link, server.settings) for link in links]
        if len(media) > server.settings.max_media:
            raise bad_request(f"{len(media)} pictures; at most {server.settings.max_media} are taken", param="image",
                              code="too_many_media")  # fmt: skip
        if media and "image" not in server.facts.input_modalities:
            raise bad_request("image: this model reads no pictures", param="image", code="unsupported_modality")
        name = f"img-{uuid.uuid4().hex}"
        job = _job(wanted, media, name, server.settings.media_separator)
        built, request = await server.build(job)
        place.hold(len(request))
        server.count_prompts([built])
        server.metrics.started.inc()
        with server.engine.ask({name: request}, samples=wanted.n) as box, server.pictures.ask(name, box):
            pictures = await self._drawn(wanted, built, box, place)
        body = _body(wanted, built, pictures)
        response = JSONResponse(body, headers={"X-Request-Id": name})
        await within(server.settings.patience_seconds, response(scope, receive, send))
        server.metrics.succeeded.labels("stop").inc()
        server.metrics.whole.observe(time.monotonic() - place.arrived)

    async def _drawn(self, wanted: ImageRequest | EditRequest, built: Built, box: Mailbox, place: Place) -> list[bytes]:
        """The picture of each sample; ApiError where one cannot be drawn or takes too long."""
        server = self._server
        assert server.pictures is not None and built.picture is not None
        options, found, begun = options_of(wanted, wanted.seed), dict[int, bytes](), False
        while len(found) < wanted.n:
            limit = server.settings.request_seconds if begun else min(
                server.settings.queue_seconds, server.settings.request_seconds
            )  # fmt: skip
            left = place.arrived + limit - time.monotonic()
            if left <= 0:
                raise unavailable(f"no picture was there after {limit:g} s: the server is busy", code="timeout")
            for event in await box.take(left):
                match event:
                    case BlockEvent():
                        begun = True
                        place.starts()
                        server.pictures.paint(paint_of(event, built.picture, options))
                    case Painted():
                        found[event.sample] = data_of(event)
                        server.metrics.painting.observe(event.seconds)
                    case FinishedEvent() if event.reason == "error":
                        raise server_fault(event.message or "the model could not go on with this request")
                    case FinishedEvent() if event.reason == "cancelled":
                        raise unavailable("the request was cancelled by the server", code="cancelled")
        return [found[sample] for sample in range(wanted.n)]


def options_of(fields: Any, seed: int) -> PictureOptions:
    """Of a request's ``PictureFields``."""
    return PictureOptions(
        steps=fields.steps, text_guidance=fields.guidance, image_guidance=fields.image_guidance, seed=seed
    )


def _job(wanted: ImageRequest | EditRequest, media: list[Medium], name: str, separator: str) -> Job:
    return Job(
        name=name,
        turns=(("user", (*media, wanted.prompt)),),
        separator=separator,
        max_new_tokens=1,  # behind the picture, of which nothing is used
        pictures=PicturesWanted(where="first", size=wanted.pixels),
        fields={"sampling": {"temperature": 0.0, "seed": wanted.seed}, "n": wanted.n, "ignore_eos": True},
    )


def _body(wanted: ImageRequest | EditRequest, built: Built, pictures: list[bytes]) -> dict[str, Any]:
    assert built.picture is not None
    width, height = built.picture.size
    usage = {
        "input_tokens": built.num_tokens, "output_tokens": wanted.n, "total_tokens": built.num_tokens + wanted.n,
        "input_tokens_details": {"text_tokens": built.tokens.get("text", 0), "image_tokens": built.tokens.get("image", 0)},
    }  # fmt: skip
    note = {"note": built.picture.note} if built.picture.note else {}
    return {
        "created": int(time.time()), "data": [{"b64_json": b64encode(data).decode()} for data in pictures],
        "size": f"{width}x{height}", "output_format": "png", "background": "opaque", "seed": wanted.seed, "usage": usage,
    } | note  # fmt: skip


def _picture(field: Field, most_bytes: int) -> Medium:
    if not field.is_file or not field.data:
        raise bad_request("image: must be a file that holds something", param="image", code="invalid_media")
    if len(field.data) > most_bytes:
        raise bad_request(f"image: {len(field.data)} bytes, above the limit of {most_bytes}", param="image",
                          code="media_too_large")  # fmt: skip
    return Medium(kind="image", param="image", data=field.data)


def _value(field: Field) -> Any:
    """Of a form's field: text, or the number that the schema wants."""
    if field.is_file:
        return field.name  # refused by name, as other fields that cannot be honoured
    if (kind := _NUMBERS.get(field.name)) is not None:
        try:
            return kind(field.text)
        except ValueError:
            raise bad_request(f"{field.name}: {field.text[:40]!r} is no number", param=field.name) from None
    return {"true": True, "false": False}.get(field.text, field.text) if field.name == "stream" else field.text
