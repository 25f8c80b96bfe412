"""From a task's messages and generation settings to the body of a request of OpenAI's API.

lmms-eval gives messages whose parts are ``{"type": "text", "text"}`` and ``{"type": "image" | "audio" | "video", "url"}``.
Their order is kept. A picture goes as PNG, a waveform as WAV without loss, a file as its bytes: nothing is decoded here,
least of all a video, whose frames and times the server chooses as in training.
"""

import base64
import io
import json
import mimetypes
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

THINKING = (
    "You are Uni-MoE-v2, a helpful multi-modal model. Your role as an assistant involves thoroughly exploring questions "
    "through a systematic thinking process before providing the final precise and accurate solutions. This requires "
    "engaging in a comprehensive cycle of analysis, summarizing, exploration, reassessment, reflection, backtracing, and "
    "iteration to develop well-considered thinking process. Please structure your response into two main sections: Thought "
    "and Solution using the specified format: <think> Thought section </think> Solution section. In the Thought section, "
    "detail your reasoning process in steps. Each step should include detailed considerations such as analyzing questions, "
    "summarizing relevant findings, brainstorming new ideas, verifying the accuracy of the current steps, refining any "
    "errors, and revisiting previous steps. In the Solution section, based on various attempts, explorations, and "
    "reflections from the Thought section, systematically present the final solution that you deem correct. The Solution "
    "section should be logical, accurate, and concise and detail necessary steps needed to reach the conclusion. Now, try "
    "to solve the following question through the above guidelines."
)
"""System prompt of the paper's appendix A.3."""

_SERVER_ONLY = ("top_k", "repetition_penalty", "seed")
_NO_MEANING_HERE = ("image_aspect_ratio",)
"""Settings of LLaVA's image processor that many tasks carry; the server's processor is the checkpoint's."""
_WAV_FLOAT, _WAV_INT = 3, 1


# ------------------------------------------------------------------------------------------------ messages


def chat_messages(messages: Iterable[Mapping[str, Any]], *, system_prompt: str | None = None) -> list[dict[str, Any]]:
    """OpenAI's messages, with ``system_prompt`` before everything. ValueError for a part that cannot be sent."""
    out = [{"role": "system", "content": system_prompt}] if system_prompt else []
    for message in messages:
        role, content = message["role"], message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else [_part(part) for part in content]
        if role == "system" and out and out[0]["role"] == "system":  # the server takes one, and first
            out[0]["content"] += "\n" + "".join(part["text"] for part in parts)
        elif role == "system":
            out.append({"role": role, "content": "".join(part["text"] for part in parts)})
        else:
            out.append({"role": role, "content": parts})
    return out


def _part(part: Mapping[str, Any]) -> dict[str, Any]:
    kind = part["type"]
    if kind == "text":
        return {"type": "text", "text": part["text"]}
    if kind not in _PARTS:
        raise ValueError(f"a part of type {kind!r} cannot be sent; only text, image, audio and video are")
    for name in ("start_time", "end_time"):
        if part.get(name) is not None:
            raise ValueError(f"{name} of a video cannot be sent: cut the clip in the task's doc_to_messages")
    return _PARTS[kind](part["url"])


def visual_part(value: Any) -> dict[str, Any]:
    """The part of a message for what a task's ``doc_to_visual`` gives: a picture, a waveform, the path of a clip."""
    kind = "image" if hasattr(value, "save") else "audio" if isinstance(value, Mapping) else "video"
    return {"type": kind, "url": value}


def _image(value: Any) -> dict[str, Any]:
    """A Pillow picture, or a file."""
    if hasattr(value, "save"):
        # PNG has neither CMYK nor floats, and Pillow writes no others than these into it.
        picture = value if value.mode in ("1", "L", "LA", "I", "I;16", "P", "RGB", "RGBA") else value.convert("RGB")
        out = io.BytesIO()
        picture.save(out, "PNG")
        url = _data_url("image/png", out.getvalue())
    else:
        url = _file_url(value, "image/png")
    return {"type": "image_url", "image_url": {"url": url}}


def _audio(value: Any) -> dict[str, Any]:
    """A waveform ``{"array", "sampling_rate"}``, encoded ``{"bytes", "path"}``, or a file."""
    suffix = "wav"
    if isinstance(value, Mapping) and value.get("array") is not None:
        data = wav_bytes(value["array"], int(value["sampling_rate"]))
    elif isinstance(value, Mapping) and value.get("bytes") is not None:
        data, suffix = value["bytes"], Path(value.get("path") or "").suffix[1:] or suffix
    else:
        path = Path(value["path"] if isinstance(value, Mapping) else value)
        data, suffix = path.read_bytes(), path.suffix[1:] or suffix
    return {"type": "input_audio", "input_audio": {"data": _base64(data), "format": suffix[:16]}}


def _video(value: Any) -> dict[str, Any]:
    """A file."""
    return {"type": "video_url", "video_url": {"url": _file_url(value, "video/mp4")}}


_PARTS = {"image": _image, "audio": _audio, "video": _video}


def wav_bytes(array: Any, sampling_rate: int) -> bytes:
    """A WAV file of ``array`` [samples], [samples, channels] or [channels, samples]: int16 stays int16, the rest float32."""
    import numpy  # comes with whatever made the array

    wave = numpy.asarray(array)
    if wave.ndim == 2 and wave.shape[0] < wave.shape[1]:
        wave = wave.T
    if wave.ndim not in (1, 2) or not sampling_rate > 0:
        raise ValueError(f"a waveform of shape {wave.shape} at {sampling_rate} Hz cannot be sent: give one or two axes")
    code, wave = (_WAV_INT, wave.astype("<i2")) if wave.dtype == numpy.int16 else (_WAV_FLOAT, wave.astype("<f4"))
    channels, size = (1 if wave.ndim == 1 else wave.shape[1]), wave.dtype.itemsize
    data = numpy.ascontiguousarray(wave).tobytes()
    layout = struct.pack(
        "<HHIIHH", code, channels, sampling_rate, sampling_rate * channels * size, channels * size, 8 * size
    )
    chunks = b"WAVE" + b"fmt " + struct.pack("<I", len(layout)) + layout + b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(chunks)) + chunks


def _file_url(value: Any, default: str) -> str:
    if not isinstance(value, str | Path):
        raise ValueError(f"a medium of type {type(value).__name__} cannot be sent: give the path of a file")
    if str(value).startswith("data:"):
        return str(value)
    return _data_url(mimetypes.guess_type(str(value))[0] or default, Path(value).read_bytes())


def _data_url(mime: str, data: bytes) -> str:
    return f"data:{mime};base64,{_base64(data)}"


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


# ------------------------------------------------------------------------------------------------ settings


def generation_fields(settings: Mapping[str, Any], *, max_new_tokens: int | None = None) -> dict[str, Any]:
    """Arguments of ``chat.completions.create`` for a task's ``generation_kwargs``.

    ``max_new_tokens`` overrides the task's. ``until`` becomes ``stop``, less the blank line that lmms-eval puts there for
    base models. Sampling needs ``do_sample: true`` or a temperature above 0 without ``do_sample: false``; otherwise the
    temperature is 0. ValueError names a setting that the server has not.
    """
    given = {name: value for name, value in settings.items() if value is not None and name not in _NO_MEANING_HERE}
    do_sample, temperature = given.pop("do_sample", None), given.pop("temperature", None)
    if do_sample is False:
        temperature = 0.0
    elif temperature is None:
        temperature = 1.0 if do_sample else 0.0
    fields: dict[str, Any] = {"temperature": float(temperature)}
    limit = given.pop("max_new_tokens", None)
    if limit := max_new_tokens or limit:
        fields["max_completion_tokens"] = int(limit)
    top_p = given.pop("top_p", None)
    if top_p is not None and temperature:
        fields["top_p"] = float(top_p)
    until = given.pop("until", None) or ()
    if stop := [text for text in ([until] if isinstance(until, str) else until) if text and text != "\n\n"]:
        fields["stop"] = stop
    if given.pop("num_beams", 1) != 1:
        raise ValueError(f"generation_kwargs: num_beams is {settings['num_beams']}, and the server has no beam search")
    extra = {name: given.pop(name) for name in _SERVER_ONLY if name in given}
    if extra:
        fields["extra_body"] = extra
    if given:
        name = next(iter(given))
        raise ValueError(
            f"generation_kwargs: {name} ({json.dumps(given[name], default=str)}) is nothing that the server knows"
        )
    return fields
