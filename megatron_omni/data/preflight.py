"""What a run will train on, before it starts: samples of every source as the model gets them, and what is wrong with them.

``inspect`` decodes some records of each source through the run's own ``SampleBuilder``, plans the run's first steps through
its own ``StepLoader``, and collects what a person should look at: tokens with their loss mask, tiles, spectrograms, 3D
positions, placeholders against encoder rows, lengths, packing, epochs, and records that cannot be used with the reason.
preflight_page.py draws it. Nothing is trained and no weight is needed.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from megatron_omni.batch import IGNORE_LABEL, Modality
from megatron_omni.config.run import Recipe
from megatron_omni.data.decode.media import MediaError
from megatron_omni.data.loader import Cursor, StepLoader
from megatron_omni.data.mixture import DataEnded
from megatron_omni.data.record import Record, RecordError
from megatron_omni.data.sample import Sample

PLACES = 20_000
"""Places of the order that are looked at to find each source's share of the run."""
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
    """A record that a run would pass over."""

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
    tried: int = 0
    """Records that were decoded, or failed to."""


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How full the first steps are."""

    steps: int
    samples: int
    tokens: int
    slots: int
    """Tokens that the rows have room for: ``seq_length`` each when packed, else the longest row of their micro-batch."""

    @property
    def efficiency(self) -> float:
        """Part of the computed tokens that are no padding."""
        return self.tokens / self.slots if self.slots else 0.0


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """Everything that the page shows."""

    recipe: Recipe
    sources: list[SourceReport]
    packing: Packing
    total_samples: float
    """Expected samples of the whole run."""
    planned_skips: dict[str, int]
    """Records that the first steps pass over because of what their headers show, by reason."""
    last_sample: int | None
    """Samples until every source has used its epochs; None where they have none."""

    @property
    def problems(self) -> list[str]:
        """What somebody should look at before starting, most urgent first."""
        found = []
        for source in self.sources:
            wrong = sum(not example.agrees for example in source.examples)
            if wrong:
                found.append(f"{source.name}: {wrong} samples whose placeholders and encoder rows disagree")
            unlearned = sum(example.learned_tokens == 0 for example in source.examples)
            if unlearned:
                found.append(f"{source.name}: {unlearned} samples with nothing to learn")
            limit = self.recipe.data.max_bad_fraction
            if source.tried and len(source.bad) > limit * source.tried:
                found.append(
                    f"{source.name}: {len(source.bad)} of {source.tried} records cannot be used; a run stops above "
                    f"data.max_bad_fraction = {limit:g}"
                )
            if not source.share:
                found.append(f"{source.name}: never drawn in this run")
        if self.last_sample is not None and self.last_sample < self.total_samples:
            found.append(
                f"the sources have used their epochs after {self.last_sample:,} samples: the run ends there, at about step "
                f"{int(self.recipe.train_iters * self.last_sample / self.total_samples)} of {self.recipe.train_iters}"
            )
        return found


def inspect(recipe: Recipe, *, num_samples: int, num_steps: int, encoder_rows: EncoderRows) -> Preflight:
    """Look at ``num_samples`` records of each source and at the plans of the first ``num_steps`` steps.

    ValueError for a recipe whose data cannot be opened at all.
    """
    loader = StepLoader(recipe, data_rank=0, data_size=1)
    try:
        configs = recipe.data.sources
        reports = [
            SourceReport(name=c.name, path=c.path, rows=len(s)) for c, s in zip(configs, loader.sources, strict=True)
        ]
        packing, skips = _plan_steps(loader, reports, num_steps)
        total = packing.samples / packing.steps * recipe.train_iters
        _count_epochs(loader, reports, total)
        for number, report in enumerate(reports):
            _look_at(loader, number, report, num_samples=num_samples, encoder_rows=encoder_rows)
    finally:
        loader.close()
    return Preflight(
        recipe=recipe,
        sources=reports,
        packing=packing,
        total_samples=total,
        planned_skips=dict(skips.most_common()),
        last_sample=loader.mixture.num_samples,
    )


def _plan_steps(loader: StepLoader, reports: list[SourceReport], num_steps: int) -> tuple[Packing, Counter[str]]:
    """Plans from headers alone, exactly as the run will make them."""
    data = loader.data
    cursor, skips = Cursor(0), Counter[str]()
    steps = samples = tokens = slots = 0
    for _ in range(num_steps):
        try:
            plan = loader.plan(cursor)
        except DataEnded:
            if not steps:
                raise
            break
        steps += 1
        cursor = plan.after
        skips.update(skip.reason for skip in plan.skips)
        for rows in plan.micro_batches:
            lengths = [sum(place.length for place in row) for row in rows]
            multiple = data.pad_to_multiple_of
            width = data.seq_length if data.packing else -(-max(lengths) // multiple) * multiple
            tokens += sum(lengths)
            slots += width * len(rows)
            for place in (place for row in rows for place in row):
                samples += 1
                reports[place.draw.source].lengths.append(place.length)
    return Packing(steps=steps, samples=samples, tokens=tokens, slots=slots), skips


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
    tokenizer = loader.builder.tokenizer
    ids, modality = sample.input_ids.tolist(), sample.modality.tolist()
    # labels[i] is the token after i: token i is learned where the label before it is there.
    learned = [False, *(label != IGNORE_LABEL for label in sample.labels.tolist()[:-1])]
    start = 0
    for end in range(1, len(ids) + 1):
        kind = (modality[start], learned[start], tokenizer.is_special(ids[start]))
        same_kind = end < len(ids) and kind == (modality[end], learned[end], tokenizer.is_special(ids[end]))
        if same_kind and (not kind[2] or ids[end] == ids[start]):
            continue
        run = ids[start:end]
        placeholder = modality[start] != Modality.TEXT
        yield Piece(
            text=tokenizer.decode(run[:1] if placeholder else run, skip_special=False),
            learned=learned[start],
            modality=Modality(modality[start]),
            special=kind[2],
            count=len(run),
        )
        start = end
