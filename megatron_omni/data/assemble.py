"""A row from loose parts: media files of one key with a caption or metadata, as folders and WebDataset tars hold them.

    0007.png + 0007.txt                     the text is the answer to ``prompt``
    0007.txt alone                          is refused: nobody learns a caption of nothing
    0007.png + 0007.json {"caption": ...}   so is its caption, text or answer; "question" or "prompt" asks instead
    0007.png + 0007.json {"messages": ...}  a record (record.py); without "images" it takes the files of its key that are not
                                            among its "targets"

Files that a record names are looked up among the files of its key, by whole name, base name or suffix. Where Energon's
``dataset.yaml`` has a ``field_map``, the map says which parts are picture, question and answer.
"""

import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from megatron_omni.data.record import KINDS, LIST_FIELD, Kind, RecordError
from megatron_omni.foreign import read_text

SUFFIXES: dict[Kind, tuple[str, ...]] = {
    "image": ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "avif", "jp2"),
    "audio": ("wav", "flac", "ogg", "opus", "mp3", "m4a", "aac"),
    "video": ("mp4", "webm", "mkv", "mov", "avi", "mpg", "mpeg", "m4v"),
}
_KIND_OF = {suffix: kind for kind, suffixes in SUFFIXES.items() for suffix in suffixes}
PROMPTS: dict[Kind, str] = {
    "image": "Describe the picture.", "audio": "Describe the sound.", "video": "Describe the video.",
}  # fmt: skip
"""Asked of media that come with a caption alone, unless the source has a ``prompt``."""
_ANSWERS, _QUESTIONS = ("caption", "text", "answer", "answers"), ("question", "prompt", "context")
_FIELD = re.compile(r"([\w.]+)((?:\[[^\[\]]+\])*)")

Metadata = Mapping[str, Any]


def media_kind(suffix: str) -> Kind | None:
    """Kind of a file by the last part of its suffix, None for a file that is no medium."""
    return _KIND_OF.get(suffix.rpartition(".")[2].lower())


def assemble(
    key: str, files: Mapping[str, str], *, where: str, text: str | None, metadata: object, prompt: str = ""
) -> dict[str, Any]:
    """The row of one key. ``files``: name by suffix of its media, in order; ``metadata``: what its JSON holds, or None.

    RecordError when the parts make no record.
    """
    media: dict[Kind, list[str]] = {kind: [] for kind in KINDS}
    for suffix, name in files.items():
        if (kind := media_kind(suffix)) is not None:
            media[kind].append(name)
    if metadata is not None and not isinstance(metadata, dict):
        raise RecordError(
            where, field="json", value=metadata, problem="is no JSON object", fix="write {...}", reason="bad_type"
        )
    fields: Metadata = metadata or {}
    fields = {name: value for name, value in fields.items() if value not in (None, "")}
    if "messages" in fields or "conversations" in fields:
        return _with_media(fields, key, media, files, where)
    answer = next((fields[name] for name in _ANSWERS if name in fields), text)
    question = next((fields[name] for name in _QUESTIONS if name in fields), None)
    return question_and_answer(key, media, question, answer, where=where, prompt=prompt)


def question_and_answer(
    key: str, media: Mapping[Kind, list[str]], question: object, answer: object, *, where: str, prompt: str = ""
) -> dict[str, Any]:
    """One turn about all the media of a key, each kind's markers first; RecordError without any (``no_media``)."""
    if not any(media.values()):
        raise RecordError(
            where, field="media", value=key, problem="a caption or metadata without the medium that it is about",
            fix="put the medium beside it (in a tar the members of a sample must be neighbours: tar --sort=name), or write "
            "messages", reason="no_media",
        )  # fmt: skip
    if isinstance(answer, list) and answer:
        answer = answer[0]
    for name, value in (("answer", answer), ("question", question)):
        if not isinstance(value, str) and not (name == "question" and value is None):
            raise RecordError(
                where, field=name, value=value, problem=f"{key!r} comes with no {name} in words",
                fix="add a .txt with the caption or a .json with caption, or messages", reason="no_text",
            )  # fmt: skip
    if question is None:
        question = prompt or PROMPTS[[kind for kind in KINDS if media[kind]][-1]]
    markers = "".join(f"<{kind}>" for kind in KINDS for _ in media[kind])
    turns = [
        {"role": "user", "content": f"{markers}\n{question}"},
        {"role": "assistant", "content": str(answer).strip()},
    ]
    return {"id": key, "messages": turns, **{LIST_FIELD[kind]: media[kind] for kind in KINDS if media[kind]}}


def _with_media(
    row: dict[str, Any], key: str, media: Mapping[Kind, list[str]], files: Mapping[str, str], where: str
) -> dict[str, Any]:
    """A whole record, its media looked up among the files of the key."""
    names = names_of(files)
    heard = {named(names, name) for name in _spoken_files(row)}
    drawn = next((field for field in ("targets", "image_gen") if row.get(field) is not None), "")
    fields = [kind if kind in row else LIST_FIELD[kind] for kind in KINDS]
    for field in (drawn, *fields) if drawn else fields:
        listed = row.get(field)
        if listed is None:
            taken = row[drawn] if drawn and isinstance(row[drawn], list) else ()
            # What a row draws is not shown to it as well.
            kind = KINDS[fields.index(field)]
            rest = [name for name in media[kind] if name not in taken and name not in heard]
            if rest and not (drawn and row.get("degrade")):
                row[LIST_FIELD[kind]] = rest
            continue
        listed = [listed] if isinstance(listed, str) else listed
        if not isinstance(listed, list):
            continue  # parse_record says what is wrong with it
        for name in listed:
            if named(names, name) is None:
                raise RecordError(
                    where, field=field, value=name, problem=f"names no file of {key!r} (it has {', '.join(files)})",
                    fix="name a member by its suffix", reason="missing_media",
                )  # fmt: skip
        row[field] = [named(names, name) for name in listed]
    return {"id": key, **row}


def names_of(files: Mapping[str, str]) -> dict[str, str]:
    """The files of a key, name by suffix, by everything that a record may call them."""
    names: dict[str, str] = {}
    for suffix, name in files.items():
        names |= {suffix: name, PurePosixPath(name).name: name, name: name}
    return names


def named(names: Mapping[str, str], name: object) -> str | None:
    """The file that a record means: by one of :func:`names_of`, or by its base name."""
    return names.get(name) or names.get(PurePosixPath(name).name) if isinstance(name, str) else None


def _spoken_files(row: Mapping[str, Any]) -> list[object]:
    """Recordings of answers: nobody is shown these."""
    turns = row.get("messages", row.get("conversations"))
    said = [turn.get("speech") for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
    return [speech.get("file") for speech in said if isinstance(speech, dict)]


# ------------------------------------------------------------------------------------------------ Energon


def field_map(tar: Path) -> dict[str, str]:
    """``field_map`` of the Energon dataset that a tar belongs to; empty when it has none."""
    for folder in list(tar.parents)[:3]:
        file = folder / ".nv-meta" / "dataset.yaml"
        if file.is_file():
            try:
                content = yaml.safe_load(read_text(file))
            except (ValueError, RecursionError, yaml.YAMLError) as error:
                raise ValueError(f"{str(file)!r} is no YAML file ({error})") from error
            found = content.get("field_map") if isinstance(content, dict) else None
            return {str(name): str(part) for name, part in found.items()} if isinstance(found, dict) else {}
    return {}


def assemble_mapped(
    key: str,
    fields: Mapping[str, str],
    files: Mapping[str, str],
    parts: Mapping[str, object],
    *,
    where: str,
    prompt: str,
) -> dict[str, Any]:
    """The row of one key by a field map, whose values may name several parts (``jpg,png``): the first that is there counts.

    ``parts``: decoded text and JSON by suffix.
    """
    media: dict[Kind, list[str]] = {kind: [] for kind in KINDS}
    words: dict[str, object] = {}
    for name, options in fields.items():
        part = next((part for part in options.lower().split(",") if part in files), "")
        if (kind := media_kind(part)) is not None:
            media[kind].append(files[part])
        elif not name.startswith("__"):
            found = (_looked_up(option, parts) for option in options.split(","))
            words[name] = next((value for value in found if value is not None), None)
    answer = next((words[name] for name in _ANSWERS if words.get(name) is not None), None)
    question = next((words[name] for name in _QUESTIONS if words.get(name) is not None), None)
    return question_and_answer(key, media, question, answer, where=where, prompt=prompt)


def _looked_up(expression: str, parts: Mapping[str, object]) -> object:
    """``json[caption][0]``: the part, then keys or places in it; None where one is missing."""
    match = _FIELD.fullmatch(expression)
    if match is None or match[1] not in parts:
        return None
    value = parts[match[1]]
    for step in re.findall(r"\[([^\[\]]+)\]", match[2]):
        if isinstance(value, dict) and step in value:
            value = value[step]
        elif isinstance(value, list) and step.isdigit() and int(step) < len(value):
            value = value[int(step)]
        else:
            return None
    return value
