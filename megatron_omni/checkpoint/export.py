"""Our checkpoints to Hugging Face directories, one tensor at a time: safetensors shards, ``config.json``, tokenizer, ledger.

Weights are read from the distributed checkpoint block by block, whatever layout wrote it. The checkpoint's manifest is
verified while it is read; the directory gets its name only when every file agreed.
"""

import itertools
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_omni.checkpoint import commit
from megatron_omni.checkpoint.ahead import made_ahead
from megatron_omni.checkpoint.commit import CheckpointError
from megatron_omni.checkpoint.convert import CARRIED, DOCUMENTS, DTYPES, RUN_CONFIG, check_space, disk_errors
from megatron_omni.checkpoint.export_documents import write_documents
from megatron_omni.checkpoint.families import FAMILIES, is_foreign, their_name
from megatron_omni.checkpoint.ledger import DTYPES_BY_NAME, dtype_name, read_ledger, tensor_digest, write_ledger
from megatron_omni.checkpoint.merged import open_reader
from megatron_omni.checkpoint.names import Entry, expand
from megatron_omni.checkpoint.plan import listed
from megatron_omni.checkpoint.progress import ByteProgress
from megatron_omni.checkpoint.sources import Digests, read_json
from megatron_omni.checkpoint.tensor_files import ConversionError, SafetensorsWriter, read_header, read_tensor
from megatron_omni.checkpoint.torch_dist import TorchDistReader
from megatron_omni.checkpoint.uni_moe_image import NULLS_APART
from megatron_omni.checkpoint.uni_moe_loader import other_arithmetic, other_drawing
from megatron_omni.checkpoint.uni_moe_speech import released_arithmetic
from megatron_omni.config.load import load_recipe
from megatron_omni.config.run import Recipe

OTHER_ARITHMETIC = (
    "the released code computes something else than this model was trained with; this code base reads the settings back "
    "from config.json, other loaders of the directory do not:"
)
MAX_SHARD_BYTES = 5_000_000_000
OPTIMIZER = "optimizer."
"""Keys of a training checkpoint that are no weights."""

logger = logging.getLogger(__name__)


@dataclass
class Opened:
    """A checkpoint of ours to read: its recipe, tensors, and what conversion left beside them."""

    directory: Path
    origin: Path
    """Where ledger, carried weights and documents lie: ``directory``, or the checkpoint that a trained one descends from."""
    recipe: Recipe
    reader: TorchDistReader
    ledger: dict[str, Any]
    carried: dict[str, Any] = field(default_factory=dict)
    """Carried weights by our name."""
    documents: Path | None = None

    def options(self, family: str) -> dict[str, str]:
        """Options of the rows of that family: those of the source that was imported, and what the checkpoint itself lacks."""
        found = next((dict(p["options"]) for p in self.ledger.get("parts", []) if p["family"] == family), {})
        found.pop(NULLS_APART, None)  # they are here now
        if family == "image_gen" and not any(key.startswith("image.caption.") for key in self.reader.tensors):
            found["projectors"] = "none"
        return found

    def source_dtypes(self) -> dict[tuple[str, int | None], torch.dtype]:
        """What each tensor was before import, where all its parts agreed."""
        return {
            (line["key"], line.get("expert")): DTYPES_BY_NAME[line["from_dtype"][0]]
            for line in self.ledger.get("tensors", [])
            if len(line.get("from_dtype", [])) == 1
        }


def open_ours(path: Path, *, like: Path | None = None, check: bool = False) -> Opened:
    """The newest checkpoint at ``path`` (a run, an imported directory, one checkpoint).

    ``like``: the imported checkpoint that a trained one descends from; its ledger, carried weights and documents stand
    in. ``check``: verify the manifest first (export does so while it reads).
    """
    directory = find_directory(path, check=check)
    origin = directory if like is None else find_directory(like, check=True)
    recipe = load_recipe(directory / RUN_CONFIG)
    carried = read_header(origin / CARRIED) if (origin / CARRIED).is_file() else {}
    documents = origin / DOCUMENTS
    return Opened(
        directory=directory,
        origin=origin,
        recipe=recipe,
        reader=open_reader(directory, recipe.model.lora),
        ledger=read_ledger(origin) or {},
        carried=dict(carried),
        documents=documents if documents.is_dir() else None,
    )


def find_directory(path: Path, *, check: bool) -> Path:
    """The checkpoint directory at ``path``; ConversionError when there is none."""
    if not check and (path / commit.MANIFEST).is_file():
        return path
    root = path / commit.CHECKPOINTS if (path / commit.CHECKPOINTS).is_dir() else path
    step = commit.tracked_step(root)
    if not check and step is not None and commit.iteration_dir(root, step).is_dir():
        return commit.iteration_dir(root, step)
    found = commit.find(path)
    if found is None:
        raise ConversionError(commit.nothing_at(path))
    return found


def default_family(opened: Opened) -> str:
    """Dense text models are Qwen2.5 directories; everything larger has the whole model's layout."""
    parts = [part["family"] for part in opened.ledger.get("parts", [])]
    if len(parts) == 1 and not any(key.startswith("language.") for key in opened.reader.tensors):
        return parts[0]
    model = opened.recipe.model
    if model.image is not None and not any(key.startswith("language.") for key in opened.reader.tensors):
        return "image_gen"
    if model.speech is not None:
        return "speech_gen"
    is_text = model.moe is None and model.vision is None and model.audio is None and model.image is None
    return "qwen2" if is_text else "uni_moe"


def export_checkpoint(
    opened: Opened,
    out: Path,
    *,
    family: str | None = None,
    dtype: str = "auto",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Write the Hugging Face directory ``out``: weights, ``config.json``, tokenizer, ledger.

    ``dtype`` ``auto`` is what each tensor was before import, else as stored. ConversionError for a checkpoint that lacks
    a weight of the family.
    """
    family = family or default_family(opened)
    if out.exists():
        raise ConversionError(f"{out}: exists already; choose another --out or remove it")
    if family == "uni_moe" and (other := other_arithmetic(opened.recipe.model, opened.recipe.data)):
        logger.warning("%s", "\n  - ".join([OTHER_ARITHMETIC, *other]))
    if family == "image_gen" and (other := other_drawing(opened.recipe.model)):
        logger.warning("%s", "\n  - ".join([OTHER_ARITHMETIC, *other]))
    if family == "speech_gen" and (other := released_arithmetic(opened.recipe.model)):
        logger.warning("%s", "\n  - ".join([OTHER_ARITHMETIC, *other]))
    writes = _export_plan(opened, family, dtype)
    files = _shards(writes, max_shard_bytes)
    total = sum(w.num_bytes for w in writes)
    check_space(out, total)
    manifest = _manifest(opened.directory)
    digests = Digests(opened.directory / name for name in manifest)
    temporary = out.with_name(f".tmp_{out.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary.mkdir()
    try:
        with disk_errors(out):
            outputs, lines = _write_shards(temporary, opened, files, digests)
            if len(files) > 1:
                index = {
                    "metadata": {"total_size": total},
                    "weight_map": {w.key: name for name, group in files.items() for w in group},
                }
                commit.write_text(temporary / "model.safetensors.index.json", json.dumps(index, indent=1))
            write_documents(
                temporary,
                checkpoint=opened.directory,
                documents=opened.documents,
                recipe=opened.recipe,
                family=family,
                dtype=dtype_name(writes[0].dtype),
            )
            others = sorted(file for file in temporary.iterdir() if file.name not in outputs)
            outputs |= {file.name: digest for file, digest in Digests(others).result().items()}
            _compare_manifest(opened.directory, manifest, digests.result())
            places = {"source": str(opened.directory.absolute())}
            if opened.origin != opened.directory:
                places["like"] = str(opened.origin.absolute())
            ledger = {
                "command": "export",
                "parts": [{"family": family, "options": opened.options(family), **places}],
                "sources": [{"file": name, "sha256": digest} for name, digest in source_digests(opened).items()],
                "outputs": [{"file": name, "sha256": digest} for name, digest in outputs.items()],
                "tensors": lines,
            }
            write_ledger(temporary, ledger)
            commit.flush_tree(temporary)
            os.rename(temporary, out)
            return out
    except BaseException:
        digests.stop()
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@dataclass(frozen=True)
class _Write:
    """One tensor of theirs: part ``part`` of ``entry``, or a carried one, or a filler of zeros or ones."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    entry: Entry | None = None
    part: int = 0
    carried: str | None = None

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def _export_plan(opened: Opened, family: str, dtype: str) -> list[_Write]:
    """Everything that is written, in order; entries' parts stay together."""
    known, options = FAMILIES[family], opened.options(family)
    stored, before = opened.reader.tensors, opened.source_dtypes()
    writes, problems = [], []
    entries = expand(known.rows(opened.recipe.model, options))
    for entry in entries:
        found = stored.get(entry.ours)
        if found is None:
            problems.append(f"nothing fills {', '.join(entry.theirs)}: the checkpoint has no {entry.ours!r}")
        elif found.shape != entry.global_shape:
            problems.append(f"{entry.ours!r}: expected shape {list(entry.global_shape)}, found {list(found.shape)}")
        elif not entry.theirs:  # theirs does without: it must be what theirs computes
            entry.transform.to_theirs(opened.reader.read(entry.ours))
        else:
            kind = before.get((entry.ours, entry.expert), found.dtype) if dtype == "auto" else DTYPES[dtype]
            writes += [
                _Write(key, kind, shape, entry, part)
                for part, (key, shape) in enumerate(zip(entry.theirs, entry.shapes))
            ]
    if problems:
        raise ConversionError(listed(f"{opened.directory}: not a {family} model:", problems))
    _check_left_out(opened, family, {entry.ours for entry in entries})
    return writes + _export_carried(opened, family, options)


def _check_left_out(opened: Opened, family: str, written: set[str]) -> None:
    """ConversionError for weights that the layout has no place for; a warning where the user chose a smaller layout."""
    left = sorted(key for key in opened.reader.tensors if key not in written and not key.startswith(OPTIMIZER))
    if left and family == default_family(opened):
        raise ConversionError(listed(f"{opened.directory}: a {family} directory has no place for:", left))
    if left:
        logger.warning("%s", listed(f"left out, since a {family} directory has no place for them:", left))


def _export_carried(opened: Opened, family: str, options: dict[str, str]) -> list[_Write]:
    """Carried weights that came from this layout; where it always has some, those, and a filler for what is missing."""
    there = {their_name(family, options, name): name for name in opened.carried}
    wanted = FAMILIES[family].wants
    if wanted is None:
        expected = [line["key"] for line in opened.ledger.get("carried", []) if line["as"] in opened.carried]
        keys = [key for key in there if key is not None and key in expected]
        return [_carried_write(opened, key, there[key]) for key in keys]
    writes = []
    for key, shape in wanted(opened.recipe.model).items():
        if key in there:
            writes.append(_carried_write(opened, key, there[key]))
        else:
            logger.warning("%s: the checkpoint carries none; a filler that nothing reads is written", key)
            writes.append(_Write(key, torch.bfloat16, shape))
    others = {key: name for key, name in there.items() if key is not None and is_foreign(family, name)}
    return writes + [_carried_write(opened, key, name) for key, name in others.items()]


def _carried_write(opened: Opened, key: str, name: str) -> _Write:
    return _Write(key, opened.carried[name].dtype, opened.carried[name].shape, carried=name)


def source_digests(opened: Opened) -> dict[str, str]:
    """SHA-256 of what an export reads, as the manifests say: files of the checkpoint, carried weights of another one."""
    digests = _manifest(opened.directory)
    if opened.carried and opened.origin != opened.directory:
        digests[str(opened.origin.absolute() / CARRIED)] = _manifest(opened.origin)[CARRIED]
    return digests


def made_again(opened: Opened, family: str, dtypes: Mapping[str, torch.dtype]) -> Iterator[tuple[str, Tensor]]:
    """(key, tensor) of everything that an export of ``opened`` with these ``dtypes`` holds."""
    plan = [replace(write, dtype=dtypes.get(write.key, write.dtype)) for write in _export_plan(opened, family, "auto")]
    for group in _groups(plan):
        yield from zip((write.key for write in group), _made(group, opened))


def _groups(writes: Sequence[_Write]) -> list[list[_Write]]:
    """The parts of an entry are made of one tensor, which is read once."""
    return [list(group) for _, group in itertools.groupby(writes, key=lambda w: id(w.entry) if w.entry else w.key)]


def _shards(writes: Sequence[_Write], limit: int) -> dict[str, list[_Write]]:
    """File name -> tensors, in order; the parts of one entry may lie in two files."""
    groups: list[list[_Write]] = [[]]
    size = 0
    for write in writes:
        if groups[-1] and size + write.num_bytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(write)
        size += write.num_bytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups)}


def _write_shards(
    directory: Path, opened: Opened, files: dict[str, list[_Write]], digests: Digests
) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """SHA-256 of every file, and the ledger's line of each tensor."""
    writes = [write for group in files.values() for write in group]
    progress, hasher = ByteProgress("export", sum(write.num_bytes for write in writes)), ThreadPoolExecutor(1)
    outputs, lines = {}, []
    try:
        with made_ahead(lambda group: _made(group, opened), _groups(writes)) as made:
            tensors = (pair for group, parts in made for pair in zip(group, parts))
            for name, group in files.items():
                writer = SafetensorsWriter(directory / name, [(w.key, w.dtype, w.shape) for w in group])
                try:
                    for write, tensor in itertools.islice(tensors, len(group)):
                        digest = hasher.submit(tensor_digest, tensor)
                        writer.write(write.key, tensor)
                        lines.append(_export_line(write, digest.result()))
                        progress.add(write.num_bytes)
                        digests.follow(progress.done / max(1, progress.total))
                    outputs[name] = writer.finish()
                except BaseException:
                    writer.close()
                    raise
        progress.finish()
        return outputs, lines
    finally:
        hasher.shutdown()


def _made(group: Sequence[_Write], opened: Opened) -> list[Tensor]:
    """What ``group`` writes, which is one carried tensor, one filler, or parts of one entry."""
    entry = group[0].entry
    if entry is None:
        return [_rounded(write, _unused(write, opened)).contiguous() for write in group]
    parts = entry.transform.to_theirs(opened.reader.read(entry.ours, index=entry.expert))
    return [_rounded(write, parts[write.part]).contiguous() for write in group]


def _rounded(write: _Write, tensor: Tensor) -> Tensor:
    """``tensor`` in the type that is written; ConversionError where its values lie beyond that type's range (fp16)."""
    rounded = tensor.to(write.dtype)
    if rounded.dtype != tensor.dtype and tensor.numel():
        low, high = (float(bound) for bound in torch.aminmax(tensor))
        limit = torch.finfo(write.dtype).max
        if not -limit <= low <= high <= limit:
            raise ConversionError(
                f"{write.key!r}: expected values that {dtype_name(write.dtype)} can hold, found {low:.3g} to {high:.3g}; "
                "choose --dtype bf16 or fp32"
            )
    return rounded


def _unused(write: _Write, opened: Opened) -> Tensor:
    if write.carried is not None:
        return read_tensor(opened.carried[write.carried])
    fill = torch.ones if write.key.endswith("norm.weight") else torch.zeros
    return fill(write.shape, dtype=write.dtype)


def _export_line(write: _Write, digest: str) -> dict[str, Any]:
    entry = write.entry
    origin = [entry.ours] if entry is not None else [write.carried] if write.carried else []
    line = {
        "key": write.key,
        "from": origin,
        "transform": f"part {write.part} of the inverse of {entry.transform}" if entry is not None else "Identity()",
        "dtype": dtype_name(write.dtype),
        "shape": list(write.shape),
        "sha256": digest,
    }
    return line if entry is None or entry.expert is None else {**line, "from_expert": entry.expert}


def _manifest(directory: Path) -> dict[str, str]:
    files = read_json(directory / commit.MANIFEST).get("files")
    if not isinstance(files, dict) or not files:
        raise CheckpointError(f"{directory / commit.MANIFEST}: damaged: expected a table 'files', found {files!r}")
    return files


def _compare_manifest(directory: Path, manifest: dict[str, str], found: dict[Path, str]) -> None:
    for name, digest in manifest.items():
        if found[directory / name] != digest:
            raise CheckpointError(f"{directory / name}: contents do not match the manifest; restore it from a copy")
