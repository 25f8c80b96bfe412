"""Folders of recordings as people have them:

LJSpeech             metadata.csv of ``id|text|normalised text``; wavs/id.wav
F5-TTS, Coqui TTS    metadata.csv whose first line has ``audio_file|text[|speaker_name|language]``; paths are relative to it
CosyVoice, Kaldi     wav.scp (``id path``), text (``id text``), utt2spk (``id speaker``) or spk2utt (``speaker id id ..``)
LibriTTS, VCTK, ..   SPEAKER/[CHAPTER/]x.wav with x.normalized.txt or x.txt beside it
Emilia, unpacked     .. or with x.json beside it: ``text``, ``speaker``, ``language``
"""

import csv
import hashlib
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from megatron_omni.data.assemble import media_kind
from megatron_omni.data.index import Fingerprint
from megatron_omni.data.recording_rows import (
    Recording,
    Recordings,
    Voice,
    pair_row,
    recording_of_fields,
    recording_of_row,
    refused,
)
from megatron_omni.foreign import ForeignError, read_json, read_text

_TABLE_BYTES = 1 << 30
_TABLE, _PATHS = "metadata.csv", "wav.scp"
_COLUMNS = ("audio_file", "text")
"""Of F5-TTS's and Coqui's tables; LJSpeech's has no first line that names them."""
_KALDI = (_PATHS, "text", "utt2spk", "spk2utt")


def recordings_of_folder(folder: Path, voice: Voice, root: str = "") -> Recordings:
    """The recordings of a folder of one of the kinds above; ValueError for another one, and for ``root`` where no table names
    files elsewhere."""
    if (folder / _PATHS).is_file():
        return _kaldi(folder, voice, Path(root) if root else folder)
    if root:
        raise ValueError(f"--root {root}: the recordings of {str(folder)!r} lie in it; leave --root out")
    return _table(folder, voice) if (folder / _TABLE).is_file() else _tree(folder, voice)


def _lines(table: Path) -> list[tuple[int, str]]:
    """Lines with their numbers, without empty ones."""
    lines = read_text(table, most_bytes=_TABLE_BYTES).split("\n")
    return [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]


# ------------------------------------------------------------------------------------------------ tables


def _table(folder: Path, voice: Voice) -> Recordings:
    table = folder / _TABLE
    lines = _lines(table)
    if not any("|" in line for _, line in lines):
        raise ValueError(
            f"{table}: no lines of id|text|normalised text, as LJSpeech has them, or audio_file|text, as F5-TTS has them"
        )
    columns = [name.strip().lower() for name in lines[0][1].split("|")]
    named = set(_COLUMNS) <= set(columns)
    lines = lines[1:] if named else lines
    places = [f"{table}:{number}" for number, _ in lines]
    read = partial(_of_columns, columns) if named else _of_ljspeech
    return Recordings(
        folder.name, folder, str(Fingerprint.of(table)), places,
        lambda number: read(lines[number][1], folder, voice, places[number]),
    )  # fmt: skip


def _of_ljspeech(line: str, folder: Path, voice: Voice, where: str) -> Recording:
    """No quotes, so the csv module's rules do not hold."""
    key, *texts = (part.strip() for part in line.split("|"))
    if not key or not texts or not texts[0]:
        raise refused(where, "line", line, "is not id|text|normalised text", "bad_table")
    file = key if Path(key).suffix else f"{key}.wav"
    file = file if "/" in key else f"wavs/{file}"
    row = pair_row(key, texts[0], file, voice, where=where, spoken=texts[-1])
    return recording_of_row(row, where, folder)


def _of_columns(columns: Sequence[str], line: str, folder: Path, voice: Voice, where: str) -> Recording:
    """Quoted as CSV is; a text that is not, and begins with a quote, is not guessed at."""
    try:
        (cells,) = csv.reader([line], delimiter="|", strict=True)
    except csv.Error as error:
        problem = f"is no line of CSV ({error}); double the quotes in a text that begins with one"
        raise refused(where, "line", line, problem, "bad_table") from error
    if len(cells) != len(columns):
        problem = f"has {len(cells)} cells and the first line {len(columns)}; put a text that holds | into quotes"
        raise refused(where, "line", line, problem, "bad_table")
    fields = {name: cell.strip() for name, cell in zip(columns, cells)}
    file = fields["audio_file"]
    return recording_of_fields({**fields, "wav": file}, file, voice, where=where, root=folder)


# ------------------------------------------------------------------------------------------------ Kaldi's tables


def _kaldi(folder: Path, voice: Voice, root: Path) -> Recordings:
    """Paths are relative to ``root``, where the rows are written, too."""
    tables = [folder / name for name in _KALDI if (folder / name).is_file()]
    if folder / "text" not in tables:
        raise ValueError(f"{folder}: {_PATHS} without the file text (lines of id and text)")
    paths, texts = _keyed(folder / _PATHS), _keyed(folder / "text")
    speakers = _speakers(folder)
    ids = [*paths, *(key for key in texts if key not in paths)]
    places = [f"{folder / (_PATHS if key in paths else 'text')}:{(paths.get(key) or texts[key])[0][0]}" for key in ids]

    def read(number: int) -> Recording:
        key, where = ids[number], places[number]
        path, text, speaker = (
            _only(table, key, name, where) for table, name in ((paths, _PATHS), (texts, "text"), (speakers, "utt2spk"))
        )
        if path is None or path.endswith("|"):
            problem = (
                f"names no recording of {key!r}" if path is None else "is a command; write what it makes to a file"
            )
            raise refused(where, _PATHS, path, problem, "no_recording")
        own = Voice(voice.speaker or (None if voice.style else speaker), voice.style, voice.language)
        row = pair_row(key, text or "", _under(root, path), own, where=where)
        return recording_of_row(row, where, root)

    digest = hashlib.sha256("\n".join(f"{table.name} {Fingerprint.of(table)}" for table in tables).encode())
    return Recordings(folder.name, root, digest.hexdigest(), places, read)


def _keyed(table: Path) -> dict[str, list[tuple[int, str]]]:
    """(line, what follows) of each first word."""
    found: dict[str, list[tuple[int, str]]] = {}
    for number, line in _lines(table):
        key, *rest = line.split(maxsplit=1)
        found.setdefault(key, []).append((number, rest[0] if rest else ""))
    return found


def _speakers(folder: Path) -> dict[str, list[tuple[int, str]]]:
    """Of utt2spk, or of spk2utt turned round."""
    if (folder / "utt2spk").is_file() or not (folder / "spk2utt").is_file():
        return _keyed(folder / "utt2spk") if (folder / "utt2spk").is_file() else {}
    found: dict[str, list[tuple[int, str]]] = {}
    for speaker, lines in _keyed(folder / "spk2utt").items():
        for number, ids in lines:
            for key in ids.split():
                found.setdefault(key, []).append((number, speaker))
    return found


def _only(table: dict[str, list[tuple[int, str]]], key: str, name: str, where: str) -> str | None:
    """What a table says of an id, None for nothing; RecordError where it says two things."""
    lines = table.get(key, [])
    if len({said for _, said in lines}) > 1:
        numbers = ", ".join(str(number) for number, _ in lines)
        raise refused(where, name, key, f"is there {len(lines)} times (lines {numbers})", "double_name")
    return lines[0][1] or None if lines else None


def _under(root: Path, path: str) -> str:
    """An absolute path as one relative to ``root``, where it lies under it."""
    for place in (os.path.abspath(root), os.path.realpath(root)):
        if os.path.isabs(path) and Path(path).is_relative_to(place):
            return str(Path(path).relative_to(place))
    return path


# ------------------------------------------------------------------------------------------------ a text beside each


def _tree(folder: Path, voice: Voice) -> Recordings:
    """SPEAKER/[CHAPTER/]x.wav with a text beside each."""
    found = sorted(
        Path(parent, name).relative_to(folder)
        for parent, folders, names in os.walk(folder)
        for name in names
        if media_kind(Path(name).suffix[1:]) == "audio" and not name.startswith(".")
    )
    if not found:
        raise ValueError(
            f"{str(folder)!r} holds neither metadata.csv (LJSpeech, F5-TTS), wav.scp (CosyVoice) nor SPEAKER/CHAPTER/x.wav "
            "(LibriTTS)"
        )
    places = [str(folder / file) for file in found]
    names = hashlib.sha256("\n".join(map(str, found)).encode()).hexdigest()
    return Recordings(
        folder.name, folder, names, places, lambda number: _of_tree(folder, found[number], voice, places[number])
    )


def _of_tree(folder: Path, file: Path, voice: Voice, where: str) -> Recording:
    texts = [(folder / file).with_suffix(suffix) for suffix in (".normalized.txt", ".txt", ".json")]
    text = next((text for text in texts if text.is_file()), None)
    if text is None:
        problem = f"has none of {', '.join(text.name for text in texts)} beside it"
        raise refused(where, "text", file.name, problem, "no_text")
    try:
        if text.suffix == ".json":
            fields = read_json(text)
            if not isinstance(fields, dict):
                raise refused(where, "json", fields, "is no JSON object", "bad_type")
            return recording_of_fields({**fields, "wav": str(file)}, str(file), voice, where=where, root=folder)
        said = read_text(text)
    except ForeignError as error:
        raise refused(where, "text", text.name, error.problem, "bad_text") from error
    owner = file.parts[max(len(file.parts) - 3, 0)] if len(file.parts) > 1 else None
    own = Voice(voice.speaker or (None if voice.style else owner), voice.style, voice.language)
    return recording_of_row(pair_row(str(file), said, str(file), own, where=where), where, folder)
