"""What a run will train on, before it starts: samples of every source as the model gets them, and what is wrong with them.

``inspect`` decodes some records of each source through the run's own ``SampleBuilder``, plans the run through its own
``StepLoader``, and collects what a person should look at: tokens with their loss mask, tiles, spectrograms, 3D positions,
placeholders against encoder rows, lengths, packing, epochs, and records that cannot be used with the reason.
preflight_page.py draws it. Nothing is trained and no weight is needed.

A run of up to ``WHOLE_RUN`` samples is planned step by step to its end. Of a longer one, some steps of each phase of the
mixture (between two changes of weights) are planned; a step of the phase holds as many samples as they do, on average,
which says how many steps the phase takes.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from megatron_omni.batch import IGNORE_LABEL, Modality
from megatron_omni.config.run import Recipe
from megatron_omni.data.decode.media import MediaError
from megatron_omni.data.loader import StepLoader
from megatron_omni.data.mixture import DataEnded
from megatron_omni.data.plan import Cursor, Plan
from megatron_omni.data.record import Record, RecordError
from megatron_omni.data.sample import Sample
from megatron_omni.data.sizes import spoken_answer

PLACES = 20_000
"""Places of the order that are looked at to find each source's share of the run."""
WHOLE_RUN = 200_000
"""Samples up to which every step is planned (50 us a sample on one core of a Zen 3)."""
FULL_ENOUGH = 0.95
"""Packing efficiency below which something is to be gained (docs/preflight.md)."""
_SIGNS = frozenset("%$€£¥&@#+=*/\\<>^~|°_％￥")
PLACEHOLDERS = {Modality.IMAGE: "tiles", Modality.VIDEO: "tiles", Modality.AUDIO: "chunks"}

EncoderRows = Callable[[Sample], tuple[int, int]]
"""Rows that the vision and the audio encoder give for a sample's tiles and chunks."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Neighbouring tokens that are shown as one."""

    text: str
    learned: bool
    """The model is trained to predict them."""
    modality: Modality
    special: bool
    count: int = 1


@dataclass(frozen=True, kw_only=True)
class Example:
    """One record as the model gets it."""

    where: str
    record: Record
    sample: Sample
    pieces: list[Piece]
    visual_placeholders: int
    visual_rows: int
    """What the vision encoder gives for the sample's tiles."""
    audio_placeholders: int
    audio_rows: int

    @property
    def agrees(self) -> bool:
        """Whether every placeholder gets one row."""
        return (self.visual_placeholders, self.audio_placeholders) == (self.visual_rows, self.audio_rows)

    @property
    def learned_tokens(self) -> int:
        """Tokens that the loss counts."""
        return int((self.sample.labels != IGNORE_LABEL).sum())


@dataclass(frozen=True, kw_only=True)
class BadRecord:
    """A record that a run would skip."""

    reason: str
    message: str


@dataclass(kw_only=True)
class SourceReport:
    """What was seen of one source."""

    name: str
    path: str
    rows: int
    share: float = 0.0
    """Of the samples of the run."""
    epochs: float = 0.0
    """Times that the run sees each of its rows."""
    lengths: list[int] = field(default_factory=list)
    """Tokens of the planned samples."""
    examples: list[Example] = field(default_factory=list)
    bad: list[BadRecord] = field(default_factory=list)
    texts_with_digits: int = 0
    texts_with_signs: int = 0
    """Of a speech generator: texts with digits, and with signs that are read as words (%, $, @ ..)."""
    tried: int = 0
    """Records that were decoded, or failed to."""


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How full the run's steps are. Sums over the run: of planned steps, each standing for those around it."""

    planned_steps: int
    run_steps: float
    """Steps of the whole run; fewer than ``train_iters`` where the sources have used their epochs before."""
    samples: float
    tokens: float
    slots: float
    """Tokens there is room for: ``seq_length`` a packed sequence, else the longest sample of the micro-batch for each."""

    @property
    def efficiency(self) -> float:
        """Part of the computed tokens that are no padding."""
        return self.tokens / self.slots if self.slots else 0.0

    @property
    def is_whole(self) -> bool:
        """Whether every step was planned."""
        return self.planned_steps == self.run_steps


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """Everything that the page shows."""

    recipe: Recipe
    sources: list[SourceReport]
    packing: Packing
    planned_skips: dict[str, int]
    """Records that the planned steps skip because of what their headers show, by reason."""
    last_sample: int | None
    """Samples until every source has used its epochs; None where they have none."""

    @property
    def total_samples(self) -> float:
        """Samples of the whole run."""
        return self.packing.samples

    @property
    def problems(self) -> list[str]:
        """What somebody should look at before starting, most urgent first."""
        found = []
        for source in self.sources:
            wrong = sum(not example.agrees for example in source.examples)
            if wrong:
                found.append(f"{source.name}: {wrong} samples whose placeholders and encoder rows disagree")
            unlearned = sum(not (example.learned_tokens or example.sample.drawn) for example in source.examples)
            if unlearned:
                found.append(f"{source.name}: {unlearned} samples with nothing to learn")
            if self.recipe.model.speech is not None and (source.texts_with_digits or source.texts_with_signs):
                found.append(
                    f"{source.name}: of {len(source.examples)} texts {source.texts_with_digits} hold digits and "
                    f"{source.texts_with_signs} signs such as % or $, which a speech generator reads as other sounds; write "
                    "them in words, or megatron-omni prepare --codes --normalise"
                )
            limit = self.recipe.data.max_bad_fraction
            if source.tried and len(source.bad) > limit * source.tried:
                found.append(
                    f"{source.name}: {len(source.bad)} of {source.tried} records cannot be used; a run stops above "
                    f"data.max_bad_fraction = {limit:g}"
                )
            if not source.share:
                found.append(f"{source.name}: never drawn in this run")
        if self.recipe.data.packing and self.packing.efficiency < FULL_ENOUGH:
            found.append(
                f"packed sequences are {self.packing.efficiency:.1%} full; another data.seq_length may fit the samples better"
            )
        if self.packing.run_steps < self.recipe.train_iters:
            found.append(
                f"the sources have used their epochs after {self.last_sample:,} samples: the run ends there, at about step "
                f"{self.packing.run_steps:.0f} of {self.recipe.train_iters}"
            )
        return found


def inspect(recipe: Recipe, *, num_samples: int, num_steps: int, encoder_rows: EncoderRows) -> Preflight:
    """Look at ``num_samples`` records of each source and plan the run; of a long one, ``num_steps`` steps of each phase.

    ValueError for a recipe whose data cannot be opened at all.
    """
    loader = StepLoader(recipe, data_rank=0, data_size=1)
    try:
        configs = recipe.data.sources
        reports = [
            SourceReport(name=c.name, path=c.path, rows=len(s)) for c, s in zip(configs, loader.sources, strict=True)
        ]
        planner = _Planner(loader, reports)
        packing = planner.plan_run(recipe.train_iters, num_steps)
        _count_epochs(loader, reports, packing.samples)
        for number, report in enumerate(reports):
            _look_at(loader, number, report, num_samples=num_samples, encoder_rows=encoder_rows)
    finally:
        loader.close()
    return Preflight(
        recipe=recipe,
        sources=reports,
        packing=packing,
        planned_skips=dict(planner.skips.most_common()),
        last_sample=loader.mixture.num_samples,
    )


class _Planner:
    """Plans from headers alone, exactly as the run will make them; notes lengths in the reports and what is skipped."""

    def __init__(self, loader: StepLoader, reports: list[SourceReport]) -> None:
        self.loader, self.reports = loader, reports
        self.skips: Counter[str] = Counter()

    def plan_run(self, train_iters: int, num_steps: int) -> Packing:
        """The run's steps: all of them, or ``num_steps`` of each phase of the mixture."""
        if self.loader.plan(Cursor(0)).num_samples * train_iters <= WHOLE_RUN:
            return self._whole(train_iters)
        starts, last = self.loader.mixture.phase_starts, self.loader.mixture.num_samples
        planned, run_steps, sums = 0, 0.0, np.zeros(3)
        for start, end in zip(starts, [*starts[1:], last], strict=True):
            stretch_steps, stretch = self._stretch(start, num_steps)
            if not stretch_steps:  # less than a step before the end of the data
                break
            steps = train_iters - run_steps
            if end is not None:
                steps = min(steps, (end - start) * stretch_steps / stretch[0])
            planned, run_steps, sums = (
                planned + stretch_steps,
                run_steps + steps,
                sums + stretch * steps / stretch_steps,
            )
            if run_steps >= train_iters:
                break
        return self._packing(planned, run_steps, sums)

    def _whole(self, train_iters: int) -> Packing:
        steps, sums = self._stretch(0, train_iters)
        return self._packing(steps, steps, sums)

    def _stretch(self, start: int, count: int) -> tuple[int, NDArray[np.float64]]:
        """``count`` steps in a row from sample ``start`` on, or as many as there are; samples, tokens and slots of them.

        In a row, because the first steps take what fits and leave the long samples waiting for the next ones.
        """
        cursor, sums = Cursor(start), np.zeros(3)
        for done in range(count):
            try:
                plan = self.loader.plan(cursor)
            except DataEnded:
                return done, sums
            sums += self._note(plan)
            cursor = plan.after
        return count, sums

    def _note(self, plan: Plan) -> NDArray[np.float64]:
        data = self.loader.data
        self.skips.update(skip.reason for skip in plan.skips)
        samples = tokens = slots = 0
        for rows in plan.micro_batches:
            lengths = [sum(place.length for place in row) for row in rows]
            multiple = self.loader.length_multiple
            width = data.seq_length if data.packing else -(-max(lengths) // multiple) * multiple
            tokens += sum(lengths)
            slots += width * len(rows)
            for place in (place for row in rows for place in row):
                samples += 1
                self.reports[place.draw.source].lengths.append(place.length)
        return np.array([samples, tokens, slots], dtype=np.float64)

    @staticmethod
    def _packing(planned: int, run_steps: float, sums: NDArray[np.float64]) -> Packing:
        samples, tokens, slots = sums.tolist()
        return Packing(planned_steps=planned, run_steps=run_steps, samples=samples, tokens=tokens, slots=slots)


def _count_epochs(loader: StepLoader, reports: list[SourceReport], total: float) -> None:
    """Share and epochs of each source, from places spread evenly over the run."""
    places = max(1, min(PLACES, round(total)))
    drawn: Counter[int] = Counter()
    seen = 0
    for i in range(places):
        try:
            draw = loader.mixture.sample_at(int(i * total / places))
        except DataEnded:
            break
        drawn[draw.source] += 1
        seen += 1
    for number, report in enumerate(reports):
        report.share = drawn[number] / max(seen, 1)
        report.epochs = drawn[number] / places * total / report.rows


def _look_at(
    loader: StepLoader, number: int, report: SourceReport, *, num_samples: int, encoder_rows: EncoderRows
) -> None:
    """Decode records spread evenly over the source."""
    source = loader.sources[number]
    count = min(num_samples, report.rows)
    for row in (i * report.rows // count for i in range(count)):
        report.tried += 1
        try:
            record = source[row]
            sample = loader.builder.build_sample(record)
        except (RecordError, MediaError) as error:
            where = source.where(row)
            message = str(error) if str(error).startswith(where) else f"{where}: {error}"
            report.bad.append(BadRecord(reason=error.reason, message=message))
            continue
        if (speech := spoken_answer(record)) is not None:
            report.texts_with_digits += any(map(str.isdigit, speech.spoken))
            report.texts_with_signs += any(map(_SIGNS.__contains__, speech.spoken))
        visual_rows, audio_rows = encoder_rows(sample)
        held = {modality: int((sample.modality == modality).sum()) for modality in PLACEHOLDERS}
        report.examples.append(
            Example(
                where=source.where(row),
                record=record,
                sample=sample,
                pieces=list(_pieces(loader, sample)),
                visual_placeholders=held[Modality.IMAGE] + held[Modality.VIDEO],
                visual_rows=visual_rows,
                audio_placeholders=held[Modality.AUDIO],
                audio_rows=audio_rows,
            )
        )


def _pieces(loader: StepLoader, sample: Sample) -> Iterator[Piece]:
    """Tokens as text; runs of the same kind joined, placeholders counted."""
    builder = loader.builder
    ids, modality = sample.input_ids.tolist(), sample.modality.tolist()
    # labels[i] is the token after i: token i is learned where the label before it is there.
    learned = [False, *(label != IGNORE_LABEL for label in sample.labels.tolist()[:-1])]
    start = 0
    for end in range(1, len(ids) + 1):
        kind = (modality[start], learned[start], builder.is_mark(ids[start]))
        same_kind = end < len(ids) and kind == (modality[end], learned[end], builder.is_mark(ids[end]))
        if same_kind and (not kind[2] or ids[end] == ids[start]):
            continue
        run = ids[start:end]
        placeholder = modality[start] != Modality.TEXT
        yield Piece(
            text=builder.readable(run[:1] if placeholder else run),
            learned=learned[start],
            modality=Modality(modality[start]),
            special=kind[2],
            count=len(run),
        )
        start = end
