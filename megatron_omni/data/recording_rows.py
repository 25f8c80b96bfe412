"""Recordings and the rows that are written for them (recordings.py): whole rows, and fields of a text and its sound.

{"messages": [.., {"role": "assistant", "content": .., "speech": {"speaker": .., "file": ..}}]}      a whole row
{"id": .., "wav": .., "text": .., "speaker": .., "language": .., "dnsmos": ..}                       fields (Emilia's)
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from megatron_omni.data.descriptors import DataFile
from megatron_omni.data.errors import RecordError
from megatron_omni.data.index import Fingerprint
from megatron_omni.data.record import MediaFile, parse_record
from megatron_omni.data.sources import confine
from megatron_omni.data.speech_request import RELEASED, released_request
from megatron_omni.data.spoken import language_of
from megatron_omni.data.text_rows import find_rows
from megatron_omni.foreign import ForeignError, parse_json

_LANGUAGES = {"en": "English", "zh": "Chinese", "ja": "Japanese", "ko": "Korean", "fr": "French", "de": "German"}
_KEPT = ("dnsmos",)
"""Measures of quality that stay in the row, so that rows can be filtered."""


class Timed(NamedTuple):
    """A part of a recording's text with its time in seconds."""

    text: str
    start: float
    end: float


@dataclass(frozen=True)
class Recording:
    """A recording and the row that is written for it."""

    row: dict[str, Any]
    """Its last spoken answer gets the codes; it has no ``segments`` any more."""
    file: MediaFile
    segments: tuple[Timed, ...] = ()

    @property
    def speech(self) -> dict[str, Any]:
        """``speech`` of the row's last spoken answer."""
        found: dict[str, Any] = spoken_turn(self.row)["speech"]
        return found


@dataclass(frozen=True)
class Recordings:
    """Recordings by number. Reading one raises RecordError where it cannot be used."""

    name: str
    """What files made of them are called."""
    folder: Path
    """Where those are written, and what names of files in rows are relative to."""
    fingerprint: str
    """Of the data, without the sounds themselves."""
    places: Sequence[str]
    read: Callable[[int], Recording]

    def __len__(self) -> int:
        return len(self.places)


@dataclass(frozen=True)
class Voice:
    """Whose voice it is where the data does not say."""

    speaker: str | None = None
    style: str | None = None
    language: str | None = None


# ------------------------------------------------------------------------------------------------ rows


def recordings_of_rows(path: Path, root: Path, voice: Voice) -> Recordings:
    """Those of a JSONL file; ``wav`` and ``file`` of a row lie under ``root``."""
    ranges, lines = find_rows(path)
    data, places = DataFile(path), [f"{path}:{line}" for line in lines]

    def read(number: int) -> Recording:
        start, end = ranges[number].tolist()
        try:
            row = parse_json(data.read_at(start, end - start), places[number])
        except ForeignError as error:
            raise refused(places[number], "row", "", error.problem, "not_json") from error
        if isinstance(row, dict) and "wav" in row and not row.keys() & {"messages", "conversations"}:
            return recording_of_fields(row, f"{path.name}:{lines[number]}", voice, where=places[number], root=root)
        return recording_of_row(row, places[number], root)

    return Recordings(path.stem, root, str(Fingerprint.of(path)), places, read)


def recording_of_row(row: Any, where: str, root: Path) -> Recording:
    """Of a whole row whose ``speech.file`` lies under ``root``."""
    row, segments = without_segments(row, where)
    record = confine(parse_record(row, where=where), root)
    spoken = [message.speech for message in record.messages if message.speech is not None]
    if not spoken or spoken[-1].file is None:
        raise refused(where, "speech.file", None, "names no recording", "no_recording")
    if spoken[-1].start or spoken[-1].stop is not None:
        problem = "is a piece of its recording already; give the whole, with segments"
        raise refused(where, "speech.start / stop", spoken[-1].start, problem, "bad_speech")
    return Recording(row, spoken[-1].file, segments)


def without_segments(row: Any, where: str) -> tuple[Any, tuple[Timed, ...]]:
    """A row whose last spoken answer has no ``segments`` and no codes of before, and the segments."""
    turn = spoken_turn(row) if isinstance(row, dict) else {}
    if not isinstance(turn.get("speech"), dict):
        return row, ()
    speech = {key: value for key, value in turn["speech"].items() if key not in ("segments", "codes")}
    given = turn["speech"].get("segments")
    turns = [{**turn, "speech": speech} if each is turn else each for each in row["messages"]]
    return {**row, "messages": turns}, () if given is None else _timed(given, where)


def spoken_turn(row: dict[str, Any]) -> dict[str, Any]:
    """The last spoken answer of a row, empty where there is none."""
    turns = row.get("messages")
    spoken = [turn for turn in turns if isinstance(turn, dict) and "speech" in turn] if isinstance(turns, list) else []
    return spoken[-1] if spoken else {}


def _timed(given: object, where: str) -> tuple[Timed, ...]:
    """Segments in order; RecordError for some that are none, overlap or run backwards."""
    found: list[Timed] = []
    for item in given if isinstance(given, list) else [None]:
        text, start, end = (item.get(name) for name in Timed._fields) if isinstance(item, dict) else (None,) * 3
        numbers = all(isinstance(time, int | float) and not isinstance(time, bool) for time in (start, end))
        if not isinstance(text, str) or not text.strip() or not numbers:
            problem = 'is no list of {"text", "start", "end"} with times in seconds'
            raise refused(where, "speech.segments", item, problem, "bad_segments")
        assert isinstance(start, int | float) and isinstance(end, int | float)
        before = found[-1].end if found else 0.0
        if not before <= start < end < float("inf"):
            raise refused(where, "speech.segments", item, f"overlaps the one before, which ends at {before} s, or runs "
                           "backwards", "bad_segments")  # fmt: skip
        found.append(Timed(text.strip(), float(start), float(end)))
    return tuple(found)


# ------------------------------------------------------------------------------------------------ fields


def recording_of_fields(fields: Mapping[str, Any], key: str, voice: Voice, *, where: str, root: Path) -> Recording:
    """Of a text and its sound as fields (``wav`` lies under ``root``), as Emilia has them."""
    wav = field_of(fields, "wav", where=where)
    if wav is None:
        raise refused(where, "wav", fields.get("wav"), "names no recording", "no_recording")
    row, segments = row_of_fields(fields, key, wav, voice, where=where)
    return replace(recording_of_row(row, where, root), segments=segments)


def row_of_fields(
    fields: Mapping[str, Any], key: str, file: str | None, voice: Voice, *, where: str, text: str = ""
) -> tuple[dict[str, Any], tuple[Timed, ...]]:
    """The row of fields as data sets call them, and their ``segments``. ``text`` counts before theirs, and their voice where
    ``voice`` has none."""
    found = partial(field_of, fields, where=where)
    own = Voice(
        voice.speaker or (None if voice.style else found("speaker", "spk", "speaker_id", "speaker_name")),
        voice.style or (None if voice.speaker else found("style", "instruct")),
        voice.language or found("language"),
    )
    given = fields.get("segments")
    said = text or found("text", "caption", "transcript") or ""
    row = pair_row(found("id", "_id") or key, said, file, own, where=where)
    row |= {name: fields[name] for name in _KEPT if name in fields}
    return row, () if given is None else _timed(given, where)


def field_of(fields: Mapping[str, Any], *names: str, where: str) -> str | None:
    """The first of the fields that says something; RecordError for one that is neither text nor a whole number."""
    name = next((name for name in names if fields.get(name) not in (None, "")), None)
    if name is None:
        return None
    if isinstance(fields[name], bool) or not isinstance(fields[name], str | int):
        raise refused(where, name, fields[name], "is no text", "bad_type")
    return str(fields[name])


def pair_row(
    key: str, text: str, file: str | None, voice: Voice, *, where: str, spoken: str | None = None
) -> dict[str, Any]:
    """The row of a text that is read aloud: asked for in the released wording where there is one."""
    text, spoken = text.strip(), None if spoken is None else spoken.strip()
    if not text:
        raise refused(where, "text", text, "is empty", "no_text")
    if (voice.speaker is None) == (voice.style is None):
        problem = "names no speaker; give --speaker NAME" if voice.speaker is None else "has both a speaker and a style"
        raise refused(where, "speaker", voice.speaker, problem, "no_speaker")
    spoken = spoken or text
    language = _LANGUAGES.get((voice.language or "").lower(), voice.language) or language_of(spoken)
    named = {"style": voice.style} if voice.style is not None else {"speaker": voice.speaker, "language": language}
    speech = {**named, "text": spoken if spoken != text else None, "file": file}
    turns: list[dict[str, Any]] = []
    if ("read", language) in RELEASED:
        asked = released_request(voice=voice.speaker, style=voice.style, purpose="read", language=language)
        turns = [{"role": "user", "content": f"{text}\n{asked}"}]
    answer = {"role": "assistant", "content": text, "speech": {k: v for k, v in speech.items() if v is not None}}
    return {"id": key, "messages": [*turns, answer]}


def refused(where: str, field: str, value: object, problem: str, reason: str) -> RecordError:
    """Why a recording is left out."""
    return RecordError(where, field=field, value=value, problem=problem, fix="repair it or take it out", reason=reason)


def line_of(row: dict[str, Any]) -> str:
    """A row as a line of JSONL."""
    return json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n"
