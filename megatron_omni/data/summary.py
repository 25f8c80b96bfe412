"""What a source holds, as a recipe sees it: from its index alone, so it costs some microseconds a row.

``summarise`` gives plain numbers for JSON, ``summary_lines`` the same for people.
"""

from collections import Counter
from collections.abc import Set
from typing import Any

from megatron_omni.data.record import Kind, RecordError, internal_error
from megatron_omni.data.sizes import RecordFacts, SampleSize, SizeRule
from megatron_omni.data.sources import Source
from megatron_omni.positions import SAMPLE_RATE

EXAMPLES = 5
"""Rejected rows that are named, of each reason."""


def modality_class(kinds: Set[Kind]) -> str:
    """Class of a sample for balancing: the first of video, image and audio that it holds, else text."""
    return next((kind for kind in ("video", "image", "audio") if kind in kinds), "text")


def summarise(source: Source, sizes: SizeRule) -> dict[str, Any]:
    """Counts, tokens and lengths of a source with an index."""
    assert source.flags() is not None, f"source {source.name!r} has no index"
    tokens, classes, media, rejected = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    lengths, examples = Counter[int](), dict[str, list[str]]()
    seconds = {"audio": 0.0, "video": 0.0}
    tiles = chunks = 0
    for row in range(len(source)):
        try:
            facts = source.facts(row)
            assert facts is not None
            size = sizes.size(facts)
        except Exception as error:
            where = source.where(row)
            bad = error if isinstance(error, RecordError) else internal_error(where, error)
            rejected[bad.reason] += 1
            if len(shown := examples.setdefault(bad.reason, [])) < EXAMPLES:
                shown.append(str(bad) if str(bad).startswith(where) else f"{where}: {bad}")
            continue
        lengths[size.tokens] += 1
        tokens.update(text=size.text, image=size.image, video=size.video, audio=size.audio)
        tiles, chunks = tiles + size.tiles, chunks + size.chunks
        classes[modality_class({item.kind for item in facts.media})] += 1
        _add_media(facts, media, seconds)
    usable, total = lengths.total(), sum(length * count for length, count in lengths.items())
    return {
        "source": source.name,
        "records": len(source),
        "usable": usable,
        "rejected": dict(rejected.most_common()),
        "rejected_examples": examples,
        "samples_by_class": dict(classes),
        "tokens": {"all": total, **tokens},
        "tokens_per_sample": {"mean": round(total / max(usable, 1), 1), "longest": max(lengths, default=0)},
        "length_histogram": histogram(lengths),
        "media": dict(media),
        "media_seconds": {kind: round(value, 1) for kind, value in seconds.items() if value},
        "tiles": tiles,
        "chunks": chunks,
    }  # fmt: skip


def _add_media(facts: RecordFacts, media: Counter[str], seconds: dict[str, float]) -> None:
    for item in facts.media:
        media[item.kind] += 1
        if item.kind != "image":
            seconds[item.kind] += item.seconds if item.kind == "video" else item.samples / SAMPLE_RATE
    if facts.targets:
        media["drawn"] += len(facts.targets)


def histogram(lengths: Counter[int]) -> dict[str, int]:
    """Samples by tokens, from samples of each length: "64" counts lengths of 64 to 127."""
    counts = Counter[int]()
    for length, count in lengths.items():
        if length:
            counts[1 << (length.bit_length() - 1)] += count
    return {str(start): counts[start] for start in sorted(counts)}


def mean_tokens(source: Source, sizes: SizeRule, *, most_rows: int = 1 << 16) -> float | None:
    """Mean tokens of a usable sample; of a larger source, of rows spread evenly over it. None without an index."""
    if source.flags() is None:
        return None
    found: list[SampleSize] = []
    count = min(len(source), most_rows)
    for number in range(count):
        try:
            facts = source.facts(number * len(source) // count)
            assert facts is not None
            found.append(sizes.size(facts))
        except RecordError:
            continue
    if not found:
        raise ValueError(f"data source {source.name!r} holds no sample that this recipe can use")
    return sum(size.tokens for size in found) / len(found)


def summary_lines(summary: dict[str, Any]) -> list[str]:
    """The summary for people."""
    tokens = summary["tokens"]
    parts = ", ".join(f"{kind} {count:,}" for kind, count in tokens.items() if kind != "all" and count)
    mean, longest = summary["tokens_per_sample"].values()
    lines = [
        f"{summary['source']}: {summary['usable']:,} of {summary['records']:,} records usable, {tokens['all']:,} tokens "
        f"({parts}); {mean} a sample, longest {longest}"
    ]
    if summary["media"]:
        held = (
            f"{count:,} {kind}"
            + (f" ({seconds / 3600:.2f} h)" if (seconds := summary["media_seconds"].get(kind)) else "")
            for kind, count in summary["media"].items()
        )
        lines.append(f"  media: {', '.join(held)}; {summary['tiles']:,} tiles, {summary['chunks']:,} chunks of sound")
    most = max(summary["length_histogram"].values(), default=1)
    for start, count in summary["length_histogram"].items():
        lines.append(f"  {int(start):>7}+ tokens {count:>9,} {'#' * max(1, 40 * count // most)}")
    for reason, count in summary["rejected"].items():
        lines.append(f"  rejected ({reason}): {count:,}; {summary['rejected_examples'][reason][0]}")
    return lines
