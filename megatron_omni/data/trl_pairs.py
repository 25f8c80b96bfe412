"""Preference rows as TRL has them (``prompt``, ``chosen``, ``rejected``) -> rows of pairs.py, in a file beside theirs.

    {"prompt": "What?", "chosen": "this", "rejected": "that"}
    {"prompt": [turn, ..], "chosen": [turn], "rejected": [turn]}           turns: {"role", "content"}
    {"chosen": [turn, .., turn], "rejected": [turn, .., turn]}             the prompt is what both begin with
    {"prompt": "What?", "chosen": [user turn, turn], ..}                   it stands in the turns as well

Content may be a list of parts ({"type": "text", "text"}, {"type": "image"}); ``images``, ``audios`` and ``videos`` name
files in the order of the markers that these become. A picture that a text prompt does not place comes before it. Both
sides have the same prompt and the same media.
"""

from collections.abc import Mapping
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

from megatron_omni.data.made_records import MadeRecords, make_records
from megatron_omni.data.pairs import sides
from megatron_omni.data.record import KINDS, LIST_FIELD, MARKER, RecordError, parse_record
from megatron_omni.data.text_rows import find_rows
from megatron_omni.foreign import ForeignError, open_regular, parse_json

SUFFIX = ".records.jsonl"


def records_of_pairs(source: Path) -> MadeRecords:
    """Write ``NAME.records.jsonl`` beside ``source`` (JSONL, or a ``.json`` file with an array): a record for each row.

    ValueError for a file that is none or of which no row can be used, and where the file to be written is there.
    """
    if not source.is_file():
        raise ValueError(f"{str(source)!r} is no file; give JSONL rows with prompt, chosen and rejected")
    path = source.with_name(source.name.removesuffix(".jsonl").removesuffix(".json") + SUFFIX)
    if path.exists():
        raise ValueError(f"{str(path)!r} is there already; move it away to have it made again")
    ranges, numbers = find_rows(source)
    with open_regular(source) as file:

        def row(start: int, end: int, where: str) -> dict[str, Any]:
            file.seek(start)
            row = pair_row(_parsed(file.read(end - start), where), where=where)
            sides(parse_record(row, where=where))
            return row

        places = ((f"{source}:{number}", *place) for place, number in zip(ranges.tolist(), numbers.tolist()))
        rows = ((where, partial(row, start, end, where)) for where, start, end in places)
        return make_records(path, rows, nothing=f"{str(source)!r} holds no pair")


def pair_row(row: object, *, where: str) -> dict[str, Any]:
    """The row of pairs.py for one of TRL's; RecordError for what is none."""
    if not isinstance(row, Mapping):
        raise _refused(where, "row", row, "is no JSON object", 'write {"prompt": .., "chosen": .., "rejected": ..}')
    for name in ("chosen", "rejected"):
        if not row.get(name):
            raise _refused(where, name, row.get(name), "is missing", "give prompt, chosen and rejected")
    chosen, rejected = (_turns(row[name], "assistant", name, where) for name in ("chosen", "rejected"))
    prompt = _turns(row["prompt"], "user", "prompt", where) if row.get("prompt") else []
    chosen, rejected = (_behind(side, prompt) for side in (chosen, rejected))
    if not prompt:
        common = [*takewhile(lambda pair: pair[0] == pair[1], zip(chosen[:-1], rejected[:-1]))]
        prompt = [turn for turn, _ in common]
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    if len(chosen) != 1 or len(rejected) != 1:
        raise _refused(
            where, "chosen", [turn["role"] for turn in (*prompt, *chosen)], "is more than one answer to the prompt",
            "compare single answers to one prompt",
        )  # fmt: skip
    media = {LIST_FIELD[kind]: row.get(LIST_FIELD[kind]) or row.get(kind) for kind in KINDS}
    _place_media(prompt, media)
    answer = rejected[0]["content"]
    extra = {k: v for k, v in row.items() if k not in ("prompt", "chosen", "rejected", *KINDS, *LIST_FIELD.values())}
    return {
        "messages": [*prompt, *chosen],
        "rejected_response": answer,
        **{k: v for k, v in media.items() if v},
        **extra,
    }


def _turns(given: object, role: str, name: str, where: str) -> list[dict[str, str]]:
    """Turns of a text, which is one of ``role``, or of a list of turns."""
    if isinstance(given, str):
        return [{"role": role, "content": given.strip()}]
    if not isinstance(given, list) or not all(isinstance(turn, Mapping) for turn in given):
        raise _refused(where, name, given, "is neither text nor turns", 'write text, or [{"role": .., "content": ..}]')
    return [
        {"role": str(turn.get("role")), "content": _text(turn.get("content"), f"{name}[{i}].content", where)}
        for i, turn in enumerate(given)
    ]


def _text(content: object, name: str, where: str) -> str:
    """Content with a marker for each medium among its parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _refused(where, name, content, "is neither text nor a list of parts", "write text")
    said = ""
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            said += part["text"]
        elif kind in KINDS:
            said += f"<{kind}>"
        else:
            raise _refused(where, name, part, "is a part of an unknown kind", "use text, image, audio and video")
    return said


def _behind(side: list[dict[str, str]], prompt: list[dict[str, str]]) -> list[dict[str, str]]:
    """The turns of a side without those of the prompt, where it repeats them."""
    return side[len(prompt) :] if prompt and len(side) > len(prompt) and side[: len(prompt)] == prompt else side


def _place_media(prompt: list[dict[str, str]], media: Mapping[str, Any]) -> None:
    """Markers for media that no turn of the prompt places, before its first question."""
    placed = {marker for turn in prompt for marker in MARKER.findall(turn["content"])}
    first = next((turn for turn in prompt if turn["role"] == "user"), None)
    for kind in reversed(KINDS):
        files = media[LIST_FIELD[kind]]
        if files and kind not in placed and first is not None:
            count = 1 if isinstance(files, str) else len(files)
            first["content"] = f"<{kind}>" * count + "\n" + first["content"]


def _parsed(line: bytes, where: str) -> object:
    try:
        return parse_json(line, where)
    except ForeignError as error:
        raise RecordError(
            where, field="row", value=line[:60], problem=error.problem, fix="write one JSON object per line",
            reason="not_json",
        ) from error  # fmt: skip


def _refused(where: str, name: str, value: object, problem: str, fix: str) -> RecordError:
    return RecordError(where, field=name, value=value, problem=problem, fix=fix, reason="bad_pair")
