"""Recordings with their texts, of which codes are made: rows, folders and tars as people have them.

    x.jsonl              rows (record.py) whose last spoken answer names a ``file``; ``segments`` of its ``speech`` cut it
    LJSpeech             DIR/metadata.csv (``id|text|normalised text``) and DIR/wavs/id.wav
    LibriTTS, VCTK, ..   DIR/SPEAKER/[CHAPTER/]x.wav with x.normalized.txt or x.txt beside it
    x.tar                WebDataset: a sound of each key with .txt, or .json with ``text`` and ``speaker`` (Emilia) or a whole row

    "speech": {"speaker": "Jenny", "file": "talk.flac", "segments": [{"text": "Good evening.", "start": 0.4, "end": 1.9}, ..]}

Segments are sentences or words with their times in seconds; the pieces of speech_pieces.py end where a segment ends. Nothing is
aligned here: a long recording without times is a sample as a whole, or too long.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron_omni.data.assemble import media_kind
from megatron_omni.data.descriptors import DataFile
from megatron_omni.data.errors import RecordError
from megatron_omni.data.index import Fingerprint
from megatron_omni.data.record import MediaFile, parse_record
from megatron_omni.data.sources import confine
from megatron_omni.data.speech_request import RELEASED, released_request
from megatron_omni.data.spoken import language_of
from megatron_omni.data.tar import TarSample, tar_samples
from megatron_omni.data.text_rows import find_rows
from megatron_omni.foreign import ForeignError, decode_text, parse_json, read_text

_LANGUAGES = {"en": "English", "zh": "Chinese", "ja": "Japanese", "ko": "Korean", "fr": "French", "de": "German"}
_TABLE_BYTES = 1 << 30


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
        found: dict[str, Any] = _spoken_turn(self.row)["speech"]
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


def recordings_of(path: Path, voice: Voice, *, root: str = "") -> Recordings:
    """The recordings of a file or folder; ValueError for what is none of the kinds above."""
    if path.is_dir():
        return _table(path, voice) if (path / "metadata.csv").is_file() else _tree(path, voice)
    if path.suffix == ".tar":
        return _tar(path, voice)
    return _rows(path, Path(root) if root else path.parent)


# ------------------------------------------------------------------------------------------------ rows


def _rows(path: Path, root: Path) -> Recordings:
    ranges, lines = find_rows(path)
    data, places = DataFile(path), [f"{path}:{line}" for line in lines]

    def read(number: int) -> Recording:
        start, end = ranges[number].tolist()
        try:
            row = parse_json(data.read_at(start, end - start), places[number])
        except ForeignError as error:
            raise _refused(places[number], "row", "", error.problem, "not_json") from error
        return _recording_of_row(row, places[number], root)

    return Recordings(path.stem, root, str(Fingerprint.of(path)), places, read)


def _recording_of_row(row: Any, where: str, root: Path) -> Recording:
    row, segments = _without_segments(row, where)
    record = confine(parse_record(row, where=where), root)
    spoken = [message.speech for message in record.messages if message.speech is not None]
    if not spoken or spoken[-1].file is None:
        raise _refused(where, "speech.file", None, "names no recording", "no_recording")
    if spoken[-1].start or spoken[-1].stop is not None:
        problem = "is a piece of its recording already; give the whole, with segments"
        raise _refused(where, "speech.start / stop", spoken[-1].start, problem, "bad_speech")
    return Recording(row, spoken[-1].file, segments)


def _without_segments(row: Any, where: str) -> tuple[Any, tuple[Timed, ...]]:
    """A row whose last spoken answer has no ``segments`` and no codes of before, and the segments."""
    turn = _spoken_turn(row) if isinstance(row, dict) else {}
    if not isinstance(turn.get("speech"), dict):
        return row, ()
    speech = {key: value for key, value in turn["speech"].items() if key not in ("segments", "codes")}
    given = turn["speech"].get("segments")
    turns = [{**turn, "speech": speech} if each is turn else each for each in row["messages"]]
    return {**row, "messages": turns}, () if given is None else _timed(given, where)


def _spoken_turn(row: dict[str, Any]) -> dict[str, Any]:
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
            raise _refused(where, "speech.segments", item, problem, "bad_segments")
        assert isinstance(start, int | float) and isinstance(end, int | float)
        before = found[-1].end if found else 0.0
        if not before <= start < end < float("inf"):
            raise _refused(where, "speech.segments", item, f"overlaps the one before, which ends at {before} s, or runs "
                           "backwards", "bad_segments")  # fmt: skip
        found.append(Timed(text.strip(), float(start), float(end)))
    return tuple(found)


# ------------------------------------------------------------------------------------------------ folders


def _table(folder: Path, voice: Voice) -> Recordings:
    """LJSpeech: no quotes, so the csv module's rules do not hold."""
    table = folder / "metadata.csv"
    lines = [line for line in read_text(table, most_bytes=_TABLE_BYTES).splitlines() if line.strip()]
    if not any("|" in line for line in lines):
        raise ValueError(f"{table}: no lines of id|text|normalised text, as LJSpeech has them")
    places = [f"{table}:{number}" for number in range(1, len(lines) + 1)]

    def read(number: int) -> Recording:
        key, *texts = (part.strip() for part in lines[number].split("|"))
        if not key or not texts or not texts[0]:
            raise _refused(places[number], "line", lines[number], "is not id|text|normalised text", "bad_table")
        file = f"wavs/{key}" if Path(key).suffix else f"wavs/{key}.wav"
        row = pair_row(key, texts[0], file, voice, where=places[number], spoken=texts[-1] or texts[0])
        return _recording_of_row(row, places[number], folder)

    return Recordings(folder.name, folder, str(Fingerprint.of(table)), places, read)


def _tree(folder: Path, voice: Voice) -> Recordings:
    """SPEAKER/[CHAPTER/]x.wav with a text beside each."""
    found = sorted(
        Path(parent, name).relative_to(folder)
        for parent, folders, names in os.walk(folder)
        for name in names
        if media_kind(Path(name).suffix[1:]) == "audio" and not name.startswith(".")
    )
    if not found:
        raise ValueError(f"{str(folder)!r} holds neither metadata.csv (LJSpeech) nor SPEAKER/CHAPTER/x.wav (LibriTTS)")
    places = [str(folder / file) for file in found]

    def read(number: int) -> Recording:
        file, where = found[number], places[number]
        texts = [(folder / file).with_suffix(suffix) for suffix in (".normalized.txt", ".txt")]
        text = next((text for text in texts if text.is_file()), None)
        if text is None:
            raise _refused(where, "text", file.name, f"has neither {texts[0].name} nor {texts[1].name}", "no_text")
        owner = file.parts[max(len(file.parts) - 3, 0)] if len(file.parts) > 1 else None
        own = Voice(voice.speaker or (None if voice.style else owner), voice.style, voice.language)
        try:
            said = read_text(text).strip()
        except ForeignError as error:
            raise _refused(where, "text", text.name, error.problem, "bad_text") from error
        return _recording_of_row(pair_row(str(file), said, str(file), own, where=where), where, folder)

    names = hashlib.sha256("\n".join(map(str, found)).encode()).hexdigest()
    return Recordings(folder.name, folder, names, places, read)


# ------------------------------------------------------------------------------------------------ tars


def _tar(path: Path, voice: Voice) -> Recordings:
    samples = list(tar_samples(path))
    places = [f"{path}:{sample.key}" for sample in samples]
    return Recordings(
        path.stem, path.parent, str(Fingerprint.of(path)), places,
        lambda number: _recording_of_sample(samples[number], places[number], voice),
    )  # fmt: skip


def _recording_of_sample(sample: TarSample, where: str, voice: Voice) -> Recording:
    if sample.problem:
        raise _refused(where, "member", sample.key, sample.problem, "damaged_tar")
    sounds = [member for suffix, member in sample.members.items() if media_kind(suffix) == "audio"]
    if len(sounds) != 1:
        raise _refused(where, "members", list(sample.members), f"{len(sounds)} sounds of one key", "no_recording")
    fields, text = _metadata(sample, where)
    if "messages" in fields:
        row, segments = _without_segments(fields, where)
        speech = _spoken_turn(row).get("speech")
        if isinstance(speech, dict):
            speech.pop("file", None)  # of the tar: rows that are written lie beside it
    else:
        own = Voice(
            voice.speaker or (None if voice.style else _said(fields, "speaker", "spk", "speaker_id")),
            voice.style or (None if voice.speaker else _said(fields, "style", "instruct")),
            voice.language or _said(fields, "language"),
        )
        said = text or _said(fields, "text", "caption", "transcript") or ""
        given = fields.get("segments")
        segments = () if given is None else _timed(given, where)
        row = pair_row(sample.key, said, None, own, where=where)
    parse_record(row, where=where)
    if "speech" not in _spoken_turn(row):
        raise _refused(where, "speech", sample.key, "has no spoken answer", "no_recording")
    return Recording(row, sounds[0], segments)


def _metadata(sample: TarSample, where: str) -> tuple[dict[str, Any], str]:
    """What the JSON and the text of a key say."""
    try:
        parts = {suffix: sample.members[suffix].load().data for suffix in ("json", "txt") if suffix in sample.members}
        fields = parse_json(parts["json"], where) if "json" in parts else {}
        text = decode_text(parts["txt"], where).strip() if "txt" in parts else ""
    except (ForeignError, EOFError) as error:
        raise _refused(where, "json / txt", sample.key, str(error), "bad_text") from error
    if not isinstance(fields, dict):
        raise _refused(where, "json", fields, "is no JSON object", "bad_type")
    return fields, text


def _said(fields: dict[str, Any], *names: str) -> str | None:
    return next((str(fields[name]) for name in names if fields.get(name) not in (None, "")), None)


# ------------------------------------------------------------------------------------------------ pairs


def pair_row(
    key: str, text: str, file: str | None, voice: Voice, *, where: str, spoken: str | None = None
) -> dict[str, Any]:
    """The row of a text that is read aloud: asked for in the released wording where there is one."""
    if not text:
        raise _refused(where, "text", text, "is empty", "no_text")
    if (voice.speaker is None) == (voice.style is None):
        problem = "names no speaker; give --speaker NAME" if voice.speaker is None else "has both a speaker and a style"
        raise _refused(where, "speaker", voice.speaker, problem, "no_speaker")
    spoken = text if spoken is None else spoken
    language = _LANGUAGES.get(voice.language or "", voice.language) or language_of(spoken)
    named = {"style": voice.style} if voice.style is not None else {"speaker": voice.speaker, "language": language}
    speech = {**named, "text": spoken if spoken != text else None, "file": file}
    turns: list[dict[str, Any]] = []
    if ("read", language) in RELEASED:
        asked = released_request(voice=voice.speaker, style=voice.style, purpose="read", language=language)
        turns = [{"role": "user", "content": f"{text}\n{asked}"}]
    answer = {"role": "assistant", "content": text, "speech": {k: v for k, v in speech.items() if v is not None}}
    return {"id": key, "messages": [*turns, answer]}


def _refused(where: str, field: str, value: object, problem: str, reason: str) -> RecordError:
    return RecordError(where, field=field, value=value, problem=problem, fix="repair it or take it out", reason=reason)


def line_of(row: dict[str, Any]) -> str:
    """A row as a line of JSONL."""
    return json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n"
