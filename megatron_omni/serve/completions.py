"""``POST /v1/chat/completions`` and ``/v1/completions``: from the body to the last byte of the answer.

    body -> schema -> media -> builder -> engine -> events -> one JSON body, or a stream of server-sent events

Errors before the first byte of an answer have their own status; later ones are an event of the stream, because a stream
that merely ends looks like a whole answer.
"""

import asyncio
import contextlib
import hashlib
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from megatron_omni.generation.request import Event
from megatron_omni.serve.answers import Answer, ChatAnswer, TextAnswer
from megatron_omni.serve.drawn_answers import DrawnAnswer
from megatron_omni.serve.engine_client import Mailbox
from megatron_omni.serve.errors import ApiError, bad_request, not_here, server_fault, unavailable
from megatron_omni.serve.intake import ClientGone, Place, read_json, while_connected, within
from megatron_omni.serve.jobs import Built, Job, PicturesWanted, Turn
from megatron_omni.serve.media import Link, read_medium
from megatron_omni.serve.picture_link import PICTURES_OF_A_SAMPLE, Painted
from megatron_omni.serve.pictures import options_of
from megatron_omni.serve.schema import (
    AudioPart,
    ChatRequest,
    CompletionRequest,
    ImagePart,
    InputAudioPart,
    Message,
    Part,
    TextPart,
    VideoPart,
    parse,
)
from megatron_omni.serve.server import Server
from megatron_omni.serve.speech_link import Say, SpeechEvent
from megatron_omni.serve.spoken_answers import SpokenAnswer
from megatron_omni.serve.streams import EventStream


class Completions:
    """The ASGI end point of one kind of completion."""

    def __init__(self, server: Server, model: type[ChatRequest] | type[CompletionRequest]) -> None:
        self._server, self._model = server, model

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        server, headers = self._server, Headers(scope=scope)
        server.check_takes_requests()
        check_writes(server)
        try:
            with server.door.place() as place:
                body = await read_json(headers, receive, place, server.settings.max_body_bytes)
                wanted = parse(self._model, body, ignore_unknown=server.settings.ignore_unknown_fields)
                del body
                await while_connected(receive, _answer(server, wanted, place, scope, receive, send))
        except ClientGone:
            server.metrics.aborted.inc()


async def _answer(
    server: Server, wanted: ChatRequest | CompletionRequest, place: Place, scope: Scope, receive: Receive, send: Send
) -> None:
    server.check_model(wanted.model)
    name = f"{'chatcmpl' if isinstance(wanted, ChatRequest) else 'cmpl'}-{uuid.uuid4().hex}"
    seed = wanted.seed if wanted.seed is not None else secrets.randbits(32)
    # What one key's holder asked is told to no other by how fast an answer comes.
    key = Headers(scope=scope).get("authorization", "") if server.settings.api_keys else ""
    jobs = await _jobs(server, wanted, name, seed, salt=hashlib.sha256(key.encode()).hexdigest() if key else "")
    built, requests = {}, {}
    for job in jobs:
        built[job.name], requests[job.name] = await server.build(job)
        place.hold(sum(map(len, requests.values())))
    server.count_prompts(built.values())
    settings: dict[str, Any] = {
        "n": wanted.n, "logprobs": wanted.num_top_logprobs is not None, "seed": seed,
        "stop_ids": wanted.stop_token_ids or (), "token_bytes": {},
    }  # fmt: skip
    in_queue = server.metrics.in_queue
    admitted = lambda: in_queue.observe(time.monotonic() - place.arrived)  # noqa: E731
    with contextlib.ExitStack() as stack:
        samples, seconds = wanted.n * len(jobs), server.settings.chunk_seconds
        box = stack.enter_context(
            server.engine.ask(requests, samples=samples, admitted=admitted, token_seconds=seconds)
        )
        settings["token_bytes"] = box.token_bytes
        for item in built.values():
            box.token_bytes.update(item.token_bytes or {})
        answer: Answer
        if isinstance(wanted, ChatRequest) and wanted.audio is not None:
            answer = _spoken(server, wanted, stack, box, name, built, settings)
        elif isinstance(wanted, ChatRequest) and (source := built[name].picture) is not None:
            assert server.pictures is not None
            stack.enter_context(server.pictures.ask(name, box))
            answer = DrawnAnswer(
                name, server.facts, built, source=source, options=options_of(wanted.image, seed),
                paint=server.pictures.paint, **settings,
            )  # fmt: skip
        elif isinstance(wanted, ChatRequest):
            answer = ChatAnswer(name, server.facts, built, **settings)
        else:
            answer = TextAnswer(name, server.facts, built, echo=wanted.echo, **settings)
        events = _events(server, box, answer, place)
        if wanted.stream:
            await _stream(server, events, answer, name, wanted.include_usage, send)
        else:
            async for _ in events:
                pass
            response = JSONResponse(answer.body(), headers={"X-Request-Id": name})
            await within(server.settings.patience_seconds, response(scope, receive, send))
    for choice in answer.choices:
        if choice.end is not None:
            server.metrics.succeeded.labels(choice.end.reason).inc()
    server.metrics.whole.observe(time.monotonic() - place.arrived)


def _spoken(
    server: Server,
    wanted: ChatRequest,
    stack: contextlib.ExitStack,
    box: Mailbox,
    name: str,
    built: Mapping[str, Built],
    settings: dict[str, Any],
) -> Answer:
    """The answer whose tokens go on to the speaker, which answers into the same mailbox."""
    assert server.speech is not None and wanted.audio is not None
    speech, form = server.speech, wanted.audio.sound_format
    said = Say(
        name=name, form=form, voice=wanted.audio.voice, style=None, text=None, temperature=0.0,
        seed=settings["seed"],
    )  # fmt: skip
    stack.enter_context(speech.ask(said, box))
    return SpokenAnswer(
        name, server.facts, built, form=form, tell=lambda ids, end: speech.tell(name, ids, end=end), **settings
    )


# ------------------------------------------------------------------------------------------------ what is asked


def check_writes(server: Server) -> None:
    """ApiError 501 where there is a speaker and no model that answers."""
    if server.only_speaks:
        raise not_here("answer: its checkpoint is a speech generator, see /v1/audio/speech")


async def _jobs(
    server: Server, wanted: ChatRequest | CompletionRequest, name: str, seed: int, *, salt: str
) -> list[Job]:
    fields = {
        "min_new_tokens": wanted.min_tokens, "sampling": _sampling(wanted, seed), "n": wanted.n, "stop": wanted.stops,
        "stop_ids": tuple(wanted.stop_token_ids or ()), "ignore_eos": wanted.ignore_eos,
        "logprobs": wanted.num_top_logprobs, "text": True, "salt": salt,
    }  # fmt: skip
    common: dict[str, Any] = {
        "max_new_tokens": wanted.max_new_tokens, "default_new_tokens": server.settings.max_new_tokens,
    }  # fmt: skip
    if isinstance(wanted, ChatRequest):
        check_modalities(wanted, server.output_modalities)
        voice = wanted.audio.voice if wanted.audio is not None else None
        if voice is not None and server.speech is not None:
            server.speech.check_voice(voice, param="audio.voice")
        turns = await read_turns(server, wanted.messages)
        common |= {
            "separator": server.settings.media_separator, "think": wanted.chat_template_kwargs.enable_thinking,
            "voice": voice, "pictures": _pictures(server, wanted),
        }  # fmt: skip
        return [Job(name=name, turns=turns, fields=fields | {"reasoning": True}, **common)]
    fields["prompt_logprobs"] = wanted.num_top_logprobs if wanted.echo else None
    texts = [prompt if isinstance(prompt, str) else tuple(prompt) for prompt in wanted.prompts]
    return [Job(name=f"{name}-{i}", text=text, fields=fields, **common) for i, text in enumerate(texts)]


def _sampling(wanted: ChatRequest | CompletionRequest, seed: int) -> dict[str, Any]:
    """At temperature 0 the most likely token is taken, whatever the nucleus."""
    drawn = {"top_p": wanted.top_p, "top_k": max(wanted.top_k, 0), "min_p": wanted.min_p}
    return (drawn if wanted.temperature else {}) | {
        "temperature": wanted.temperature,
        "repetition_penalty": wanted.repetition_penalty,
        "presence_penalty": wanted.presence_penalty,
        "frequency_penalty": wanted.frequency_penalty,
        "seed": seed,
    }


def _pictures(server: Server, wanted: ChatRequest) -> PicturesWanted | None:
    """Of a model that draws: where the request says nothing of modalities, it may; ["image"] alone begins with a picture."""
    if server.pictures is None:
        return None
    if wanted.audio is not None or ("modalities" in wanted.model_fields_set and "image" not in wanted.modalities):
        return PicturesWanted(where=None)
    if "text" not in wanted.modalities:
        return PicturesWanted(where="first", size=wanted.image.pixels)
    return PicturesWanted(where="chosen", most=PICTURES_OF_A_SAMPLE, size=wanted.image.pixels)


def check_modalities(wanted: ChatRequest, makes: tuple[str, ...]) -> None:
    """ApiError 400 for an answer in a form that the checkpoint cannot make."""
    unknown = [name for name in wanted.modalities if name not in makes]
    if unknown:
        raise bad_request(f"modalities: {unknown[0][:40]!r} cannot be made by this checkpoint, only {', '.join(makes)}",
                          param="modalities", code="unsupported_modality")  # fmt: skip
    if {"audio", "image"} <= set(wanted.modalities):
        raise bad_request("modalities: an answer is spoken or drawn: ask for audio or image", param="modalities",
                          code="unsupported_modality")  # fmt: skip
    if "audio" in wanted.modalities and wanted.audio is None:
        raise bad_request(
            'audio: is missing: name a voice and a format for modalities ["text", "audio"]', param="audio"
        )


async def read_turns(server: Server, messages: list[Message]) -> tuple[Turn, ...]:
    """The conversation with the bytes of its media; ApiError for media that the model or the limits do not take."""
    links = [
        _link(part, f"messages[{i}].content[{j}]")
        for i, message in enumerate(messages)
        for j, part in enumerate(message.content if isinstance(message.content, list) else ())
        if not isinstance(part, TextPart)
    ]
    if len(links) > server.settings.max_media:
        raise bad_request(f"{len(links)} pictures, sounds and videos; at most {server.settings.max_media} are taken",
                          param="messages", code="too_many_media")  # fmt: skip
    for link in links:
        if link.kind not in server.facts.input_modalities:
            takes = ", ".join(server.facts.input_modalities)
            raise bad_request(f"{link.param}: this model reads no {link.kind}, only {takes}", param=link.param,
                              code="unsupported_modality")  # fmt: skip
    media = iter([await read_medium(link, server.settings) for link in links])
    return tuple(
        (
            "system" if message.role == "developer" else message.role,
            (message.content,) if isinstance(message.content, str) else
            tuple(part.text if isinstance(part, TextPart) else next(media) for part in message.content),
        )
        for message in messages
    )  # fmt: skip


def _link(part: Part, param: str) -> Link:
    match part:
        case ImagePart():
            return Link("image", f"{param}.image_url.url", part.image_url.url)
        case AudioPart():
            return Link("audio", f"{param}.audio_url.url", part.audio_url.url)
        case InputAudioPart():
            return Link("audio", f"{param}.input_audio.data", f"data:;base64,{part.input_audio.data}")
        case VideoPart():
            return Link("video", f"{param}.video_url.url", part.video_url.url)
    raise AssertionError(part)


# ------------------------------------------------------------------------------------------------ what is answered


async def _events(
    server: Server, box: Mailbox, answer: Answer, place: Place
) -> AsyncIterator[list[Event | SpeechEvent | Painted]]:
    """Events until every answer has ended, taken by ``answer``; empty lists where none came for a while."""
    settings, metrics = server.settings, server.metrics
    last_time = place.arrived
    last_count = 0
    metrics.started.inc()
    while not answer.complete:
        started = answer.num_tokens > 0
        limit = settings.request_seconds if started else min(settings.queue_seconds, settings.request_seconds)
        left = place.arrived + limit - time.monotonic()
        if left <= 0:
            what = "the answer was not whole" if started else "no token came"
            raise unavailable(f"{what} after {limit:g} s: the server is busy", code="timeout")
        events = await box.take(min(left, settings.ping_seconds))
        answer.take(events)  # type: ignore[arg-type]  # pictures come to answers that were asked for some
        for event in events:
            if isinstance(event, Painted):
                metrics.painting.observe(event.seconds)
        if answer.num_tokens > last_count:
            now = time.monotonic()
            if not started:
                metrics.first_token.observe(now - place.arrived)
                place.starts()
            else:
                metrics.per_token.observe((now - last_time) / (answer.num_tokens - last_count) * len(answer.choices))
            last_time, last_count = now, answer.num_tokens
        yield events


async def _stream(
    server: Server,
    events: AsyncIterator[list[Event | SpeechEvent | Painted]],
    answer: Answer,
    name: str,
    usage: bool,
    send: Send,
) -> None:
    stream = EventStream(send, name, server.settings.patience_seconds)
    try:
        async for some in events:
            if some:
                await stream.send(*answer.chunks(usage=usage))
            else:
                await stream.ping()
        if usage:
            await stream.send(answer.usage_chunk())
    except ApiError as error:
        if not stream.begun:
            raise
        server.metrics.errors.labels(str(error.status)).inc()
        await stream.send(error.body())
    except (ClientGone, asyncio.CancelledError):
        raise
    except Exception:
        if stream.begun:
            await stream.send(server_fault("the server failed; its log says why").body())
            await stream.end()
        raise
    await stream.end()
