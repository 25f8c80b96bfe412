"""Functions of the local tasks: copied beside their YAML files by ``local_tasks.py``, called by lmms-eval."""

import io
import re
from typing import Any

import av
import datasets
import numpy

MARKER = re.compile(r"(<image>|<audio>|<video>)")


def encoded_audio(docs: Any) -> Any:
    """The documents with sounds as their bytes: datasets would decode them with torchcodec, which is not there."""
    return docs.cast_column("audios", datasets.Sequence(datasets.Audio(decode=False)))


def messages(doc: dict[str, Any]) -> list[dict[str, Any]]:
    """The question with its media where their markers stand."""
    media = {"<image>": iter(doc["images"]), "<audio>": iter(doc["audios"]), "<video>": iter(doc["videos"])}
    parts = []
    for piece in filter(None, MARKER.split(doc["question"])):
        if piece in media:
            parts.append({"type": piece[1:-1], "url": next(media[piece])})
        else:
            parts.append({"type": "text", "text": piece})
    return [{"role": "user", "content": parts}]


def decoded_messages(doc: dict[str, Any]) -> list[dict[str, Any]]:
    """The same with sounds as waveforms, the other form in which tasks give them."""
    out = messages(doc)
    for part in out[0]["content"]:
        if part["type"] == "audio":
            with av.open(io.BytesIO(part["url"]["bytes"])) as sound:
                frames = [frame.to_ndarray() for frame in sound.decode(audio=0)]
                rate = sound.streams.audio[0].rate
            part["url"] = {"array": numpy.concatenate(frames, axis=1)[0], "sampling_rate": rate}  # mono
    return out
