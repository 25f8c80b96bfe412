"""Recordings with their texts, of which codes are made: rows, folders and tars as people have them.

    x.jsonl              rows (record.py) whose last spoken answer names a ``file``; ``segments`` of its ``speech`` cut it; or
                         Emilia's, with ``wav``, ``text``, ``speaker``, ``language``
    folders              LJSpeech, F5-TTS, CosyVoice, LibriTTS and others (recording_folders.py)
    x.tar                WebDataset: a sound of each key with .txt, or .json with ``text`` and ``speaker`` (Emilia) or a whole row,
                         whose ``speech.file`` names the sound where the key has several; or a tar of LibriTTS's folders

    "speech": {"speaker": "Jenny", "file": "talk.flac", "segments": [{"text": "Good evening.", "start": 0.4, "end": 1.9}, ..]}

Segments are sentences or words with their times in seconds; the pieces of speech_pieces.py end where a segment ends. Nothing is
aligned here: a long recording without times is a sample as a whole, or too long.
"""

from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from megatron_omni.data.assemble import media_kind, named, names_of
from megatron_omni.data.index import Fingerprint
from megatron_omni.data.record import KINDS, LIST_FIELD, parse_record
from megatron_omni.data.recording_folders import recordings_of_folder
from megatron_omni.data.recording_rows import (
    Recording,
    Recordings,
    Voice,
    recordings_of_rows,
    refused,
    row_of_fields,
    spoken_turn,
    without_segments,
)
from megatron_omni.data.tar import TarMember, TarSample, tar_samples
from megatron_omni.foreign import ForeignError, decode_text, parse_json

_TEXTS = ("normalized.txt", "txt")
"""Parts of a key with its text, the better one first: LibriTTS has both."""
_MEDIA_FIELDS = tuple(field for kind in KINDS for field in (kind, LIST_FIELD[kind]))


def recordings_of(path: Path, voice: Voice, *, root: str = "") -> Recordings:
    """The recordings of a file or folder; ValueError for what is none of the kinds above.

    Names of files in rows and in CosyVoice's tables are relative to ``root``, by default the folder that they lie in.
    """
    if path.is_dir():
        return recordings_of_folder(path, voice, root)
    if path.suffix == ".tar":
        return _tar(path, voice)
    return recordings_of_rows(path, Path(root) if root else path.parent, voice)


def _tar(path: Path, voice: Voice) -> Recordings:
    samples = _gathered(tar_samples(path))
    places = [f"{path}:{sample.key}" for sample in samples]
    return Recordings(
        path.stem, path.parent, str(Fingerprint.of(path)), places,
        lambda number: _recording_of_sample(samples[number], places[number], voice),
    )  # fmt: skip


def _gathered(samples: Iterable[TarSample]) -> list[TarSample]:
    """Samples with the members of a key together: a tar of folders has them in the order in which the disk had them. What is
    neither sound, text nor JSON (tables of a corpus) is no sample."""
    found: list[TarSample] = []
    last: dict[str, TarSample] = {}
    for sample in samples:
        before = last.get(sample.key)
        if before is None or before.problem or sample.problem or before.members.keys() & sample.members.keys():
            last[sample.key] = sample
            found.append(sample)
        else:
            before.members |= sample.members
    return [sample for sample in found if sample.problem or any(map(_means_something, sample.members))]


def _means_something(suffix: str) -> bool:
    return media_kind(suffix) is not None or suffix in (*_TEXTS, "json")


def _recording_of_sample(sample: TarSample, where: str, voice: Voice) -> Recording:
    if sample.problem:
        raise refused(where, "member", sample.key, sample.problem, "damaged_tar")
    fields, text = _metadata(sample, where)
    if "messages" in fields:
        row, segments = without_segments(fields, where)
        speech = spoken_turn(row).get("speech")
        # Rows that are written lie beside the tar, and cannot name what is in it.
        file = speech.pop("file", None) if isinstance(speech, dict) else None
        sound = _sound(sample, file, where)
        shown = sum(media_kind(suffix) is not None for suffix in sample.members) > 1
        if shown or any(row.get(field) for field in _MEDIA_FIELDS):
            row = _answer_alone(row)
    else:
        sound = _sound(sample, None, where)
        own = _of_its_folder(sample, voice) if "normalized.txt" in sample.members else voice
        row, segments = row_of_fields(fields, sample.key, None, own, where=where, text=text)
    parse_record(row, where=where)
    if "speech" not in spoken_turn(row):
        raise refused(where, "speech", sample.key, "has no spoken answer", "no_recording")
    return Recording(row, sound, segments)


def _sound(sample: TarSample, file: object, where: str) -> TarMember:
    """The sound of the answer: the member that ``speech.file`` names, else the only one."""
    sounds = {suffix: member for suffix, member in sample.members.items() if media_kind(suffix) == "audio"}
    name = named(names_of({suffix: member.name for suffix, member in sounds.items()}), file)
    chosen = [member for member in sounds.values() if name in (None, member.name)]
    if len(chosen) == 1:  # the only one, under whatever name it had before it was put into the tar
        return chosen[0]
    if file is None:
        raise refused(where, "members", list(sample.members), f"{len(sounds)} sounds of one key", "no_recording")
    problem = f"names none of {', '.join(sounds) or 'no sounds'}"
    raise refused(where, "speech.file", file, problem, "no_recording")


def _answer_alone(row: dict[str, Any]) -> dict[str, Any]:
    """Without the turns before it: a row beside the tar cannot show what lies in it."""
    rest = {key: value for key, value in row.items() if key not in _MEDIA_FIELDS}
    return {**rest, "messages": [spoken_turn(row)]}


def _of_its_folder(sample: TarSample, voice: Voice) -> Voice:
    """LibriTTS: SPEAKER/CHAPTER/x."""
    parts = PurePosixPath(sample.key).parts
    owner = parts[-3] if len(parts) > 2 and not voice.style else None
    return Voice(voice.speaker or owner, voice.style, voice.language)


def _metadata(sample: TarSample, where: str) -> tuple[dict[str, Any], str]:
    """What the JSON and the text of a key say."""
    texts = [name for name in _TEXTS if name in sample.members][:1]
    try:
        parts = {suffix: sample.members[suffix].load().data for suffix in ("json", *texts) if suffix in sample.members}
        fields = parse_json(parts["json"], where) if "json" in parts else {}
        text = decode_text(parts[texts[0]], where).strip() if texts else ""
    except (ForeignError, EOFError) as error:
        raise refused(where, "json / txt", sample.key, str(error), "bad_text") from error
    if not isinstance(fields, dict):
        raise refused(where, "json", fields, "is no JSON object", "bad_type")
    return fields, text
