"""One JSONL row -> one validated ``Record``.

Row:  {"messages": [{"role": "user", "content": "<image>\\nWhat is this?"}, {"role": "assistant", "content": "a cat"}],
       "images": ["a.png"], "audios": [], "videos": [], "id": "optional"}

ShareGPT rows work unchanged: ``conversations`` of ``{"from": "human" | "gpt" | "system", "value"}``, an optional
``system`` text, and ``image`` / ``audio`` / ``video`` holding one path or a list.

Rules: ``<image>``, ``<audio>`` and ``<video>`` stand in system and user turns; the n-th marker of a kind takes the n-th
file of its list, and the counts must agree. In an answer they are ordinary characters (code with an HTML tag in it),
because a model that reads media answers with text; in a row with ``targets`` answers draw (drawing.py). A system turn
comes first or not at all. An answer that carries ``"weight": 0``, ``"train": false`` or ``"loss": false`` is read and not
learned; one with ``speech`` is spoken (spoken.py). A
row of a preference names the answer that was rejected: ``rejected_response``, in place of the final answer, or
``rejected_messages``, a conversation of its own, with ``rejected_images`` .. where its media differ (data/pairs.py); other
tasks read past it. A key whose value is null is not there (tables write null where a row lacks a column). Keys that mean
something to other programs and cannot be honoured (``REFUSED_KEYS``) are an error; the rest are kept in ``extra`` and have
no effect on training.

Every violation is a ``RecordError`` naming file, line, field, value and fix; ``reason`` is its name in the counters.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from megatron_omni.data import drawing
from megatron_omni.data.decode.media import MediaBytes, MediaError
from megatron_omni.data.drawing import DRAWN, Drawing
from megatron_omni.data.errors import URL, encodable
from megatron_omni.data.errors import RecordError as RecordError
from megatron_omni.data.errors import internal_error as internal_error
from megatron_omni.data.spoken import Speech, read_speech
from megatron_omni.data.tar import TarMember
from megatron_omni.foreign import is_exhausted

MediaFile = str | TarMember | MediaBytes
"""A path, a file inside a tar, or one that is in memory."""
Kind = Literal["image", "audio", "video"]
Part = str | tuple[Kind, MediaFile]
"""Of a turn that is written in parts: text, or a medium."""
KINDS: tuple[Kind, ...] = ("image", "audio", "video")
MARKER = re.compile(r"<(image|audio|video)>")
ROLES = ("system", "user", "assistant")
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
LIST_FIELD: dict[Kind, str] = {"image": "images", "audio": "audios", "video": "videos"}
REJECTED_RESPONSE, REJECTED_MESSAGES = "rejected_response", "rejected_messages"
REJECTED = "rejected_"
"""Begins the name of a field of media of ``rejected_messages``."""
_KNOWN_KEYS = {
    "messages", "conversations", "system", "id", *KINDS, *LIST_FIELD.values(), REJECTED_RESPONSE, REJECTED_MESSAGES,
    *(REJECTED + name for name in LIST_FIELD.values()), "targets", "image_gen",
}  # fmt: skip
TOOL_ROLES = ("tool", "function", "function_call", "observation", "ipython", "tool_call", "tool_response")
LEARN_MARKS = ("weight", "train", "loss")
"""Keys of a turn that say whether it is learned: 1 or true, 0 or false."""
_NO_TOOLS = "leave such records out, or write what was called and said into user and assistant turns"
REFUSED_KEYS = {
    "tools": ("tool_turn", _NO_TOOLS), "functions": ("tool_turn", _NO_TOOLS), "tool_calls": ("tool_turn", _NO_TOOLS),
    "function_call": ("tool_turn", _NO_TOOLS), "tool_call_id": ("tool_turn", _NO_TOOLS),
    "reasoning_content": ("unsupported_key", "write the reasoning into the answer's text, or take it out"),
    "loss_scale": ("unsupported_key", "mark whole turns with weight 0 or 1"),
    "train_detail": ("unsupported_key", "mark whole turns with weight 0 or 1"),
}  # fmt: skip
"""Keys of a row or turn that change what other programs train on: (reason, fix). An empty value is no use of them."""


def loaded(file: MediaFile) -> str | MediaBytes:
    """What the decoders take: the path, or the bytes; MediaError for a tar that cannot be read."""
    if isinstance(file, str | MediaBytes):
        return file
    try:
        return file.load()
    except (OSError, EOFError) as error:
        if is_exhausted(error):
            raise
        raise MediaError(str(file), error) from error


@dataclass(frozen=True)
class Message:
    """One turn."""

    role: str
    content: str
    learned: bool = True
    """Of an answer: whether it is a target."""
    parts: tuple[str, ...] | None = None
    """text, kind of medium, text, kind, ..., text of a turn that was not written with markers: what looks like one in
    its text is ordinary characters, as in every answer. Of an answer that draws: text, DRAWN, text, ..."""
    speech: Speech | None = None
    """Of an answer that is spoken."""

    def pieces(self) -> list[str]:
        """text, kind of medium, text, kind, ..., text."""
        if self.parts is not None:
            return list(self.parts)
        return [self.content] if self.role == "assistant" else MARKER.split(self.content)

    def media(self) -> list[Kind]:
        """Kinds of the media that it shows, in their order."""
        return [kind for kind in self.pieces()[1::2] if kind != DRAWN]  # type: ignore[misc]

    @property
    def num_drawn(self) -> int:
        """Pictures that it draws."""
        return 0 if self.parts is None else self.parts[1::2].count(DRAWN)


@dataclass(frozen=True, kw_only=True)
class Record:
    """A conversation with its media files, in marker order per kind."""

    messages: tuple[Message, ...]
    images: tuple[MediaFile, ...] = ()
    audios: tuple[MediaFile, ...] = ()
    videos: tuple[MediaFile, ...] = ()
    targets: tuple[MediaFile, ...] = ()
    """Pictures that its answers draw, in their order."""
    drawing: Drawing | None = None
    """What is known of them; None where there are none."""
    id: str = ""
    source: str = ""
    """Name of the source in the recipe."""
    where: str = "<record>"
    """File and line, for messages to people."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    rejected: "Record | None" = None
    """The conversation whose answer was rejected in favour of this one's; of a kind that it has no media of, it takes
    this record's."""

    def media(self, kind: Kind) -> tuple[MediaFile, ...]:
        """The files of one kind."""
        return {"image": self.images, "audio": self.audios, "video": self.videos}[kind]

    @property
    def has_answer(self) -> bool:
        """Whether there is a turn to learn."""
        return any(message.role == "assistant" and message.learned for message in self.messages)

    @property
    def picture_sources(self) -> tuple[int | None, ...]:
        """Of each picture that answers draw the number of its source among ``images``, the last one of the turn before; None
        where it has none or its task is to take none."""
        if self.drawing is not None and self.drawing.task == drawing.TEXT_TO_IMAGE:
            return (None,) * sum(message.num_drawn for message in self.messages)
        found: list[int | None] = []
        seen, last = 0, None
        for message in self.messages:
            if message.role == "user":
                here = message.media().count("image")
                seen, last = seen + here, seen + here - 1 if here else None
            elif message.role == "system":
                seen += message.media().count("image")
            found += [last] * message.num_drawn
        return tuple(found)

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
    row = _present(row, "row", where)
    messages = _messages(row, where)
    targets, said = drawing.target_files(row, where), None
    if targets:
        messages = _drawing_answers(messages, targets, where)
        said = drawing.read_drawing(row, num_targets=len(targets), where=where)
        if said.damage is not None and not any(row.get(name) for name in ("image", "images")):
            row = {**row, "images": list(targets)}
    media = {kind: _media_list(row, kind, where) for kind in KINDS}
    _check_markers(messages, media, where)
    rejected = _rejected(row, messages, where)
    row_id = row.get("id", "")
    if not isinstance(row_id, str | int | float):
        raise RecordError(
            where, field="id", value=row_id, problem="is no text or number", fix="drop it", reason="bad_type"
        )
    known = _KNOWN_KEYS | set(drawing.KEYS) if targets else _KNOWN_KEYS
    record = Record(
        messages=messages,
        images=media["image"],
        audios=media["audio"],
        videos=media["video"],
        targets=targets,
        drawing=said,
        id=str(row_id),
        source=source,
        where=where,
        extra={key: value for key, value in row.items() if key not in known},
        rejected=rejected,
    )
    if said is not None:
        drawing.check_sources(said, record.picture_sources, where=where)
    return record


def _drawing_answers(messages: tuple[Message, ...], targets: tuple[str, ...], where: str) -> tuple[Message, ...]:
    """The turns of a row that draws ``targets``; RecordError unless its answers hold as many marks."""
    found: list[Message] = []
    for i, message in enumerate(messages):
        field = f"messages[{i}]"
        pieces = drawing.drawn_pieces(message.content, field=field, where=where) if message.role == "assistant" else ()
        if len(pieces) > 1:
            if message.speech is not None:
                raise RecordError(
                    where, field=f"{field}.speech", value=message.speech.spoken, problem="is of an answer that draws",
                    fix="give the two a turn each", reason="bad_drawing",
                )  # fmt: skip
            message = replace(message, content=drawing.shown(pieces), parts=pieces)
        found.append(message)
    count = sum(message.num_drawn for message in found)
    if count != len(targets):
        raise RecordError(
            where, field="targets", value=list(targets),
            problem=f"{len(targets)} file(s) for {count} {drawing.GENERATE} in assistant turns",
            fix=f"write one {drawing.GENERATE} for each file", reason="marker_count",
        )  # fmt: skip
    return tuple(found)


def _rejected(row: dict[str, Any], messages: tuple[Message, ...], where: str) -> Record | None:
    """The rejected side of a row that has one."""
    own: dict[Kind, tuple[str, ...]] = {
        kind: _media_list({LIST_FIELD[kind]: row.get(REJECTED + LIST_FIELD[kind])}, kind, where) for kind in KINDS
    }
    if REJECTED_RESPONSE in row and (REJECTED_MESSAGES in row or any(own.values())):
        raise RecordError(
            where, field=REJECTED_RESPONSE, value=row[REJECTED_RESPONSE],
            problem=f"stands beside {REJECTED_MESSAGES} or media of them", fix="give one of the two", reason="bad_pair",
        )  # fmt: skip
    if REJECTED_RESPONSE in row:
        if messages[-1].role != "assistant":
            raise RecordError(
                where, field=REJECTED_RESPONSE, value=row[REJECTED_RESPONSE], problem="is preferred to no answer",
                fix="end messages with the chosen answer", reason="bad_pair",
            )  # fmt: skip
        answer = _message(
            {"role": "assistant", "content": row[REJECTED_RESPONSE]}, REJECTED_RESPONSE, "role", "content", where
        )
        return Record(messages=(*messages[:-1], answer), where=where)
    if REJECTED_MESSAGES not in row:
        return None
    turns = _messages({"messages": row[REJECTED_MESSAGES]}, where)
    if turns[0].role != "system" and messages[0].role == "system":
        turns = (messages[0], *turns)
    for kind in KINDS:
        if own[kind]:
            _check_markers(turns, {kind: own[kind]}, where, of=REJECTED)
    images, audios, videos = (own[kind] for kind in KINDS)
    return Record(messages=turns, images=images, audios=audios, videos=videos, where=where)


def record_of_parts(turns: Sequence[tuple[str, Sequence[Part]]], *, where: str, separator: str = "") -> Record:
    """The record of turns (role, parts): text and media in their order. Neighbouring texts are joined as they are.

    ``separator`` stands between a medium and a text that has no white space of its own there: people who attach a file
    do not write any, and models were trained on records with some.
    """
    messages: list[Message] = []
    files: dict[Kind, list[MediaFile]] = {kind: [] for kind in KINDS}
    for role, parts in turns:
        pieces = [""]
        for part in parts:
            if isinstance(part, str):
                pieces[-1] += part
            else:
                kind, file = part
                files[kind].append(file)
                pieces += [kind, ""]
        pieces = _separated(pieces, separator)
        shown = "".join(f"<{piece}>" if i % 2 else piece for i, piece in enumerate(pieces))
        messages.append(Message(role, shown, parts=tuple(pieces)))
    _check_roles(messages, "messages", where)
    images, audios, videos = (tuple(files[kind]) for kind in KINDS)
    return Record(messages=tuple(messages), images=images, audios=audios, videos=videos, where=where)


def _separated(pieces: Sequence[str], separator: str) -> list[str]:
    """``pieces`` of a turn (text, kind of medium, text, ...) with ``separator`` where a text touches a medium."""
    out = list(pieces)
    for i in range(0, len(out), 2):
        text = out[i]
        if text and i and not text[0].isspace():
            out[i] = separator + out[i]
        if text and i + 1 < len(out) and not text[-1].isspace():
            out[i] += separator
    return out


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
        messages.insert(0, Message("system", _content(row["system"], "system", where)))
    _check_roles(messages, name, where)
    return tuple(messages)


def _check_roles(messages: Sequence[Message], name: str, where: str) -> None:
    """RecordError unless a system turn comes first or not at all, and another turn is there."""
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


def _message(turn: object, field_name: str, role_key: str, text_key: str, where: str) -> Message:
    if not isinstance(turn, dict):
        raise RecordError(
            where, field=field_name, value=turn, problem="is no object",
            fix=f'write {{"{role_key}": ..., "{text_key}": ...}}', reason="bad_type",
        )  # fmt: skip
    turn = _present(turn, field_name, where)
    role = turn.get(role_key)
    if role in TOOL_ROLES:
        raise RecordError(
            where, field=f"{field_name}.{role_key}", value=role, problem="turns of tools are not supported",
            fix=_NO_TOOLS, reason="tool_turn",
        )  # fmt: skip
    known = _SHAREGPT_ROLES if role_key == "from" else {role: role for role in ROLES}
    if not isinstance(role, str) or role not in known:
        raise RecordError(
            where, field=f"{field_name}.{role_key}", value=role, problem="is an unknown role",
            fix=f"use one of {', '.join(known)}", reason="unknown_role",
        )  # fmt: skip
    content = _content(turn.get(text_key), f"{field_name}.{text_key}", where)
    if known[role] == "assistant" and not content.strip():
        raise RecordError(
            where, field=f"{field_name}.{text_key}", value=content, problem="is an empty answer",
            fix="drop the turn or write the answer", reason="empty_answer",
        )  # fmt: skip
    speech = None
    if "speech" in turn:
        if known[role] != "assistant":
            raise RecordError(
                where, field=f"{field_name}.speech", value=turn["speech"], problem="stands in a turn that is no answer",
                fix="give spoken questions as <audio>", reason="bad_speech",
            )  # fmt: skip
        speech = read_speech(turn["speech"], content=content, field=f"{field_name}.speech", where=where)
    return Message(known[role], content, learned=_learned(turn, known[role], field_name, where), speech=speech)


def _present(given: dict[str, Any], field_name: str, where: str) -> dict[str, Any]:
    """The keys that are there: null is not; RecordError for one that cannot be honoured."""
    present = {key: value for key, value in given.items() if value is not None}
    for key in present.keys() & REFUSED_KEYS:
        reason, fix = REFUSED_KEYS[key]
        if present[key] not in ("", [], {}, "[]"):
            raise RecordError(
                where, field=key if field_name == "row" else f"{field_name}.{key}", value=present[key],
                problem="is not supported", fix=fix, reason=reason,
            )  # fmt: skip
    return present


def _content(content: object, field_name: str, where: str) -> str:
    if isinstance(content, list):
        raise RecordError(
            where, field=field_name, value=content, problem="is a list of content parts, which is not supported",
            fix="write one text with <image>, <audio> and <video> where the media stand, and their files in images, "
            "audios and videos", reason="content_parts",
        )  # fmt: skip
    if not isinstance(content, str):
        raise RecordError(
            where, field=field_name, value=content, problem="is no text", fix="write a string", reason="bad_type"
        )
    if not encodable(content):
        raise RecordError(
            where, field=field_name, value=content, problem="holds half of a surrogate pair",
            fix="write valid Unicode", reason="bad_text",
        )  # fmt: skip
    return content


def _learned(turn: Mapping[str, Any], role: str, field_name: str, where: str) -> bool:
    """What the marks of a turn say; RecordError for other values, marks that differ, and questions to be learned."""
    marks = {mark: turn[mark] for mark in LEARN_MARKS if mark in turn}
    if not marks:
        return True
    for mark, value in marks.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise RecordError(
                where, field=f"{field_name}.{mark}", value=value, problem="does not say whether the turn is learned",
                fix="write 1 or true, or 0 or false", reason="bad_mark",
            )  # fmt: skip
    if len({bool(value) for value in marks.values()}) > 1:
        raise RecordError(
            where, field=field_name, value=marks, problem="marks that contradict each other", fix="keep one",
            reason="bad_mark",
        )  # fmt: skip
    learned = any(marks.values())
    if learned and role != "assistant":
        raise RecordError(
            where, field=field_name, value=marks, problem=f"a {role} turn cannot be learned, only answers are",
            fix="mark assistant turns", reason="bad_mark",
        )  # fmt: skip
    return learned


def _media_list(row: dict[str, Any], kind: Kind, where: str) -> tuple[str, ...]:
    plural = LIST_FIELD[kind]
    given = [name for name in (kind, plural) if row.get(name) not in (None, [], "")]
    if len(given) > 1:
        raise RecordError(
            where,
            field=f"{kind} / {plural}",
            value=row[kind],
            problem="both are given",
            fix="give one",
            reason="bad_type",
        )
    if not given:
        return ()
    name, value = given[0], row[given[0]]
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(item, str) and item and encodable(item) for item in value):
        raise RecordError(
            where,
            field=name,
            value=value,
            problem="is no list of file names",
            fix='write ["file", ...]',
            reason="bad_type",
        )
    for item in value:
        if URL.match(item):
            raise RecordError(
                where, field=name, value=item, problem="is a URL, and media are read from files only",
                fix="download it, and give the path under the source's root", reason="remote_media",
            )  # fmt: skip
    return tuple(value)


def _check_markers(
    messages: tuple[Message, ...], media: dict[Kind, tuple[str, ...]], where: str, *, of: str = ""
) -> None:
    """RecordError unless ``media``, listed in fields whose names begin with ``of``, are as many as their markers."""
    for kind in media:
        marker = f"<{kind}>"
        count = sum(m.content.count(marker) for m in messages if m.role != "assistant")
        if count != len(media[kind]):
            in_answers = sum(m.content.count(marker) for m in messages if m.role == "assistant")
            note = f" (the {in_answers} in answers do not count)" if in_answers else ""
            raise RecordError(
                where, field=of + LIST_FIELD[kind], value=list(media[kind]),
                problem=f"{len(media[kind])} file(s) for {count} {marker} marker(s) in system and user turns{note}",
                fix=f"write one {marker} for each file", reason="marker_count",
            )  # fmt: skip
