"""What a builder process does: a conversation with its media in, a request of the engine out.

Media are decoded here and nowhere else in a server: a process that hangs on a damaged file is ended from outside, and
one that dies takes nothing with it. The number of tokens follows from the text and from the headers of the media, so
what does not fit is refused before anything is decoded.
"""

import io
import pickle
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL.Image import Image

from megatron_omni.batch import Modality
from megatron_omni.config.pictures import ImageGeneratorConfig
from megatron_omni.config.run import Recipe
from megatron_omni.data.decode import Decoder
from megatron_omni.data.decode.media import Media, MediaBytes, MediaError, Video
from megatron_omni.data.record import Part, RecordError, record_of_parts
from megatron_omni.data.sample import Sample, SampleBuilder
from megatron_omni.data.speech_request import asked_to_speak
from megatron_omni.data.tokenizer import SPEECH_START
from megatron_omni.generation.drawn_files import question_of
from megatron_omni.generation.outline import outline, source_rows
from megatron_omni.generation.request import Block, Request, Sampling
from megatron_omni.serve.errors import ApiError, bad_request
from megatron_omni.serve.jobs import Built, Job, Kind, Medium, Refusal
from megatron_omni.serve.picture_link import PictureSource


def work(jobs: Connection, recipe: Recipe) -> None:
    """Body of a builder, until the pipe ends: for each job a ``Refusal``, or a ``Built`` and the pickled request."""
    torch.set_num_threads(1)
    builder = SampleBuilder(recipe)
    builder.decoder = timed = _TimedDecoder(builder.decoder)
    jobs.send(None)  # ready
    while True:
        try:
            job: Job = jobs.recv()
        except EOFError:
            return
        try:
            timed.seconds.clear()
            built, request = build(builder, job, image=recipe.model.image)
        except ApiError as error:
            jobs.send(Refusal(status=error.status, message=error.message, param=error.param, code=error.code))
            continue
        jobs.send(replace(built, decoding=tuple(timed.seconds)))
        if request is not None:
            jobs.send_bytes(pickled(request))


def pickled(request: Request) -> bytes:
    """The request as the engine's process reads it."""
    data = io.BytesIO()
    _Pickler(data, protocol=pickle.HIGHEST_PROTOCOL).dump(request)
    return data.getvalue()


class _Pickler(pickle.Pickler):
    """Tensors as arrays: each in torch's own form takes the engine's process some 0.1 ms to read, between two steps."""

    def reducer_override(self, value: object) -> Any:
        return (torch.from_numpy, (value.numpy(),)) if isinstance(value, torch.Tensor) else NotImplemented


class _TimedDecoder:
    """A decoder that notes the seconds that each medium takes."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self.seconds: list[tuple[Kind, float]] = []

    @property
    def fallbacks(self) -> Mapping[str, int]:
        return self._decoder.fallbacks

    def decode_image(self, file: Media) -> Image:
        with self._noted("image"):
            return self._decoder.decode_image(file)

    def decode_audio(self, file: Media, **limits: Any) -> NDArray[np.float32]:
        with self._noted("audio"):
            return self._decoder.decode_audio(file, **limits)

    def decode_video(self, file: Media, **settings: Any) -> Video:
        with self._noted("video"):
            return self._decoder.decode_video(file, **settings)

    @contextmanager
    def _noted(self, kind: Kind) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds.append((kind, time.perf_counter() - start))


def build(
    builder: SampleBuilder, job: Job, *, image: ImageGeneratorConfig | None = None
) -> tuple[Built, Request | None]:
    """The prompt of a job, and the request to the engine where one is wanted; ApiError for what cannot be used. ``image`` of a
    model that draws."""
    prompt, drawn, picture = _prompt_or_refusal(builder, job, image)
    counts = torch.bincount(prompt.modality, minlength=len(Modality)).tolist()
    tokens = {modality.name.lower(): counts[modality] for modality in Modality}
    ids = None if job.text is None and job.fields is not None else tuple(prompt.input_ids.tolist())
    if job.fields is None:
        return Built(tokens=tokens, ids=ids), None
    answer = _answer_tokens(prompt.length, builder.data.seq_length, job)
    fields = job.fields | {"sampling": Sampling(**job.fields["sampling"])} | drawn
    try:
        # An answer of no tokens is a prompt whose log-probabilities are wanted; the engine makes one, which is not used.
        request = Request(name=job.name, prompt=prompt, max_new_tokens=max(answer, 1), **fields)
    except ValueError as error:
        raise bad_request(str(error)) from error
    token_bytes = {token: builder.tokenizer.token_bytes(token) for token in set(ids)} if ids is not None else None
    built = Built(tokens=tokens, max_new_tokens=answer, ids=ids, token_bytes=token_bytes, picture=picture)
    return built, request


_Prompt = tuple[Sample, dict[str, Any], PictureSource | None]
"""The prompt, fields of the request that pictures of its answer need, and what the painter must know of them."""


def _prompt(builder: SampleBuilder, job: Job, image: ImageGeneratorConfig | None) -> _Prompt:
    if job.text is not None:
        ids = list(job.text) if isinstance(job.text, tuple) else builder.tokenizer.encode(job.text)
        if not ids:
            raise bad_request("the prompt has no tokens", param="prompt")
        if wrong := [i for i in ids if not 0 <= i < builder.tokenizer.vocab_size]:
            raise bad_request(
                f"token {wrong[0]}: ids of this vocabulary are 0 to {builder.tokenizer.vocab_size - 1}", param="prompt"
            )
        return builder.build_text(ids), {}, None
    turns = [(role, [_part(part) for part in parts]) for role, parts in job.turns]
    record = record_of_parts(turns, where="request", separator=job.separator)
    if job.voice is not None and SPEECH_START in builder.tokenizer.specials:  # else it has never seen a spoken answer
        record = asked_to_speak(record, voice=job.voice, wording=builder.data.voice_request)
    # From headers: what is too long is not decoded.
    _answer_tokens(builder.prompt_size(record, think=job.think).tokens, builder.data.seq_length, job)
    prompt = builder.build_prompt(record, think=job.think)
    if job.pictures is None or image is None or job.pictures.where is None:
        return prompt, {"banned_ids": builder.unwritten}, None
    block = Block(
        ids=builder.unwritten, where=job.pictures.where, most=job.pictures.most, vision=source_rows(record, prompt)
    )
    shown = outline(record, builder, image, wanted=job.pictures.size)
    pixels = None if shown.source is None else shown.source.numpy().tobytes()
    picture = PictureSource(size=shown.size, pixels=pixels, note=shown.note, prompt=question_of(record))
    return prompt, {"block": block}, picture


def _part(part: str | Medium) -> Part:
    return part if isinstance(part, str) else (part.kind, MediaBytes(part.param, part.data))


def _answer_tokens(prompt_tokens: int, most_tokens: int, job: Job) -> int:
    """Most tokens of the answer; ApiError where prompt and answer are longer than the model takes."""
    room = most_tokens - prompt_tokens
    wanted = job.max_new_tokens
    if room < (1 if wanted is None else wanted):
        raise _too_long(prompt_tokens, most_tokens, job)
    return wanted if wanted is not None else min(room, job.default_new_tokens or room)


def _too_long(prompt_tokens: int, most_tokens: int, job: Job) -> ApiError:
    wanted = job.max_new_tokens
    asked = ", which leaves no room for an answer" if wanted is None else f" and the answer up to {wanted}"
    fix = "shorten the prompt" if wanted is None else "shorten the prompt or lower max_tokens"
    return bad_request(
        f"the prompt has {prompt_tokens} tokens{asked}; the model takes {most_tokens} together: {fix}",
        param=job.param,
        code="context_length_exceeded",
    )


def _prompt_or_refusal(builder: SampleBuilder, job: Job, image: ImageGeneratorConfig | None) -> _Prompt:
    """The prompt; what its record or media are refused for, as an ApiError that names the part of the request."""
    try:
        return _prompt(builder, job, image)
    except MediaError as error:
        code = "media_too_large" if error.reason == "media_too_large" else "invalid_media"
        said = str(error).removeprefix(f"media file {error.file!r}: ")
        raise bad_request(f"{error.file}: {said}", param=error.file, code=code) from error
    except RecordError as error:
        if error.reason == "too_long":
            raise _too_long(int(error.value), builder.data.seq_length, job) from error  # type: ignore[call-overload]
        raise bad_request(str(error).removeprefix("request: "), param=job.param, code=error.reason) from error
