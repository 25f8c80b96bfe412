"""The paths of the server, as a Starlette application."""

import logging
import re
from base64 import b64encode
from functools import cache
from hashlib import sha256
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from megatron_omni.serve.completions import Completions, check_writes, read_turns
from megatron_omni.serve.errors import ApiError, not_here, server_fault
from megatron_omni.serve.guard import Guard
from megatron_omni.serve.intake import ClientGone, read_json
from megatron_omni.serve.jobs import Job
from megatron_omni.serve.pictures import Pictures
from megatron_omni.serve.schema import ChatRequest, CompletionRequest, TokenizeRequest, parse
from megatron_omni.serve.server import Server
from megatron_omni.serve.speech import Speech
from megatron_omni.serve.speech_link import as_dict

_INLINE = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)
NOT_YET = {
    "/v1/audio/speech": "make speech: it was started without --speaker",
    "/v1/audio/voices": "make speech: it was started without --speaker",
    "/v1/images/generations": "make pictures: its model draws nothing, or it was started with --no-pictures",
    "/v1/images/edits": "make pictures: its model draws nothing, or it was started with --no-pictures",
}

logger = logging.getLogger(__name__)


def application(server: Server) -> Starlette:
    """All paths over one server."""
    routes: list[BaseRoute] = [
        Route("/", _page, methods=["GET"]),
        Route("/v1/chat/completions", Completions(server, ChatRequest), methods=["POST"]),
        Route("/v1/completions", Completions(server, CompletionRequest), methods=["POST"]),
        Route("/tokenize", _Tokenize(server), methods=["POST"]),
        Route("/v1/models", _Status(server).models, methods=["GET"]),
        Route("/v1/models/{name:path}", _Status(server).model, methods=["GET"]),
        Route("/health", _Status(server).health, methods=["GET"]),
        Route("/ready", _Status(server).ready, methods=["GET"]),
        Route("/metrics", _Status(server).metrics, methods=["GET"]),
        *_speech_routes(server),
        *_picture_routes(server),
        *(Route(path, _not_yet, methods=["GET", "POST"]) for path in NOT_YET),
    ]
    guard = Middleware(Guard, api_keys=server.settings.api_keys, allowed_hosts=server.settings.allowed_hosts)
    app = Starlette(routes=routes, middleware=[guard])

    async def on_api_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        server.metrics.errors.labels(str(error.status)).inc()
        return JSONResponse(error.body(), error.status, error.headers)

    async def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        said = {404: f"no path {request.url.path[:100]!r} here", 405: f"{request.method} is not allowed here"}
        return await on_api_error(request, ApiError(
            error.status_code, said.get(error.status_code, error.detail), headers=dict(error.headers or {})
        ))  # fmt: skip

    async def on_fault(request: Request, error: Exception) -> Response:
        logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return await on_api_error(request, server_fault("the server failed; its log says why"))

    app.exception_handlers |= {ApiError: on_api_error, HTTPException: on_http_error, Exception: on_fault}
    return app


async def _page(_: Request) -> Response:
    text, policy = read_page()
    return Response(
        text, media_type="text/html", headers={"Content-Security-Policy": policy, "Cache-Control": "no-cache"}
    )


@cache
def read_page() -> tuple[str, str]:
    """The page, and what a browser lets it do: its own script and style, this server, media that it holds itself."""
    text = files("megatron_omni.serve").joinpath("page", "index.html").read_text(encoding="utf-8")
    hashes = {kind: b64encode(sha256(inline.encode()).digest()).decode() for kind, inline in _INLINE.findall(text)}
    policy = (
        f"default-src 'none'; script-src 'sha256-{hashes['script']}'; style-src 'sha256-{hashes['style']}'; "
        "connect-src 'self'; img-src data: blob:; media-src data: blob:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    return text, policy


async def _not_yet(request: Request) -> Response:
    raise not_here(NOT_YET[request.url.path])


def _speech_routes(server: Server) -> list[BaseRoute]:
    """Of a server with a speaker; of one that only speaks no path asks for text."""
    if server.speech is None:
        return []
    speech = Speech(server)
    return [
        Route("/v1/audio/speech", speech, methods=["POST"]),
        Route("/v1/audio/voices", speech.voices, methods=["GET"]),
    ]


def _picture_routes(server: Server) -> list[BaseRoute]:
    """Of a server whose model draws."""
    if server.pictures is None:
        return []
    return [
        Route("/v1/images/generations", Pictures(server, edits=False), methods=["POST"]),
        Route("/v1/images/edits", Pictures(server, edits=True), methods=["POST"]),
    ]


class _Tokenize:
    """``POST /tokenize``, as vLLM has it."""

    def __init__(self, server: Server) -> None:
        self._server = server

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        server = self._server
        server.check_takes_requests()
        check_writes(server)
        try:
            with server.door.place() as place:
                body = await read_json(Headers(scope=scope), receive, place, server.settings.max_body_bytes)
                wanted = parse(TokenizeRequest, body, ignore_unknown=server.settings.ignore_unknown_fields)
                server.check_model(wanted.model if wanted.model is not None else server.facts.name)
                if wanted.messages is not None:
                    turns = await read_turns(server, wanted.messages)
                    think = wanted.chat_template_kwargs.enable_thinking
                    job = Job(name="tokenize", turns=turns, separator=server.settings.media_separator, think=think)
                else:
                    job = Job(name="tokenize", text=wanted.prompt)
                built, _ = await server.build(job)
        except ClientGone:
            return
        said = {"count": built.num_tokens, "max_model_len": server.facts.seq_length, "tokens": list(built.ids or ())}
        await JSONResponse(said)(scope, receive, send)


class _Status:
    """What a server says of itself."""

    def __init__(self, server: Server) -> None:
        self._server = server

    async def health(self, _: Request) -> Response:
        """Whether the engine lives."""
        alive = self._server.alive
        return JSONResponse({"status": "ok" if alive else "engine dead"}, 200 if alive else 503)

    async def ready(self, _: Request) -> Response:
        """Whether requests are taken."""
        try:
            self._server.check_takes_requests()
        except ApiError as error:
            return JSONResponse({"status": error.code}, 503, error.headers)
        return JSONResponse({"status": "ready"})

    async def models(self, _: Request) -> Response:
        """The list of one model."""
        speech = self._server.speech
        speaker = [as_dict(speech.ready)] if speech is not None and speech.ready is not None else []
        own = self._model()
        return JSONResponse({"object": "list", "data": [own, *(one for one in speaker if one["id"] != own["id"])]})

    async def model(self, request: Request) -> Response:
        """That model."""
        self._check_opened()
        self._server.check_model(request.path_params["name"])
        return JSONResponse(self._model())

    async def metrics(self, _: Request) -> Response:
        """Prometheus' text."""
        return Response(self._server.metrics.text(), media_type="text/plain; version=0.0.4")

    def _check_opened(self) -> None:
        if self._server.engine.facts is None:
            self._server.check_takes_requests()

    def _model(self) -> dict[str, Any]:
        self._check_opened()
        facts = self._server.facts
        return {
            "id": facts.name, "object": "model", "created": facts.created, "owned_by": "megatron_omni",
            "max_model_len": facts.seq_length, "input_modalities": list(facts.input_modalities),
            "output_modalities": list(self._server.output_modalities), "system_fingerprint": facts.fingerprint,
        }  # fmt: skip
