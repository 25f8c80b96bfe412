"""The data of one optimizer step at a time, for one data-parallel rank.

A step takes ``global_batch_size`` sequences: the next samples of the mixture's order, one each, or several with
``packing`` (packing.py). Every rank knows the size of each (from the source's index, or from media headers; nothing is
decoded) and cuts the sequences into micro-batches: by length, longest first, so that little is padded; packed
sequences, which are full anyway, so that all micro-batches hold about the same work for the encoders. So they are the
same sets of samples on any number of ranks. Round j hands one to each rank, in the ranks' order or against it in turn,
which keeps their loads level. A rank decodes its own samples only.

A record that cannot be used gives way to the records after it in its source's order of that epoch: a function of the data
alone, the same on every layout. What a header does not show is found when one rank decodes; the rule is the same, only
the length may then differ from the plan (in a packed sequence a stand-in must fit the place, or the place stays empty).
Skips are counted by source and reason; beyond ``max_bad_fraction`` the run stops.

The state is the number of samples consumed, those that packing made wait, and the counters. ``num_workers`` threads
prepare the next steps (workers.py); they change neither order nor state. Threads, because decoding, resampling and
tokenizing release the interpreter lock, and threads leave no orphans, need no pickling and fork nothing beside CUDA; an
error in one surfaces in ``next_step``.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import count, islice
from math import lcm
from typing import Any, NamedTuple, Protocol

from megatron_omni.batch import OmniBatch
from megatron_omni.config.data import SourceConfig
from megatron_omni.config.parallel import sequence_multiple
from megatron_omni.config.run import Recipe
from megatron_omni.data.blend import components
from megatron_omni.data.builders import sample_builder
from megatron_omni.data.cache import Lru
from megatron_omni.data.collate import collate
from megatron_omni.data.decode.cpu import MediaError
from megatron_omni.data.mixture import DataEnded, Draw, Mixture
from megatron_omni.data.packing import deal, fill_rows
from megatron_omni.data.past import check_past, describe_order
from megatron_omni.data.plan import Cursor, Found, Place, Plan, Row, Skip, dealt
from megatron_omni.data.record import RecordError, internal_error
from megatron_omni.data.sample import Sample, SampleBuilder
from megatron_omni.data.sizes import SampleSize
from megatron_omni.data.sources import open_sources
from megatron_omni.data.stalls import Key, Stalls
from megatron_omni.data.tokenizer import Tokenizer
from megatron_omni.data.workers import Workers, working_on
from megatron_omni.estimate import encoder_flops

logger = logging.getLogger(__name__)

MIN_TRIED = 100
"""Records tried before the share of bad ones can stop a run."""
MAX_STAND_INS = 1000
"""Rows in a row that may fail before their source counts as unusable."""
_LOGGED_PER_REASON = 3
_KNOWN_SIZES = 1 << 18
_TOKEN_BYTES = 96
"""Of a token in a batch: eleven integers, and one for its place if it is a placeholder or has a label."""


class Counted(Protocol):
    """A micro-batch of a loader."""

    @property
    def num_samples(self) -> int:
        """Samples in it."""
        ...


class _Step[B: Counted](NamedTuple):
    batches: list[B]
    plan: Plan
    own_skips: list[Skip]
    """Found while decoding this rank's samples."""


class Loader[B: Counted]:
    """Micro-batches ``B`` of one data-parallel rank, step by step."""

    def __init__(
        self,
        recipe: Recipe,
        *,
        data_rank: int,
        data_size: int,
        consumed_samples: int = 0,
        sources: list[SourceConfig] | None = None,
        tokenizer: Tokenizer | None = None,
        agree: Callable[[list[Key]], list[Key]] | None = None,
    ) -> None:
        """``sources``: of an evaluation, whose last step is filled up where epochs end inside it; by default the recipe's.
        ``agree``: as in stalls.py, over the data ranks.
        """
        data = recipe.data
        per_round = data.micro_batch_size * data_size
        if data.global_batch_size % per_round or data.global_batch_size < 1:
            raise ValueError(
                f"data.global_batch_size = {data.global_batch_size} is no positive multiple of micro_batch_size x "
                f"data-parallel ranks = {data.micro_batch_size} x {data_size} = {per_round}"
            )
        assert 0 <= data_rank < data_size
        self.data, self.data_rank, self.data_size = data, data_rank, data_size
        self.builder = self._builder(recipe, tokenizer)
        configs, self._fills = (data.sources, False) if sources is None else (sources, True)
        self.sources = open_sources(configs, tokenizer=self.builder.tokenizer)
        blended = data if sources is None else replace(data, weight_by="samples", balance="none", batch_by="mixed")
        self.mixture = Mixture(
            components(configs, self.sources, data=blended, sizes=self.builder.sizes),
            seed=recipe.seed,
            batch_by=blended.batch_by,
            global_batch_size=data.global_batch_size,
        )
        self.length_multiple = lcm(data.pad_to_multiple_of, sequence_multiple(recipe.parallel))
        self._tile_flops, self._chunk_flops = encoder_flops(recipe.model)
        vision, audio = recipe.model.vision, recipe.model.audio
        self._tile_bytes = 3 * vision.image_size**2 if vision else 0
        image = recipe.model.image
        self._picture_bytes = 6 * image.base_size**2 if image else 0  # with a source
        self._chunk_bytes = round(400 * audio.num_mel_bins * audio.chunk_seconds) if audio else 0
        self._sizes: Lru[SampleSize | Skip] = Lru(_KNOWN_SIZES)
        self._undecodable: Lru[Skip] = Lru(_KNOWN_SIZES)
        self._seen: dict[int, Place] = {}
        """Places that the last plan left waiting: the next one asks for them again."""
        reads_headers = not self.builder.indexed or any(source.flags() is None for source in self.sources)
        self.around_agreement: Callable[[], AbstractContextManager[Any]] = nullcontext
        """Entered where the ranks agree, in which one waits for the slowest."""
        self._stalls = Stalls[Skip](partial(self._agreed, agree) if agree and reads_headers else None, self._stalled)
        self._samples: Lru[Sample] = Lru(int(data.cache_gib * 2**30))
        self._workers = Workers[Cursor, Plan, _Step[B]](
            self.plan,
            lambda plan: self._load(plan),
            num_bytes=self._planned_bytes,
            num_workers=data.num_workers,
            most_bytes=int(data.prefetch_gib * 2**30),
            stall_seconds=data.stall_seconds,
            give_up=self._give_up,
        )
        self._skipped: dict[Found, Counter[tuple[str, str]]] = {"planned": Counter(), "decoded": Counter()}
        """By (source, reason)."""
        self._tried: dict[Found, int] = {"planned": 0, "decoded": 0}
        self._cursor = Cursor(0)
        self.load_state_dict({"consumed_samples": consumed_samples})

    @property
    def consumed_samples(self) -> int:
        """Samples that were part of a step so far."""
        return self._cursor.consumed_samples

    # -------------------------------------------------------------------------------------------- steps

    def _next(self) -> _Step[B]:
        step = self._stalls.agreed(self._prepared, forget=self._forget)
        self._count(step)
        self._cursor = step.plan.after
        return step

    def _agreed(self, agree: Callable[[list[Key]], list[Key]], found: list[Key]) -> list[Key]:
        with self.around_agreement():
            return agree(found)

    def _prepared(self) -> _Step[B]:
        return self._workers.take(self._cursor) if self.data.num_workers else self._load(self.plan(self._cursor))

    def _forget(self) -> None:
        self._seen.clear()
        self._workers.forget()

    def plan(self, cursor: Cursor) -> Plan:
        """The step that starts at ``cursor``; DataEnded where too few samples are left for its sequences (of a held-out source:
        where none is left).
        """
        data = self.data
        skips: list[Skip] = []
        ended: list[DataEnded] = []
        num_rows = data.global_batch_size
        waiting = [self._seen.get(i) or self._place(i, []) for i in cursor.waiting]
        coming = self._coming(cursor.next_sample, skips, ended)
        if data.packing:
            rows, left_over = fill_rows(waiting, coming, num_rows=num_rows, capacity=data.seq_length)
        else:  # samples wait here only when a packed run was resumed without packing
            rows = [[place] for place in (*waiting[:num_rows], *islice(coming, max(num_rows - len(waiting), 0)))]
            left_over = waiting[num_rows:]
        if len(rows) < num_rows:
            if not (rows and self._fills):
                raise ended[0]
            lightest = min((row[0] for row in rows), key=lambda place: place.length)
            rows += [[lightest._replace(is_filler=True)]] * (num_rows - len(rows))
        self._seen = {place.sample_id: place for place in left_over}
        seen = [place.sample_id for row in (*rows, left_over) for place in row]
        after = Cursor(max(seen) + 1, tuple(place.sample_id for place in left_over))
        return Plan(self._cut(rows), skips, after.next_sample - cursor.next_sample, after)

    def _coming(self, first: int, skips: list[Skip], ended: list[DataEnded]) -> Iterator[Place]:
        """The samples from number ``first`` on; why there are no more goes to ``ended``."""
        for sample_id in count(first):
            try:
                place = self._place(sample_id, skips)
            except DataEnded as end:
                ended.append(end)
                return
            yield place

    def _cut(self, rows: list[Row]) -> list[list[Row]]:
        """Rows into micro-batches."""
        size = self.data.micro_batch_size
        if self.data.packing:
            return [[rows[i] for i in hand] for hand in deal([*map(self._encoder_cost, rows)], len(rows) // size)]
        ordered = sorted(rows, key=lambda row: (-row[0].length, row[0].sample_id))
        return [ordered[i : i + size] for i in range(0, len(ordered), size)]

    def _encoder_cost(self, row: Row) -> float:
        return sum(self._tile_flops * place.size.tiles + self._chunk_flops * place.size.chunks for place in row)

    def own_micro_batches(self, micro_batches: list[list[Row]]) -> list[list[Row]]:
        """Those that this rank computes."""
        return dealt(micro_batches, rank=self.data_rank, ranks=self.data_size)

    def _load(self, plan: Plan) -> _Step[B]:
        own_skips: list[Skip] = []
        batches = [self._batch(rows, own_skips) for rows in self.own_micro_batches(plan.micro_batches)]
        return _Step(batches, plan, own_skips)

    def _batch(self, rows: list[Row], skips: list[Skip]) -> B:
        """A micro-batch of ``rows``; what was passed over goes to ``skips``."""
        raise NotImplementedError

    def _decoded_rows(self, rows: list[Row], skips: list[Skip]) -> list[tuple[int, Place, Sample]]:
        """(number of its row, place, sample) of every sample of a micro-batch."""
        found: list[tuple[int, Place, Sample]] = []
        for number, row in enumerate(rows):
            spare = self.data.seq_length - sum(place.length for place in row)
            for place in row:
                sample = self._sample(place, skips, room=place.length + spare)
                if sample is not None:
                    spare -= sample.length - place.length
                    found.append((number, place, sample))
        if not found:
            raise self._exhausted(rows[0][0].draw, skips)
        return found

    def _planned_bytes(self, plan: Plan) -> int:
        """Memory of this rank's batches, from planned sizes."""
        rows = [row for rows in self.own_micro_batches(plan.micro_batches) for row in rows]
        width = max(sum(place.length for place in row) for row in rows)
        sizes = [place.size for row in rows for place in row]
        tiles, chunks, drawn = (sum(getattr(size, name) for size in sizes) for name in ("tiles", "chunks", "drawn"))
        media = tiles * self._tile_bytes + chunks * self._chunk_bytes + drawn * self._picture_bytes
        return media + len(rows) * width * _TOKEN_BYTES

    def close(self) -> None:
        """Stop the threads; the records that they work on are finished first."""
        self._workers.close()

    # -------------------------------------------------------------------------------------------- samples

    def _place(self, sample_id: int, skips: list[Skip]) -> Place:
        """The first row, from the one drawn on, whose headers are in order."""
        drawn = self.mixture.sample_at(sample_id)
        for attempt in range(self._last_attempt(drawn)):
            draw = self.mixture.next_in_epoch(drawn, attempt)
            size = self._size(draw)
            if isinstance(size, SampleSize):
                return Place(sample_id, draw, attempt, size)
            skips.append(size)
        raise self._exhausted(drawn, skips)

    def _size(self, draw: Draw) -> SampleSize | Skip:
        key = draw.source, draw.row
        if (known := self._stalls.get(key) or self._sizes.get(key)) is not None:
            return known
        try:
            working_on((draw.source, draw.row, "header"))
            size: SampleSize | Skip = self.builder.row_size(self.sources[draw.source], draw.row)
        except Exception as error:
            size = self._skip(draw, error)
        self._sizes.put(key, size, cost=1)
        return size

    def _sample(self, place: Place, skips: list[Skip], *, room: int) -> Sample | None:
        """The decoded sample of a place, or of the next row that decodes; None where no row fits a packed place.

        ``room``: tokens that the packed sequence has for it.
        """
        drawn = place.draw if place.attempt == 0 else self.mixture.sample_at(place.sample_id)
        for attempt in range(place.attempt, self._last_attempt(drawn)):
            draw = self.mixture.next_in_epoch(drawn, attempt)
            if self.data.packing and attempt > place.attempt:
                size = self._size(draw)
                if isinstance(size, SampleSize) and size.tokens > room:
                    continue
            key = draw.source, draw.row
            skip = self._undecodable.get(key)
            if skip is None:
                try:
                    sample = self._decoded(draw)
                except Exception as error:
                    skip = self._skip(draw, error)
                    self._undecodable.put(key, skip, cost=1)
                else:
                    if not self.data.packing or sample.length <= room:
                        return sample
                    skip = self._longer_than_promised(draw, sample, room)
            skips.append(skip)
        if self.data.packing:
            return None
        raise self._exhausted(drawn, skips)

    def _decoded(self, draw: Draw) -> Sample:
        key = draw.source, draw.row
        if (known := self._samples.get(key)) is not None:
            return known
        working_on((*key, "sample"))
        sample = self._built(draw)
        if self._samples.limit:
            self._samples.put(key, sample, cost=sample.num_bytes)
        return sample

    def _builder(self, recipe: Recipe, tokenizer: Tokenizer | None) -> SampleBuilder:
        return sample_builder(recipe, tokenizer)

    def _built(self, draw: Draw) -> Sample:
        return self.builder.build_sample(self.sources[draw.source][draw.row])

    def _longer_than_promised(self, draw: Draw, sample: Sample, room: int) -> Skip:
        error = RecordError(
            "", field="length", value=sample.length, problem=f"the headers promised less, and its sequence has {room} left",
            fix="repair the file, or run megatron-omni prepare --again", reason="wrong_header",
        )  # fmt: skip
        return self._skip(draw, error)

    def _give_up(self, record: object) -> bool:
        """Pass over a record that stalled twice."""
        if not isinstance(record, tuple):
            return False
        number, row, what = record
        if what == "header":
            self._stalls.add((number, row))
        else:
            self._undecodable.put((number, row), self._stalled((number, row)), cost=1)
        return True

    def _stalled(self, key: Key) -> Skip:
        source, limit = self.sources[key[0]], f"data.stall_seconds = {self.data.stall_seconds:g}"
        return Skip(source.name, "stalled", f"{source.where(key[1])}: takes longer than {limit}")

    def _skip(self, draw: Draw, error: Exception) -> Skip:
        source, where = self.sources[draw.source], self.sources[draw.source].where(draw.row)
        if not isinstance(error, RecordError | MediaError):
            error = internal_error(where, error)
        message = str(error) if str(error).startswith(where) else f"{where}: {error}"
        return Skip(source.name, error.reason, message)

    def _last_attempt(self, drawn: Draw) -> int:
        return min(self.mixture.components[drawn.component].num_rows, MAX_STAND_INS)

    def _exhausted(self, drawn: Draw, skips: list[Skip]) -> ValueError:
        name, last = self.sources[drawn.source].name, skips[-1].message
        return ValueError(
            f"data source {name!r}: {self._last_attempt(drawn)} records in a row cannot be used; the last one: {last}"
        )

    # -------------------------------------------------------------------------------------------- state

    def _count(self, step: _Step[B]) -> None:
        """Count, report and judge what a consumed step passed over."""
        own = sum(batch.num_samples for batch in step.batches)
        stages: list[tuple[Found, int, list[Skip]]] = [
            ("planned", step.plan.num_samples, step.plan.skips),
            ("decoded", own, step.own_skips),
        ]
        for stage, used, skips in stages:
            self._tried[stage] += used + len(skips)
            for skip in skips:
                key = skip.source, skip.reason
                self._skipped[stage][key] += 1
                everyone_knows = stage == "planned" and self.data_rank > 0
                if self._skipped[stage][key] <= _LOGGED_PER_REASON and not everyone_knows:
                    logger.warning("skipped a record of %s (%s): %s", skip.source, skip.reason, skip.message)
            tried, bad = self._tried[stage], self._skipped[stage].total()
            if tried >= MIN_TRIED and bad > self.data.max_bad_fraction * tried:
                counts = ", ".join(f"{reason}: {count}" for reason, count in self.report().items())
                raise ValueError(
                    f"{bad} of {tried} records could not be used, more than data.max_bad_fraction = "
                    f"{self.data.max_bad_fraction} ({counts}); the last one: "
                    f"{skips[-1].message if skips else 'in an earlier step'}. Repair the data or raise the limit"
                )

    def report(self) -> dict[str, int]:
        """Records passed over so far, as far as this rank knows, by reason."""
        reasons: Counter[str] = Counter()
        for counts in self._skipped.values():
            for (_, reason), number in counts.items():
                reasons[reason] += number
        return dict(reasons.most_common())

    def own_skips(self) -> Counter[tuple[str, str]]:
        """This rank's part of the run's count, by (source, reason): what all ranks know counts on the first alone."""
        return self._skipped["decoded"] + (self._skipped["planned"] if self.data_rank == 0 else Counter())

    @property
    def num_skipped(self) -> int:
        """Records in ``own_skips``."""
        return self.own_skips().total()

    @property
    def fallbacks(self) -> Counter[str]:
        """Files that ``data.decoder`` left to the CPU back end since the start of this process, by reason."""
        return Counter(self.builder.decoder.fallbacks)

    @property
    def worker_restarts(self) -> int:
        """Times that threads died or stalled and were replaced."""
        return self._workers.restarts.total()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: how far it is, counters, and the order that this number counts in."""
        return {
            "consumed_samples": self.consumed_samples,
            "waiting": list(self._cursor.waiting),
            "skips": {
                stage: [[*key, number] for key, number in found.items()] for stage, found in self._skipped.items()
            },
            "tried": dict(self._tried),
            "order": describe_order(self.mixture),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken, on any number of ranks; only ``consumed_samples`` is required.

        What was found while decoding counts on the first rank from here on, so that the sum over ranks stays right.
        """
        consumed = state["consumed_samples"]
        if consumed < 0 or (self.data.batch_by == "source" and consumed % self.data.global_batch_size):
            raise ValueError(
                f"consumed_samples = {consumed} is no whole number of steps of data.global_batch_size = "
                f"{self.data.global_batch_size}; with data.batch_by = 'source' keep the batch size when resuming"
            )
        waiting = tuple(state.get("waiting", ()))
        if (saved := state.get("order")) is not None:
            check_past(self.mixture, saved, consumed + len(waiting))
        self._cursor = Cursor(consumed + len(waiting), waiting)
        self._workers.forget()
        for stage in self._skipped:
            mine = stage == "planned" or self.data_rank == 0
            found = state.get("skips", {}).get(stage, []) if mine else []
            self._skipped[stage] = Counter({(source, reason): number for source, reason, number in found})
            self._tried[stage] = state.get("tried", {}).get(stage, 0) if mine else 0


class StepLoader(Loader[OmniBatch]):
    """Batches of samples, as the builder makes them."""

    def next_step(self) -> list[OmniBatch]:
        """This rank's micro-batches of the next step."""
        return self._next().batches

    def _batch(self, rows: list[Row], skips: list[Skip]) -> OmniBatch:
        found = self._decoded_rows(rows, skips)
        return collate(
            [sample.without_labels() if place.is_filler else sample for _, place, sample in found],
            pad_id=self.builder.pad_id,
            sample_ids=[place.sample_id for _, place, _ in found],
            source_ids=[place.draw.source for _, place, _ in found],
            row_of=[number for number, _, _ in found],
            multiple_of=self.length_multiple,
            rule=self.builder.rule,
        )
