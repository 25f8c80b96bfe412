"""Rows that draw -> what a VAE and a language model make of them, on disk, and the rows that name it, shard by shard.

    NAME.drawn-00000.jsonl                  up to ``SHARD`` rows, each with "latents" and "hidden" (drawing.py)
    NAME.drawn-00000.latents.safetensors    target, and source where there is one, of each picture (row_files.py)
    NAME.drawn-00000.hidden.safetensors     hidden states of the block, and the vision encoder's rows of the source

Pictures are cut and damaged here as training would (drawn_pictures.py). A shard is there whole or not at all; one that was made
of the same data by the same models and settings is left alone, so an interrupted command goes on where it was. (Of the data the
rows are compared, not the pictures that they name: after a change to these, make it ``again``.) A row that cannot be used is
counted with its reason and left out; one that draws nothing stays as it is, or is left out where hidden states are made.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_omni.config.run import Recipe
from megatron_omni.data.decode import open_decoder
from megatron_omni.data.decode.media import MediaError
from megatron_omni.data.descriptors import DataFile
from megatron_omni.data.drawn_pictures import PictureReader, Standing, picture_source
from megatron_omni.data.errors import RecordError, internal_error
from megatron_omni.data.index import Fingerprint, index_path
from megatron_omni.data.made_records import MOST_MESSAGES
from megatron_omni.data.picture_arrays import cut_facts, hidden_facts
from megatron_omni.data.record import Record, parse_record
from megatron_omni.data.recording_rows import line_of
from megatron_omni.data.row_files import Kind, open_rows, write_rows
from megatron_omni.data.sample import Sample
from megatron_omni.data.sources import confine
from megatron_omni.data.text_rows import find_rows
from megatron_omni.foreign import ForeignError, parse_json

SHARD = 128
"""Rows of a shard: at the released sizes about 0.6 GB of hidden states in bf16."""
_VERSION = 1
_HALVES = {"latents": torch.float16, "hidden": torch.bfloat16}


class PictureEncoder(Protocol):
    """A VAE."""

    fingerprint: str

    def encode(self, pixels: Tensor) -> Tensor:
        """[C, h, w] of [3, H, W] uint8."""


class BlockReader(Protocol):
    """A language model with its vision encoder."""

    fingerprint: str

    def sample(self, record: Record) -> Sample:
        """What it reads of a record; RecordError or MediaError for what cannot be used."""

    def rows(self, samples: Sequence[Sample]) -> list[list[tuple[Tensor, Tensor | None]]]:
        """Of each picture of each sample: hidden states [T, H], and the encoder's rows [n, H] of its source."""


@dataclass
class Cached:
    """What became of rows."""

    paths: list[Path] = field(default_factory=list)
    """The files of rows."""
    num_rows: int = 0
    num_pictures: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    messages: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Making:
    """What is made, and of which recipe."""

    recipe: Recipe
    latents: PictureEncoder | None = None
    hidden: BlockReader | None = None
    half: bool = False
    """Latents in fp16 and hidden states in bf16, else fp32 and as the model computes."""

    @property
    def kinds(self) -> dict[Kind, Any]:
        """The makers by what they make."""
        given: dict[Kind, Any] = {"latents": self.latents, "hidden": self.hidden}
        return {kind: maker for kind, maker in given.items() if maker is not None}

    def facts(self, kind: Kind) -> Mapping[str, Any]:
        """What a file says of how it was made."""
        assert self.recipe.model.image is not None
        return cut_facts(self.recipe.model.image) if kind == "latents" else hidden_facts(self.recipe)


class PictureRows:
    """A JSONL file of rows; files that are made of it lie under its root."""

    def __init__(self, path: Path, root: str = "") -> None:
        if path.suffix == ".tar":
            raise ValueError(
                f"{path}: latents and hidden states are made of JSONL files with pictures beside them; unpack it"
            )
        self.path, self.root = path, Path(root) if root else path.parent
        self._ranges, self._lines = find_rows(path)
        self._file = DataFile(path)
        self.fingerprint = str(Fingerprint.of(path))

    def __len__(self) -> int:
        return len(self._lines)

    def where(self, number: int) -> str:
        """File and line."""
        return f"{self.path}:{self._lines[number]}"

    def read(self, number: int) -> tuple[dict[str, Any], Record]:
        """A row, and its record; RecordError for one that cannot be used."""
        start, end = self._ranges[number].tolist()
        try:
            row = parse_json(self._file.read_at(start, end - start), self.where(number))
        except ForeignError as error:
            raise RecordError(
                self.where(number), field="row", value="", problem=error.problem, fix="write one JSON object per line",
                reason="not_json",
            ) from error  # fmt: skip
        return row, confine(parse_record(row, where=self.where(number)), self.root)


def cache_pictures(
    rows: PictureRows, making: Making, *, again: bool = False, advance: Callable[[int], None] = lambda number: None
) -> Cached:
    """Make all shards of ``rows``; ``advance`` is told how many rows are done."""
    found = Cached()
    for number, start in enumerate(range(0, len(rows), SHARD)):
        numbers = range(start, min(start + SHARD, len(rows)))
        shard = _Shard(rows, numbers, making, number)
        if again or not shard.is_made():
            shard.make(advance)
        else:
            advance(len(numbers))
        shard.add_to(found)
    return found


class _Shard:
    """One shard, made or to be made."""

    def __init__(self, rows: PictureRows, numbers: range, making: Making, number: int) -> None:
        self.rows, self.numbers, self.making = rows, numbers, making
        self.skipped: Counter[str] = Counter()
        self.messages: list[str] = []
        stem = f"{rows.path.stem}.drawn-{number:05d}"
        self.rows_path = rows.root / f"{stem}.jsonl"
        self.paths = {kind: rows.root / f"{stem}.{kind}.safetensors" for kind in making.kinds}
        self.arrays: dict[Kind, list[Tensor]] = {kind: [] for kind in making.kinds}
        makers = {kind: [maker.fingerprint, making.facts(kind)] for kind, maker in making.kinds.items()}
        facts = [_VERSION, rows.fingerprint, str(rows.root), numbers.start, numbers.stop, makers, making.half]
        self._decoder = open_decoder(making.recipe.data.decoder)
        self._reader = PictureReader(making.recipe, self._decoder)
        self.made_of = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def is_made(self) -> bool:
        """Whether all files are there, of this data, these models and settings."""
        for kind, path in self.paths.items():
            try:
                about = open_rows(path, kind).about
            except ValueError:  # missing, damaged, or of another version: made anew
                return False
            if about.get("made_of") != self.made_of or not (self.rows_path.is_file() or not about["rows"]):
                return False
        return True

    def add_to(self, found: Cached) -> None:
        """Count what the shard holds."""
        kind, path = next(iter(self.paths.items()))
        about = open_rows(path, kind).about
        found.skipped.update(about["skipped"])
        found.num_pictures += int(about["pictures"])
        found.num_rows += int(about["rows"])
        found.messages += self.messages[: MOST_MESSAGES - len(found.messages)]
        if about["rows"]:
            found.paths.append(self.rows_path)

    def make(self, advance: Callable[[int], None]) -> None:
        """Make the arrays and put the files into their places, the rows first: the arrays say that all is there."""
        for stale in (*self.paths.values(), index_path(self.rows_path)):
            stale.unlink(missing_ok=True)
        lines, pictures = [], 0
        for row, named in self._named(advance):
            lines.append(
                line_of({**row, **{kind: each[0] if len(each) == 1 else each for kind, each in named.items()}})
            )
            pictures += max(map(len, named.values()), default=0)
        if lines:
            partial_path = self.rows_path.with_name(f".{self.rows_path.name}.{os.getpid()}.partial")
            partial_path.write_text("".join(lines), encoding="utf-8")
            os.replace(partial_path, self.rows_path)
        else:
            self.rows_path.unlink(missing_ok=True)
        about = {"made_of": self.made_of, "skipped": self.skipped, "rows": len(lines), "pictures": pictures}
        for kind, path in self.paths.items():
            maker, facts = self.making.kinds[kind], self.making.facts(kind)
            write_rows(path, self.arrays[kind], kind=kind, fingerprint=maker.fingerprint, about={**facts, **about})

    def _named(
        self, advance: Callable[[int], None]
    ) -> Iterator[tuple[dict[str, Any], dict[Kind, list[dict[str, str]]]]]:
        """Rows in order, each with what is to be written into it."""
        together = self.making.recipe.data.micro_batch_size
        for first in range(self.numbers.start, self.numbers.stop, together):
            numbers = range(first, min(first + together, self.numbers.stop))
            usable = []
            for number in numbers:
                try:
                    usable.append(self._looked_at(number))
                except Exception as error:
                    self._leave_out(number, error)
            samples = [sample for _, _, _, sample in usable if sample is not None]
            hidden = iter(self.making.hidden.rows(samples) if self.making.hidden is not None and samples else [])
            for row, record, latents, sample in usable:
                named: dict[Kind, list[dict[str, str]]] = {}
                if latents:
                    named["latents"] = [self._kept("latents", pair, ("target", "source")) for pair in latents]
                if sample is not None:
                    learned = iter(next(hidden))
                    owners = [message.learned for message in record.messages for _ in range(message.num_drawn)]
                    named["hidden"] = [
                        self._kept("hidden", next(learned), ("rows", "vision")) if owner else {} for owner in owners
                    ]
                yield row, named
            advance(len(numbers))

    def _looked_at(
        self, number: int
    ) -> tuple[dict[str, Any], Record, list[tuple[Tensor, Tensor | None]], Sample | None]:
        """A row, its record, the latents of its pictures, and what the language model is to read."""
        row, record = self.rows.read(number)
        if record.drawing is None:
            if self.making.hidden is not None:
                raise RecordError(
                    record.where, field="targets", value=None, problem="draws nothing", fix="nothing is to be done",
                    reason="no_target",
                )  # fmt: skip
            return row, record, [], None
        latents = self._latents(record) if self.making.latents is not None else []
        return row, record, latents, self.making.hidden.sample(record) if self.making.hidden is not None else None

    def _latents(self, record: Record) -> list[tuple[Tensor, Tensor | None]]:
        assert self.making.latents is not None and record.drawing is not None
        bare = replace(record, drawing=replace(record.drawing, latents=()))
        found = []
        for number, source in enumerate(record.picture_sources):
            opened = None if source is None else partial(picture_source, record, source, self._decoder)
            target, shown = self._reader.both(bare, Standing(number, (), opened, None))
            encode = self.making.latents.encode
            found.append((encode(target), None if shown is None else encode(shown)))
        return found

    def _kept(self, kind: Kind, pair: tuple[Tensor, Tensor | None], names: tuple[str, str]) -> dict[str, str]:
        """Keep the arrays of a picture; their places by name."""
        named = {}
        for name, array in zip(names, pair):
            if array is not None:
                named[name] = f"{self.paths[kind].name}#{len(self.arrays[kind])}"
                self.arrays[kind].append(array.detach().cpu().to(_HALVES[kind] if self.making.half else array.dtype))
        return named

    def _leave_out(self, number: int, error: Exception) -> None:
        where = self.rows.where(number)
        bad = error if isinstance(error, RecordError | MediaError) else internal_error(where, error)
        self.skipped[bad.reason] += 1
        if len(self.messages) < MOST_MESSAGES:
            self.messages.append(str(bad) if str(bad).startswith(where) else f"{where}: {bad}")
