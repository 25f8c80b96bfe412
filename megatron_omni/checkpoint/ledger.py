"""``conversion.json``: what every conversion leaves behind, and how it is checked again.

    command, layout, dtype     what was asked
    parts                      family and options of every source: what export needs to write the same names; whether
                               it is a path (not drawn, not upcycled)
    sources                    every file read: path, size, SHA-256
    tensors                    every tensor of ours (or expert's share): keys it was made of, their dtypes, transform,
                               dtype, shape, SHA-256 of its bytes
    carried, twins             the keys that fill nothing: kept beside (with dtype, shape, SHA-256), equal to another
    appended_tokens            special tokens that the tokenizer lacked: nobody has trained their rows
    outputs                    of an export: every file that it wrote, with SHA-256
    checksum                   SHA-256 of this file, with zeros in its place

``verify`` reads every tensor back and compares it with its line; given the sources, it makes every tensor again from
them. A recorded first-step loss lies beside the checkpoint (``iter_0000000.loss.json``), since it is measured later.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_omni.checkpoint.commit import (
    CHECKPOINTS,
    MANIFEST,
    CheckpointError,
    iteration_dir,
    tracked_step,
    write_text,
)
from megatron_omni.checkpoint.names import Entry
from megatron_omni.checkpoint.sources import read_json
from megatron_omni.checkpoint.tensor_files import DTYPES, ConversionError, tensor_bytes
from megatron_omni.foreign import parse_json

LEDGER = "conversion.json"
FORMAT = 1
NO_CHECKSUM = "0" * 64

TENSOR: dict[str, type] = {"key": str, "dtype": str, "shape": list, "sha256": str}
LINES: dict[str, dict[str, type]] = {
    "parts": {"family": str, "source": str, "options": dict},
    "sources": {"file": str, "sha256": str},
    "tensors": TENSOR,
    "carried": {**TENSOR, "as": str},
    "outputs": {"file": str, "sha256": str},
}
"""Fields that reading a ledger relies on."""
DTYPES_BY_NAME = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}

logger = logging.getLogger(__name__)


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 of the bytes of a contiguous tensor."""
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()


def tensor_line(
    entry: Entry, tensor: Tensor, *, digest: str, source: str, source_dtypes: Iterable[torch.dtype]
) -> dict[str, Any]:
    """The ledger's line of one tensor."""
    line: dict[str, Any] = {
        "key": entry.ours,
        "source": source,
        "from": list(entry.theirs),
        "from_dtype": sorted({dtype_name(dtype) for dtype in source_dtypes}),
        "transform": str(entry.transform),
        "dtype": dtype_name(tensor.dtype),
        "shape": list(tensor.shape),
        "sha256": digest,
    }
    return line if entry.expert is None else {**line, "expert": entry.expert}


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16`` of ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def read_ledger(directory: Path) -> dict[str, Any] | None:
    """The ledger in ``directory``; None where there is none. ConversionError for one that is damaged."""
    path = directory / LEDGER
    if not path.is_file():
        return None
    ledger = read_json(path)
    if ledger.get("format") != FORMAT:
        raise ConversionError(f"{path}: expected a ledger of format {FORMAT}, found format {ledger.get('format')!r}")
    tokens = ledger.get("appended_tokens", {})
    if not isinstance(tokens, dict) or not all(isinstance(number, int) for number in tokens.values()):
        raise ConversionError(f"{path}: appended_tokens: damaged: expected a table of names to ids, found {tokens!r}")
    lists = ("parts", "sources", "tensors", "outputs" if ledger.get("command") == "export" else "carried")
    for name in lists:
        check_fields(ledger.get(name), LINES[name], where=f"{path}: {name}")
    for line in (*ledger["tensors"], *ledger.get("carried", ())):
        named = [line["dtype"], *line.get("from_dtype", ())]
        if wrong := [name for name in named if name not in DTYPES_BY_NAME]:
            raise ConversionError(f"{path}: damaged: {line['key']!r}: expected a type of tensors, found {wrong[0]!r}")
    return ledger


def check_fields(lines: Any, fields: Mapping[str, type], *, where: str) -> None:
    """ConversionError unless ``lines`` is a list of tables that have these ``fields``."""
    if not isinstance(lines, list):
        raise ConversionError(f"{where}: damaged: expected a list, found {type(lines).__name__}; convert again")
    for number, line in enumerate(lines):
        for name, kind in fields.items():
            found = line.get(name) if isinstance(line, dict) else None
            if not isinstance(found, kind):
                raise ConversionError(
                    f"{where}[{number}]: damaged: expected {name!r}, a {kind.__name__}, found {found!r}; convert again"
                )


def write_ledger(directory: Path, ledger: dict[str, Any]) -> None:
    """Write ``conversion.json``."""
    text = json.dumps({"format": FORMAT, "checksum": NO_CHECKSUM, **ledger}, indent=1)
    write_text(directory / LEDGER, text.replace(NO_CHECKSUM, hashlib.sha256(text.encode()).hexdigest()))


def check_ledger(directory: Path) -> None:
    """CheckpointError unless the readable ledger in ``directory`` is, to the bit, the one that was written."""
    text = (directory / LEDGER).read_text(encoding="utf-8")
    found = str(parse_json(text, str(directory / LEDGER)).get("checksum"))
    digest = hashlib.sha256(text.replace(found, NO_CHECKSUM).encode()).hexdigest()
    if digest != found:
        raise CheckpointError(
            f"{directory / LEDGER}: contents do not match its checksum: expected {found}, found {digest}"
        )


def check_lines(
    lines: Iterable[dict[str, Any]], read: Callable[[str, int | None], Tensor], *, where: Path
) -> Iterable[int]:
    """Compare what ``read(key, expert)`` gives with each line; yields the bytes of each tensor that agrees."""
    for line in lines:
        key, expert = line["key"], line.get("expert")
        tensor = read(key, expert)
        found = (dtype_name(tensor.dtype), list(tensor.shape))
        if found != (line["dtype"], line["shape"]):
            raise CheckpointError(f"{where}: {key!r}: the ledger says {line['dtype']} {line['shape']}, found {found}")
        if tensor_digest(tensor.contiguous()) != line["sha256"]:
            raise CheckpointError(f"{where}: {key!r}: its contents are not those of the ledger")
        yield tensor.numel() * tensor.element_size()


# ------------------------------------------------------------------------------------------------ first-step loss


def loss_file(directory: Path) -> Path:
    """Where the recorded loss of the checkpoint ``directory`` lies."""
    return directory.with_name(f"{directory.name}.loss.json")


def record_loss(directory: Path, *, loss: float, recipe: dict[str, Any]) -> None:
    """Keep the first-step ``loss`` of a run that starts from ``directory``; ``recipe``: what the loss depends on."""
    said = {"lm loss": loss, "checkpoint": _identity(directory), "recipe": recipe}
    write_text(loss_file(directory), json.dumps(said, indent=1))


def recorded_loss(directory: Path) -> float | None:
    """The loss that was recorded; None where none was, or another checkpoint lay here when it was."""
    path = loss_file(directory)
    if not path.is_file():
        return None
    said = read_json(path)
    if said.get("checkpoint") != _identity(directory):
        logger.warning("%s: was recorded with another checkpoint than %s; record it again", path, directory)
        return None
    return float(said["lm loss"])


def _identity(directory: Path) -> str:
    """SHA-256 of the manifest, which holds that of every file."""
    return hashlib.sha256((directory / MANIFEST).read_bytes()).hexdigest()


def converted_directory(path: Path) -> Path:
    """The checkpoint directory that ``path`` (an imported directory or the checkpoint itself) stands for, unverified."""
    root = path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path
    step = tracked_step(root)
    return path if step is None else iteration_dir(root, step)
