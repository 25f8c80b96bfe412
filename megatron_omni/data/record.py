"""One JSONL row -> one validated ``Record``.

Row:  {"messages": [{"role": "user", "content": "<image>\\nWhat is this?"}, {"role": "assistant", "content": "a cat"}],
       "images": ["a.png"], "audios": [], "videos": [], "id": "optional"}

ShareGPT rows work unchanged: ``conversations`` of ``{"from": "human" | "gpt" | "system", "value"}``, an optional
``system`` text, and ``image`` / ``audio`` / ``video`` holding one path or a list.

Rules: ``<image>``, ``<audio>`` and ``<video>`` stand in system and user turns; the n-th marker of a kind takes the n-th
file of its list, and the counts must agree. In an answer they are ordinary characters (code with an HTML tag in it),
because a model that reads media answers with text. A system turn comes first or not at all. Other keys of the row are
kept in ``extra`` and have no effect on training.

Every violation is a ``RecordError`` naming file, line, field, value and fix; ``reason`` is its name in the counters.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_omni.data.decode.media import MediaBytes, MediaError
from megatron_omni.data.tar import TarMember

MediaFile = str | TarMember
"""A path, or a file inside a tar."""
Kind = Literal["image", "audio", "video"]
KINDS: tuple[Kind, ...] = ("image", "audio", "video")
MARKER = re.compile(r"<(image|audio|video)>")
ROLES = ("system", "user", "assistant")
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
LIST_FIELD: dict[Kind, str] = {"image": "images", "audio": "audios", "video": "videos"}
_KNOWN_KEYS = {"messages", "conversations", "system", "id", *KINDS, *LIST_FIELD.values()}
_SHOWN_CHARACTERS = 80


class RecordError(ValueError):
    """A row that cannot be used; the message names where, which field, what it holds and what to do."""

    def __init__(self, where: str, *, field: str, value: object, problem: str, fix: str, reason: str) -> None:
        shown = repr(value)
        if len(shown) > _SHOWN_CHARACTERS:
            shown = shown[:_SHOWN_CHARACTERS] + "..."
        super().__init__(
            f"{where}: {field} = {shown}: {problem}; {fix}" if where else f"{field} = {shown}: {problem}; {fix}"
        )
        self.where, self.field, self.value, self.reason = where, field, value, reason


def loaded(file: MediaFile) -> str | MediaBytes:
    """What the decoders take: the path, or the bytes inside a tar; MediaError for a tar that cannot be read."""
    if isinstance(file, str):
        return file
    try:
        return file.load()
    except (OSError, EOFError) as error:
        raise MediaError(str(file), error) from error


@dataclass(frozen=True)
class Message:
    """One turn."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True)
class Record:
    """A conversation with its media files, in marker order per kind."""

    messages: tuple[Message, ...]
    images: tuple[MediaFile, ...] = ()
    audios: tuple[MediaFile, ...] = ()
    videos: tuple[MediaFile, ...] = ()
    id: str = ""
    source: str = ""
    """Name of the source in the recipe."""
    where: str = "<record>"
    """File and line, for messages to people."""
    extra: Mapping[str, Any] = field(default_factory=dict)

    def media(self, kind: Kind) -> tuple[MediaFile, ...]:
        """The files of one kind."""
        return {"image": self.images, "audio": self.audios, "video": self.videos}[kind]

    @property
    def answer(self) -> str:
        """Content of the final assistant turn, empty when the record ends with a question."""
        return self.messages[-1].content if self.messages[-1].role == "assistant" else ""


def parse_record(row: object, *, where: str = "<record>", source: str = "") -> Record:
    """Validate a decoded JSON row. Media paths are taken as they are: sources.py confines them to the source's root."""
    if not isinstance(row, dict):
        raise RecordError(
            where,
            field="row",
            value=row,
            problem="is not a JSON object",
            fix='write {"messages": [...]}',
            reason="bad_type",
        )
    messages = _messages(row, where)
    media = {kind: _media_list(row, kind, where) for kind in KINDS}
    _check_markers(messages, media, where)
    row_id = row.get("id", "")
    if not isinstance(row_id, str | int):
        raise RecordError(
            where, field="id", value=row_id, problem="is no text or number", fix="drop it", reason="bad_type"
        )
    return Record(
        messages=messages,
        images=media["image"],
        audios=media["audio"],
        videos=media["video"],
        id=str(row_id),
        source=source,
        where=where,
        extra={key: value for key, value in row.items() if key not in _KNOWN_KEYS},
    )


def _messages(row: dict[str, Any], where: str) -> tuple[Message, ...]:
    if ("messages" in row) == ("conversations" in row):
        problem = "both are given" if "messages" in row else "neither is given"
        raise RecordError(
            where,
            field="messages / conversations",
            value=sorted(row),
            problem=problem,
            fix="give one",
            reason="no_messages",
        )
    name = "messages" if "messages" in row else "conversations"
    role_key, text_key = ("role", "content") if name == "messages" else ("from", "value")
    turns = row[name]
    if not isinstance(turns, list) or not turns:
        raise RecordError(
            where,
            field=name,
            value=turns,
            problem="is no list of turns",
            fix="give at least one turn",
            reason="bad_type",
        )
    messages = [_message(turn, f"{name}[{i}]", role_key, text_key, where) for i, turn in enumerate(turns)]
    if "system" in row and row["system"] != "":
        if not isinstance(row["system"], str):
            raise RecordError(
                where,
                field="system",
                value=row["system"],
                problem="is no text",
                fix="write a string",
                reason="bad_type",
            )
        messages.insert(0, Message("system", row["system"]))
    for i, message in enumerate(messages):
        if message.role == "system" and i > 0:
            raise RecordError(
                where, field=name, value=[m.role for m in messages], problem="a system turn is not the first turn",
                fix="keep one system turn and put it first", reason="bad_roles",
            )  # fmt: skip
    if all(message.role == "system" for message in messages):
        raise RecordError(
            where,
            field=name,
            value=[m.role for m in messages],
            problem="has no user turn",
            fix="add one",
            reason="bad_roles",
        )
    return tuple(messages)


def _message(turn: object, field_name: str, role_key: str, text_key: str, where: str) -> Message:
    if not isinstance(turn, dict):
        raise RecordError(
            where, field=field_name, value=turn, problem="is no object",
            fix=f'write {{"{role_key}": ..., "{text_key}": ...}}', reason="bad_type",
        )  # fmt: skip
    role, content = turn.get(role_key), turn.get(text_key)
    known = _SHAREGPT_ROLES if role_key == "from" else {role: role for role in ROLES}
    if not isinstance(role, str) or role not in known:
        raise RecordError(
            where, field=f"{field_name}.{role_key}", value=role, problem="is an unknown role",
            fix=f"use one of {', '.join(known)}", reason="unknown_role",
        )  # fmt: skip
    if not isinstance(content, str):
        raise RecordError(
            where, field=f"{field_name}.{text_key}", value=content, problem="is no text", fix="write a string",
            reason="bad_type",
        )  # fmt: skip
    if not _encodable(content):
        raise RecordError(
            where, field=f"{field_name}.{text_key}", value=content, problem="holds half of a surrogate pair",
            fix="write valid Unicode", reason="bad_text",
        )  # fmt: skip
    if known[role] == "assistant" and not content.strip():
        raise RecordError(
            where, field=f"{field_name}.{text_key}", value=content, problem="is an empty answer",
            fix="drop the turn or write the answer", reason="empty_answer",
        )  # fmt: skip
    return Message(known[role], content)


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _media_list(row: dict[str, Any], kind: Kind, where: str) -> tuple[str, ...]:
    plural = LIST_FIELD[kind]
    if kind in row and plural in row:
        raise RecordError(
            where,
            field=f"{kind} / {plural}",
            value=row[kind],
            problem="both are given",
            fix="give one",
            reason="bad_type",
        )
    name = kind if kind in row else plural
    value = row.get(name)
    if value is None:
        return ()
    if name == kind and isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(item, str) and item and _encodable(item) for item in value):
        raise RecordError(
            where,
            field=name,
            value=value,
            problem="is no list of file names",
            fix='write ["file", ...]',
            reason="bad_type",
        )
    return tuple(value)


def _check_markers(messages: tuple[Message, ...], media: dict[Kind, tuple[str, ...]], where: str) -> None:
    for kind in KINDS:
        marker = f"<{kind}>"
        count = sum(m.content.count(marker) for m in messages if m.role != "assistant")
        if count != len(media[kind]):
            in_answers = sum(m.content.count(marker) for m in messages if m.role == "assistant")
            note = f" (the {in_answers} in answers do not count)" if in_answers else ""
            raise RecordError(
                where, field=LIST_FIELD[kind], value=list(media[kind]),
                problem=f"{len(media[kind])} file(s) for {count} {marker} marker(s) in system and user turns{note}",
                fix=f"write one {marker} for each file", reason="marker_count",
            )  # fmt: skip
