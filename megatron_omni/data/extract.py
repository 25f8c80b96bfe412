"""Recordings -> codes on disk and the rows that name them, shard by shard.

    NAME.spoken-00000.jsonl                 rows of up to ``SHARD`` recordings, each with "codes": "...#i"
    NAME.spoken-00000.codes.safetensors     their codes (codes.py)

A shard is there whole or not at all. One that was made of the same data by the same codec and settings is left alone, so an
interrupted command goes on where it was. A recording that cannot be used is counted with its reason: damaged, silent,
clipped, not finite, too short, too long, without text or speaker.

Sound is mixed to one channel, resampled to the codec's rate and filled with silence to a whole number of codes. Only
sounds of equal length are encoded together, so codes do not depend on what else is in a batch.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_omni.data.codes import SUFFIX, open_codes, write_codes
from megatron_omni.data.decode import cpu
from megatron_omni.data.decode.media import MAX_AUDIO_SECONDS, MediaError
from megatron_omni.data.errors import RecordError, internal_error
from megatron_omni.data.index import index_path
from megatron_omni.data.made_records import MOST_MESSAGES
from megatron_omni.data.record import loaded, parse_record
from megatron_omni.data.recording_rows import Recording, Recordings, line_of
from megatron_omni.data.sound_codes import WINDOW_SECONDS, Encoder, check_sound, encode_long
from megatron_omni.data.speech_segments import joined

SHARD = 512
"""Recordings of a shard."""
_TOGETHER_SECONDS, _WAITING_SECONDS = 120.0, 600.0
"""Sound that is encoded at once, and that waits in memory for sounds of equal length."""
_TAIL_SECONDS = 0.5
"""Of sound behind the last segment that still belongs to it."""
_VERSION = 2


@dataclass(frozen=True)
class Rules:
    """What is made of a recording."""

    shortest_seconds: float = 0.3
    longest_seconds: float = 45.0
    """Of a recording without segments."""
    normalise: Callable[[str, str], str] | None = None
    """(text, language) -> the words that are spoken."""
    group: Callable[[Sequence[str]], list[range]] | None = None
    """Texts of segments -> which of them are one piece (speech_segments.py)."""

    def key(self) -> list[Any]:
        """What decides what is written."""
        return [self.shortest_seconds, self.longest_seconds, self.normalise is not None]


@dataclass
class Extracted:
    """What became of recordings."""

    paths: list[Path] = field(default_factory=list)
    """The files of rows."""
    num_rows: int = 0
    seconds: float = 0.0
    skipped: Counter[str] = field(default_factory=Counter)
    messages: list[str] = field(default_factory=list)


def extract(
    recordings: Recordings,
    encoder: Encoder,
    rules: Rules,
    *,
    threads: int = 1,
    again: bool = False,
    advance: Callable[[int], None] = lambda number: None,
) -> Extracted:
    """Make all shards of ``recordings``; ``advance`` is told how many recordings are done."""
    found = Extracted()
    for number, start in enumerate(range(0, len(recordings), SHARD)):
        numbers = range(start, min(start + SHARD, len(recordings)))
        shard = _Shard(recordings, numbers, encoder, rules, number)
        if again or not shard.is_made():
            shard.make(threads=threads, advance=advance)
        else:
            advance(len(numbers))
        shard.add_to(found)
    return found


class _Shard:
    """One shard, made or to be made."""

    def __init__(self, recordings: Recordings, numbers: range, encoder: Encoder, rules: Rules, number: int) -> None:
        self.recordings, self.numbers, self.encoder, self.rules = recordings, numbers, encoder, rules
        self.skipped: Counter[str] = Counter()
        self.messages: list[str] = []
        stem = f"{recordings.name}.spoken-{number:05d}"
        self.rows_path = recordings.folder / f"{stem}.jsonl"
        self.codes_path = recordings.folder / f"{stem}{SUFFIX}"
        facts = [_VERSION, recordings.fingerprint, numbers.start, numbers.stop, encoder.fingerprint, rules.key()]
        self.made_of = hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def is_made(self) -> bool:
        """Whether both files are there, of this data, codec and rules."""
        if not self.codes_path.is_file():
            return False
        try:
            file = open_codes(self.codes_path)
        except ValueError:  # damaged, or of another version: made anew
            return False
        return file.about.get("made_of") == self.made_of and (self.rows_path.is_file() or not len(file))

    def add_to(self, found: Extracted) -> None:
        """Count what the shard holds."""
        file = open_codes(self.codes_path)
        found.seconds += sum(file.length(i) for i in range(len(file))) / file.codes_per_second
        found.skipped.update(file.about["skipped"])
        found.messages += self.messages[: MOST_MESSAGES - len(found.messages)]
        found.num_rows += int(file.about["rows"])
        if len(file):
            found.paths.append(self.rows_path)

    def make(self, *, threads: int, advance: Callable[[int], None]) -> None:
        """Encode the recordings and put the two files into their places, the codes last: they say that all is there."""
        for stale in (self.codes_path, index_path(self.rows_path)):  # the rows may stay the same to the byte
            stale.unlink(missing_ok=True)
        found: dict[int, tuple[Recording, NDArray[np.int64]]] = {}
        for number, recording, codes in self._encoded(threads, advance):
            found[number] = recording, codes
            advance(1)
        lines: list[str] = []
        arrays: list[NDArray[np.int64]] = []
        for number, (recording, codes) in sorted(found.items()):
            try:
                rows = self._rows(number, recording, len(codes), len(arrays))
            except Exception as error:
                self._leave_out(number, error)
                continue
            lines += [line_of(row) for row in rows]
            arrays.append(codes)
        self._write(lines, arrays)

    def _leave_out(self, number: int, error: Exception) -> None:
        where = self.recordings.places[number]
        bad = error if isinstance(error, RecordError | MediaError) else internal_error(where, error)
        self.skipped[bad.reason] += 1
        if len(self.messages) < MOST_MESSAGES:
            self.messages.append(str(bad) if str(bad).startswith(where) else f"{where}: {bad}")

    def _write(self, lines: list[str], arrays: list[NDArray[np.int64]]) -> None:
        if lines:
            partial = self.rows_path.with_name(f".{self.rows_path.name}.{os.getpid()}.partial")
            partial.write_text("".join(lines), encoding="utf-8")
            os.replace(partial, self.rows_path)
        else:
            self.rows_path.unlink(missing_ok=True)
        encoder = self.encoder
        write_codes(
            self.codes_path, arrays, fingerprint=encoder.fingerprint, num_codes=encoder.num_codes,
            codes_per_second=encoder.codes_per_second,
            about={"made_of": self.made_of, "skipped": self.skipped, "rows": len(lines)},
        )  # fmt: skip

    # -------------------------------------------------------------------------------------------- sound

    def _encoded(
        self, threads: int, advance: Callable[[int], None]
    ) -> Iterator[tuple[int, Recording, NDArray[np.int64]]]:
        """(number, recording, codes) of what can be used, in the order in which it is encoded."""
        waiting: dict[int, list[tuple[int, Recording, NDArray[np.float32]]]] = {}
        seconds = 0.0
        for number, decoded in _ahead(self._decoded, self.numbers, threads):
            try:
                recording, wave = decoded()
            except Exception as error:
                self._leave_out(number, error)
                advance(1)
                continue
            if len(wave) > WINDOW_SECONDS * self.encoder.sample_rate:
                yield number, recording, encode_long(wave, self.encoder)
                continue
            waiting.setdefault(len(wave), []).append((number, recording, wave))
            seconds += len(wave) / self.encoder.sample_rate
            if seconds > _WAITING_SECONDS:
                yield from self._encoded_together(waiting)
                waiting, seconds = {}, 0.0
        yield from self._encoded_together(waiting)

    def _encoded_together(
        self, waiting: dict[int, list[tuple[int, Recording, NDArray[np.float32]]]]
    ) -> Iterator[tuple[int, Recording, NDArray[np.int64]]]:
        for length, items in sorted(waiting.items()):
            most = max(1, int(_TOGETHER_SECONDS * self.encoder.sample_rate // length))
            for first in range(0, len(items), most):
                batch = items[first : first + most]
                codes = self.encoder.encode(np.stack([wave for _, _, wave in batch]))
                yield from ((number, recording, row) for (number, recording, _), row in zip(batch, codes))

    def _decoded(self, number: int) -> tuple[Recording, NDArray[np.float32]]:
        """A recording and its sound: whole codes, mono, at the codec's rate. RecordError or MediaError for one that
        cannot be used."""
        recording, rate = self.recordings.read(number), self.encoder.sample_rate
        longest = MAX_AUDIO_SECONDS if recording.segments else self.rules.longest_seconds
        wave = cpu.decode_audio(loaded(recording.file), max_seconds=longest, sample_rate=rate)
        check_sound(wave, rate, self.rules.shortest_seconds, where=self.recordings.places[number])
        return recording, np.pad(wave, (0, -len(wave) % self.encoder.hop_size))

    # -------------------------------------------------------------------------------------------- rows

    def _rows(self, number: int, recording: Recording, num_codes: int, place: int) -> list[dict[str, Any]]:
        """The rows of a recording whose codes stand at ``place`` of the shard; RecordError for one that is none."""
        named = {"codes": f"{self.codes_path.name}#{place}"}
        if recording.segments:
            rows = _pieces(recording, num_codes, self.encoder.codes_per_second, self.rules, named)
        else:
            rows = [_with_speech(recording.row, named)]
        if self.rules.normalise is not None:
            rows = [_normalised(row, self.rules.normalise) for row in rows]
        for row in rows:
            parse_record(row, where=self.recordings.places[number])
        return rows


def _ahead[T](work: Callable[[int], T], numbers: range, threads: int) -> Iterator[tuple[int, Callable[[], T]]]:
    """(number, result or error) in order, with a few more of them in work."""
    with ThreadPoolExecutor(max(1, threads)) as pool:
        coming = iter(numbers)
        futures: list[tuple[int, Future[T]]] = [(n, pool.submit(work, n)) for n in islice(coming, threads + 1)]
        while futures:
            number, future = futures.pop(0)
            future.exception()  # waits
            futures += [(n, pool.submit(work, n)) for n in islice(coming, 1)]
            yield number, future.result


# ------------------------------------------------------------------------------------------------ rows


def _with_speech(row: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """The row with more in ``speech`` of its last spoken answer."""
    turns = list(row["messages"])
    place = max(i for i, turn in enumerate(turns) if "speech" in turn)
    turns[place] = {**turns[place], "speech": {**turns[place]["speech"], **fields}}
    return {**row, "messages": turns}


def _pieces(
    recording: Recording, num_codes: int, codes_per_second: float, rules: Rules, named: dict[str, str]
) -> list[dict[str, Any]]:
    """A row for each piece of a long recording: its text, and the range of its codes."""
    segments = recording.segments
    if segments[-1].end * codes_per_second > num_codes + 1:
        raise RecordError(
            "", field="speech.segments", value=segments[-1],
            problem=f"ends behind the recording of {num_codes / codes_per_second:.2f} s", fix="repair the times",
            reason="bad_segments",
        )  # fmt: skip
    texts = [segment.text for segment in segments]
    groups = rules.group(texts) if rules.group is not None else [range(i, i + 1) for i in range(len(texts))]
    voice = {key: value for key, value in recording.speech.items() if key in ("speaker", "style", "language")}
    rows = []
    for number, group in enumerate(groups):
        start, stop = (round(time * codes_per_second) for time in (segments[group[0]].start, segments[group[-1]].end))
        to_the_end = group.stop == len(texts) and num_codes - stop <= _TAIL_SECONDS * codes_per_second
        place = {"start": start or None, "stop": None if to_the_end else max(stop, start + 1)}
        speech = {**voice, **named, **{key: value for key, value in place.items() if value is not None}}
        answer = {"role": "assistant", "content": joined(texts[group.start : group.stop]), "speech": speech}
        rows.append({"id": f"{recording.row.get('id', '')}#{number}", "messages": [answer]})
    return rows


def _normalised(row: dict[str, Any], normalise: Callable[[str, str], str]) -> dict[str, Any]:
    """The row with what is spoken in words; its content stays as it is written."""
    message = [message for message in parse_record(row).messages if message.speech is not None][-1]
    assert message.speech is not None
    said = normalise(message.speech.spoken, message.speech.language or "")
    return row if said == message.speech.spoken else _with_speech(row, {"text": said})
