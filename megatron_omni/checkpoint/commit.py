"""How a checkpoint directory becomes visible, is checked, found and retired: files only, no tensors, one process.

    checkpoints/.tmp_iter_0000100/     being written
    checkpoints/iter_0000100/          whole: hashed, flushed to disk, then renamed
    checkpoints/latest_checkpointed_iteration.txt      "100", replaced after the rename
    checkpoints/best.json              step, metric and value of the best checkpoint, where one is kept
    checkpoints/.old_iter_0000050/     retired or replaced, being deleted

A reader sees either no directory of a step or a whole one. ``integrity.json`` (Megatron's format: SHA-256 of every
file) is checked before anything is read; a directory that fails the check is passed over, with a warning that names
the file, in favour of the next older one.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_omni.foreign import parse_json, read_json

TRACKER = "latest_checkpointed_iteration.txt"
MANIFEST = "integrity.json"
CHECKPOINTS = "checkpoints"
BEST = "best.json"
HASHED_AT_ONCE = 4 * 2**20
HashFiles = Callable[[Path, Sequence[str]], dict[str, str]]

logger = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read. The previous one is untouched."""


def iteration_dir(root: Path, step: int) -> Path:
    """Directory of a whole checkpoint."""
    return root / f"iter_{step:07d}"


def temporary_dir(root: Path, step: int) -> Path:
    """Directory of a checkpoint that is being written."""
    return root / f".tmp_iter_{step:07d}"


def begin(root: Path, step: int) -> Path:
    """An empty temporary directory for ``step``; what dead runs left behind is removed."""
    root.mkdir(parents=True, exist_ok=True)
    sweep(root)
    for stale in root.glob(".tmp_iter_*"):
        shutil.rmtree(stale, ignore_errors=True)
    directory = temporary_dir(root, step)
    directory.mkdir()
    return directory


def publish(
    root: Path,
    step: int,
    *,
    keep: int,
    digests: dict[str, str] | None = None,
    score: tuple[str, float] | None = None,
) -> Path:
    """Make the temporary directory of ``step`` the newest checkpoint: manifest, flush, rename, tracker, retention.

    What it replaces and retires is hidden; :func:`sweep` deletes it, which takes its time with large files.
    ``digests``: SHA-256 of files that were hashed while they were written. ``score``: the metric that chooses the best
    checkpoint and its value here, lower is better.
    """
    temporary, final = temporary_dir(root, step), iteration_dir(root, step)
    write_manifest(temporary, digests=digests)
    flush_tree(temporary)
    if final.exists():  # an older generation of the same step: a run that was rolled back and came here again
        _hide(final)
    os.rename(temporary, final)
    _flush_directory(root)
    write_text(root / TRACKER, f"{step}\n")
    if score is not None:
        _note_score(root, step, *score)
    retire(root, keep=keep)
    return final


def _note_score(root: Path, step: int, metric: str, value: float) -> None:
    """Make ``step`` the best checkpoint unless an earlier one has a value as low."""
    best = best_checkpoint(root)
    # A later step is of a run that was rolled back, whose future no longer counts.
    if best is not None and best["metric"] == metric and best["step"] < step and best["value"] <= value:
        return
    write_text(root / BEST, json.dumps({"step": step, "metric": metric, "value": value}) + "\n")


def best_checkpoint(root: Path) -> dict[str, Any] | None:
    """``step``, ``metric`` and ``value`` of the best checkpoint; None where none is kept or its directory is gone."""
    try:
        best = read_json(root / BEST)
        found = {"step": int(best["step"]), "metric": str(best["metric"]), "value": float(best["value"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if iteration_dir(root, int(best["step"])).is_dir() else None


def abandon(root: Path, step: int) -> None:
    """Remove the temporary directory of a save that failed."""
    shutil.rmtree(temporary_dir(root, step), ignore_errors=True)


def withdraw(root: Path, step: int) -> None:
    """Remove every trace of ``step``, the only checkpoint of ``root``, published or not."""
    abandon(root, step)
    if iteration_dir(root, step).exists():
        _hide(iteration_dir(root, step))
        sweep(root)
    for name in (TRACKER, f".{TRACKER}.partial"):
        (root / name).unlink(missing_ok=True)


def retire(root: Path, *, keep: int) -> None:
    """Hide all but the ``keep`` newest checkpoints up to the tracker's, which always stays, and the best. 0 keeps all."""
    latest = tracked_step(root)
    if keep <= 0 or latest is None:
        return
    best = best_checkpoint(root)
    for step in [step for step in sorted(steps(root), reverse=True) if step <= latest][max(keep, 1) :]:
        if best is None or step != best["step"]:
            _hide(iteration_dir(root, step))


def sweep(root: Path) -> None:
    """Delete what is hidden, from this run or a dead one."""
    for hidden in root.glob(".old_iter_*"):
        shutil.rmtree(hidden, ignore_errors=True)


def steps(root: Path) -> list[int]:
    """Steps that have a checkpoint directory."""
    return [int(path.name[5:]) for path in root.glob("iter_*") if path.is_dir() and path.name[5:].isdigit()]


def tracked_step(root: Path) -> int | None:
    """The step that the tracker names; None when there is no tracker or it is damaged."""
    try:
        return int((root / TRACKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def sha256(path: Path, *, moved: Callable[[], None] = lambda: None) -> str:
    """Hex digest of a file; ``moved`` is called for every piece of it."""
    digest, buffer = hashlib.sha256(), bytearray(HASHED_AT_ONCE)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
            moved()
    return digest.hexdigest()


def hash_files(directory: Path, names: Sequence[str]) -> dict[str, str]:
    """SHA-256 of files in ``directory`` by name."""
    return {name: sha256(directory / name) for name in names}


def find(path: Path, *, hashed: HashFiles = hash_files) -> Path | None:
    """The newest whole checkpoint at ``path``: a run directory, its ``checkpoints``, or one checkpoint itself.

    The tracker bounds the search, so that writing an older step into it rolls a run back. ``hashed`` computes the digests
    that are compared. Raises CheckpointError when there are checkpoints and none is whole.
    """
    if (path / MANIFEST).is_file() or path.name.startswith("iter_"):
        check(path, hashed=hashed)
        return path
    root = path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path
    candidates = sorted(steps(root), reverse=True)
    latest = tracked_step(root)
    if latest is not None:
        candidates = [step for step in candidates if step <= latest]
    elif candidates:
        logger.warning("%s is missing or damaged; taking the newest whole checkpoint", root / TRACKER)
    for step in candidates:
        try:
            check(iteration_dir(root, step), hashed=hashed)
            return iteration_dir(root, step)
        except CheckpointError as error:
            logger.warning("passing over a damaged checkpoint: %s", error)
    if candidates or latest is not None:
        raise CheckpointError(f"{root}: no checkpoint is whole; restore one from a copy, or start a new run_dir")
    return None


def nothing_at(path: Path) -> str:
    """What to tell somebody who named ``path``, where :func:`find` found nothing."""
    if (path / "config.json").is_file():
        return (
            f"{path}: is a Hugging Face directory; make a checkpoint of it first: "
            f"megatron-omni convert import --hf {path} --out DIR"
        )
    return f"{path}: no checkpoint there; give a run directory or one of its checkpoints/iter_*"


def write_manifest(directory: Path, *, digests: dict[str, str] | None = None) -> None:
    """Write SHA-256 of every file below ``directory``; ``digests`` are those that are known already."""
    known = digests or {}
    files = {name: known.get(name) or sha256(directory / name) for name in _files(directory)}
    write_text(directory / MANIFEST, _manifest_text(files))


def _manifest_text(files: dict[str, str]) -> str:
    return json.dumps({"algorithm": "sha256", "files": files}, indent=1)


def check(directory: Path, *, hashed: HashFiles = hash_files) -> None:
    """Raise CheckpointError, naming the file, unless every file of the manifest is there and has its hash."""
    try:
        text = (directory / MANIFEST).read_text(encoding="utf-8")
        recorded = dict(parse_json(text, MANIFEST)["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{directory / MANIFEST}: missing or unreadable ({error}); not a whole checkpoint"
        ) from error
    if text != _manifest_text(recorded):
        raise CheckpointError(f"{directory / MANIFEST}: not as it was written; not a whole checkpoint")
    present = set(_files(directory))
    if missing := set(recorded) - present:
        raise CheckpointError(f"{directory / min(missing)}: missing from the checkpoint")
    if extra := present - set(recorded):
        raise CheckpointError(f"{directory / min(extra)}: a file that the manifest does not list")
    found = hashed(directory, list(recorded))
    for name, digest in recorded.items():
        if found[name] != digest:
            raise CheckpointError(f"{directory / name}: contents do not match the manifest")


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` by ``text``: a reader sees the old contents or the new ones."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """The same with ``data``."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    _flush_directory(path.parent)


def _files(directory: Path) -> Iterator[str]:
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            yield path.relative_to(directory).as_posix()


def flush_tree(directory: Path) -> None:
    """Flush every file and directory below ``directory`` to disk."""
    for path in directory.rglob("*"):
        if path.is_dir():
            _flush_directory(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())
    _flush_directory(directory)


def _flush_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _hide(directory: Path) -> None:
    """Take a checkpoint away in one step, for :func:`sweep` to delete: half a checkpoint is never visible."""
    hidden = directory.with_name(f".old_{directory.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    os.rename(directory, hidden)
