"""The lines of a file, spoken on all ranks; a run that was stopped goes on with those that were not.

    NUMBER.wav              the sound of a line
    spoken.jsonl            what became of each line, in order, when all are spoken
    spoken.RANK.partial     until then: of each line that the replica RANK has spoken, written when its sound is whole
    request.json            what was asked: the checkpoint, the codec, the lines and the settings that a sound depends on

A line's sound depends on nothing but itself and these settings (its draws are named by its text), so what is there stays, on
whatever layout the run goes on; a directory with sounds of another request is refused.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from megatron_omni.checkpoint.commit import write_text
from megatron_omni.foreign import parse_json, read_json
from megatron_omni.generation.load import Checkpoint
from megatron_omni.generation.speaking import SoundFiles, said_of, speak_all
from megatron_omni.generation.speech_events import SpeechEvent, SpokenEvent
from megatron_omni.generation.utterance import Utterance
from megatron_omni.models.generators.codec import Codec
from megatron_omni.parallel.sharing import from_rank_0

SPOKEN, PARTIAL, REQUEST = "spoken.jsonl", "spoken.{}.partial", "request.json"
Row = dict[str, Any]


def speak_lines(
    checkpoint: Checkpoint,
    utterances: Sequence[Utterance],
    ids: Sequence[str | None],
    *,
    codec: Codec,
    out: Path,
    settings: Mapping[str, Any],
    batch_size: int = 8,
    release: bool | None = None,
) -> tuple[list[Row], int]:
    """Speak the ``utterances``, named by their numbers from 0 on, that ``out`` has no line of yet; all ranks together.

    The rows of all, and how many were there. ``settings``: what a sound depends on beside checkpoint, codec, text and
    prompt. ValueError where ``out`` holds sounds of another request.
    """
    asked = {"checkpoint": str(checkpoint.directory.absolute()), "codec": codec.fingerprint, **settings}
    asked["lines"] = hashlib.sha256(json.dumps([[u.text, u.prompt] for u in utterances]).encode()).hexdigest()
    rows = from_rank_0(lambda: lines_there(out, asked))
    there = len(rows)

    def row_of(event: SpokenEvent) -> Row:
        number = int(event.name)
        said = said_of(event, utterances[number], file=f"{number}.wav", sample_rate=codec.sample_rate)
        return {"line": number, "id": ids[number], **said}

    left = [utterance for utterance in utterances if int(utterance.name) not in rows]
    if left:
        model = checkpoint.load_model()
        lines = Lines(out / PARTIAL.format(checkpoint.pg.dp.rank()))
        with lines, SoundFiles(lambda name: out / f"{name}.wav", codec.sample_rate) as files:
            ended = speak_all(
                model, left, codec=codec, tokenizer=checkpoint.builder.tokenizer, batch_size=batch_size,
                release=release, take=_both(files.take, lambda event: lines.add(row_of(event))),
            )  # fmt: skip
        rows |= {int(name): row_of(event) for name, event in ended.items()}
    whole = [rows[number] for number in range(len(utterances))]
    from_rank_0(partial(_finish, out, whole))
    return whole, there


def lines_there(out: Path, asked: Mapping[str, Any]) -> dict[int, Row]:
    """What an earlier run of the same request left in ``out``, by number; ValueError where it was another request."""
    files = [file for file in (out / SPOKEN, *_partial(out)) if file.exists()]
    if not files:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / REQUEST, json.dumps(asked, indent=1) + "\n")
        return {}
    was = read_json(out / REQUEST) if (out / REQUEST).is_file() else {}
    if was != asked:
        other = ", ".join(sorted(key for key in asked if key not in was or was[key] != asked[key]))
        names = ", ".join(file.name for file in files)
        raise ValueError(
            f"{out}: holds sounds of another request ({other} differ); give another --out, or remove {names}"
        )
    rows = [parse_json(line, str(file)) for file in files for line in _whole(file).splitlines()]
    return {row["line"]: row for row in rows if "error" in row or (out / row["file"]).is_file()}


class Lines:
    """A file of lines that grows. A context; the file is there from the first line on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO | None = None

    def add(self, row: Row) -> None:
        """Write a line; whoever reads sees it. Half a line that an earlier run left goes."""
        if self._file is None:
            if self.path.exists():
                os.truncate(self.path, len(_whole(self.path)))
            self._file = self.path.open("ab")
        self._file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        self._file.flush()

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()


def _both(take: Callable[[SpeechEvent], None], spoken: Callable[[SpokenEvent], None]) -> Callable[[SpeechEvent], None]:
    def told(event: SpeechEvent) -> None:
        take(event)  # closes the sound, before its line says that it is there
        if isinstance(event, SpokenEvent):
            spoken(event)

    return told


def _whole(file: Path) -> bytes:
    """What a file holds up to its last end of a line."""
    data = file.read_bytes()
    return data[: data.rfind(b"\n") + 1]


def _partial(out: Path) -> Iterator[Path]:
    yield from sorted(out.glob(PARTIAL.format("*")))


def _finish(out: Path, rows: Sequence[Row]) -> None:
    """Put all lines into their place, and what was written until then away."""
    write_text(out / SPOKEN, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    for file in _partial(out):
        file.unlink()
