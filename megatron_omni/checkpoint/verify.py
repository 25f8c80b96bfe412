"""Checking conversions: a directory against its ledger, its ledger against the sources, and both ways bit for bit.

``verify`` needs nothing but the directory: manifest, then every tensor against its line. With the sources at hand it
also hashes their files and makes every tensor again from them. ``roundtrip`` imports, exports and compares every tensor
with the original, names and types included.
"""

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_omni.checkpoint import commit
from megatron_omni.checkpoint.commit import CheckpointError
from megatron_omni.checkpoint.convert import CARRIED, import_checkpoint
from megatron_omni.checkpoint.export import Opened, export_checkpoint, made_again, open_ours, source_digests
from megatron_omni.checkpoint.families import FAMILIES, Part
from megatron_omni.checkpoint.layout import Layout
from megatron_omni.checkpoint.ledger import (
    DTYPES_BY_NAME,
    LEDGER,
    check_ledger,
    check_lines,
    read_ledger,
    tensor_digest,
)
from megatron_omni.checkpoint.names import Row, expand
from megatron_omni.checkpoint.progress import ByteProgress
from megatron_omni.checkpoint.sources import Digests, HuggingFaceSource, Source
from megatron_omni.checkpoint.tensor_files import ConversionError, read_tensor
from megatron_omni.checkpoint.upcycle import REPORT, read_report, reopen
from megatron_omni.config.run import Recipe

logger = logging.getLogger(__name__)


def verify(path: Path, *, sources: dict[str, Path] | None = None) -> list[str]:
    """What was checked, one line each; CheckpointError names the file or tensor that is not what the ledger says.

    ``sources``: where the sources lie now, by family, if not where they were; those that are gone are said to be.
    """
    if (path / LEDGER).is_file() and not (path / commit.MANIFEST).is_file():
        return _verify_export(path, sources or {})
    opened = open_ours(path, check=True)
    ledger = opened.ledger
    _check_tracker(path, opened.directory)
    if not ledger or ledger.get("command") == "export":
        raise ConversionError(f"{opened.directory}: has no {LEDGER}; only converted checkpoints can be verified")
    stored, listed = set(opened.reader.tensors), {line["key"] for line in ledger["tensors"]}
    if stored != listed:
        raise CheckpointError(
            f"{opened.directory}: {sorted(stored ^ listed)[0]!r} is not in both the tensors and the ledger"
        )
    progress = ByteProgress("verify", sum(_line_bytes(line) for line in ledger["tensors"]))
    for size in check_lines(
        ledger["tensors"], lambda key, expert: opened.reader.read(key, index=expert), where=opened.directory
    ):
        progress.add(size)
    progress.finish()
    done = [f"{opened.directory}: every file has its hash, {len(ledger['tensors'])} tensors are those of the ledger"]
    names = {line["as"] for line in ledger["carried"]}
    if names != set(opened.carried):
        raise CheckpointError(f"{opened.directory / CARRIED}: holds other tensors than the ledger says")
    carried = [{**line, "key": line["as"]} for line in ledger["carried"]]
    for _ in check_lines(carried, lambda key, _: read_tensor(opened.carried[key]), where=opened.directory / CARRIED):
        pass
    for record in ledger["parts"]:
        if not record.get("is_path", True):
            done.append(_verify_made(ledger, record, opened))
            continue
        place = (sources or {}).get(record["family"], Path(record["source"]))
        if not place.exists():
            done.append(f"{record['family']}: {place} is not here; its tensors were not made again")
            continue
        home, source = _home(record), HuggingFaceSource(place)
        hashes = {Path(s["file"]).name: s["sha256"] for s in ledger["sources"] if Path(s["file"]).parent == home}
        recorded = {file: hashes.get(file.name) for file in source.files()}
        done.append(_verify_source(ledger, record, source, recorded, opened.recipe))
    return done


def _verify_made(ledger: dict[str, Any], record: dict[str, Any], opened: Opened) -> str:
    """A part that is no path: what was upcycled is made again of the dense checkpoints, where they are still there."""
    if not (opened.directory / REPORT).is_file():
        return f"{record['family']}: {record['source']}; its tensors have no file to be made from again"
    report = read_report(opened.directory / REPORT)
    for place in report["sources"].values():
        if not Path(place).exists():
            return f"{record['family']}: {place} is not here; its tensors were not made again"
    source = reopen(report, opened.recipe.model)
    digests = {Path(said["file"]): said["sha256"] for said in ledger["sources"]}
    return _verify_source(ledger, record, source, {file: digests.get(file) for file in source.files()}, opened.recipe)


def _check_tracker(path: Path, directory: Path) -> None:
    """The file that names the step, which a start from the directory ``path`` asks."""
    tracker, expected = directory.with_name(commit.TRACKER), f"{directory.name[5:].lstrip('0') or '0'}\n"
    if path != directory and (not tracker.is_file() or tracker.read_bytes() != expected.encode()):
        raise CheckpointError(f"{tracker}: expected {expected!r}, found something else; restore it from a copy")


def _verify_export(path: Path, places: dict[str, Path]) -> list[str]:
    ledger = read_ledger(path)
    assert ledger is not None
    check_ledger(path)
    files = {path / output["file"]: output["sha256"] for output in ledger["outputs"]}
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file}: missing")
    for file, digest in Digests(files).result().items():
        if digest != files[file]:
            raise CheckpointError(f"{file}: contents do not match the ledger")
    source = HuggingFaceSource(path)
    keys = {line["key"] for line in ledger["tensors"]}
    if keys != set(source.infos()):
        raise CheckpointError(
            f"{path}: {sorted(keys ^ set(source.infos()))[0]!r} is not in both the files and the ledger"
        )
    for _ in check_lines(ledger["tensors"], lambda key, expert: source.read(key), where=path):
        pass
    done = [f"{path}: every file has its hash, {len(keys)} tensors are those of the ledger"]
    (part,) = ledger["parts"]
    place, like = places.get(part["family"], Path(part["source"])), Path(part["like"]) if "like" in part else None
    if gone := [directory for directory in (place, like) if directory is not None and not directory.exists()]:
        return [*done, f"{part['family']}: {gone[0]} is not here; its tensors were not made again"]
    return [*done, _verify_exported(ledger, open_ours(place, like=like, check=True))]


def _verify_exported(ledger: dict[str, Any], opened: Opened) -> str:
    """Make every tensor of an export again from the checkpoint that it was made of."""
    if {said["file"]: said["sha256"] for said in ledger["sources"]} != source_digests(opened):
        raise CheckpointError(f"{opened.directory}: is not the checkpoint that was exported: its SHA-256s are others")
    lines = {line["key"]: line for line in ledger["tensors"]}
    family, dtypes = ledger["parts"][0]["family"], {key: DTYPES_BY_NAME[lines[key]["dtype"]] for key in lines}
    for key, tensor in made_again(opened, family, dtypes):
        if tensor_digest(tensor) != lines[key]["sha256"]:
            raise CheckpointError(f"{opened.directory}: does not make the exported {key!r}")
    return f"{family}: {len(lines)} tensors made again from {opened.directory}, all equal"


def _verify_source(
    ledger: dict[str, Any], record: dict[str, Any], source: Source, recorded: dict[Path, str | None], recipe: Recipe
) -> str:
    """Make every tensor of one part again and compare checksums; ``recorded``: of the files that ``source`` reads."""
    for file, digest in Digests(recorded).result().items():
        if recorded[file] not in (None, digest):
            raise CheckpointError(f"{file}: is not the file that was converted: its SHA-256 is another")
    lines = {(line["key"], line.get("expert")): line for line in ledger["tensors"]}
    dtype = DTYPES_BY_NAME[ledger["dtype"]]
    entries = expand(FAMILIES[record["family"]].rows(recipe.model, record["options"]))
    for entry in entries:
        parts = [source.read(key).to(dtype) for key in entry.theirs]
        tensor = entry.transform.to_ours(parts).to(dtype).contiguous()
        if tensor_digest(tensor) != lines[entry.ours, entry.expert]["sha256"]:
            raise CheckpointError(
                f"{source.label}: {', '.join(entry.theirs)} do not make the checkpoint's {entry.ours!r}"
            )
    return f"{record['family']}: {len(entries)} tensors made again from {source.label}, all equal"


def _home(record: dict[str, Any]) -> Path:
    """Directory that a recorded source's files lay in."""
    path = Path(record["source"])
    return path.parent if path.suffix in (".safetensors", ".bin", ".pt", ".pth") else path


def _line_bytes(line: dict[str, Any]) -> int:
    size = DTYPES_BY_NAME[line["dtype"]].itemsize
    for length in line["shape"]:
        size *= length
    return size


def roundtrip(
    parts: Sequence[Part], recipe: Recipe, *, wanted: Sequence[Row], layout: Layout, work: Path | None = None
) -> list[str]:
    """Import ``parts`` at ``layout``, export every family again, compare; a line for each. ``work``: disk to use."""
    done = []
    with tempfile.TemporaryDirectory(prefix="roundtrip-", dir=work) as directory:
        out = Path(directory) / "ours"
        import_checkpoint(parts, recipe, out, wanted=wanted, layout=layout)
        opened = open_ours(out)
        for part in parts:
            if not isinstance(part.source, HuggingFaceSource):
                continue
            back = export_checkpoint(opened, Path(directory) / part.family, family=part.family)
            beside = {key for other in parts if other is not part for row in other.rows for key in row.theirs}
            count = compare(part.source, HuggingFaceSource(back), twins=set(part.same), beside=beside)
            done.append(f"{part.family}: {count} tensors of {part.source.label} are back, bit for bit")
    return done


def compare(first: Source, second: Source, *, twins: set[str] | None = None, beside: set[str] | None = None) -> int:
    """Number of tensors, all equal in name, type, shape and bits; ``twins`` may be missing from the second, and ``beside``, of
    other sources, from the first."""
    theirs, back = first.infos(), second.infos()
    missing = set(theirs) - set(back) - (twins or set())
    added = set(back) - set(theirs) - (beside or set())
    if missing or added:
        odd = sorted(missing or added)[0]
        raise CheckpointError(f"{odd!r} is in only one of {first.label} and what came back")
    common = [key for key in back if key in theirs]
    for key in common:
        a, b = first.read(key), second.read(key)
        if a.dtype != b.dtype or a.shape != b.shape or tensor_digest(a.contiguous()) != tensor_digest(b.contiguous()):
            raise CheckpointError(f"{key!r}: what came back differs from {theirs[key].path}")
    return len(common)
