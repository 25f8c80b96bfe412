"""Hugging Face checkpoints to our distributed checkpoints and back, one tensor at a time.

    import   sources -> plan (every key, every shape) -> tensors of ours -> blocks of the layout -> checkpoint + ledger
    export   checkpoint -> tensors of theirs -> sharded safetensors, config.json, tokenizer + ledger

What is held in memory is one tensor (an expert's share where there are experts) and its parts. Output appears under its
name only when it is whole: it is written into a hidden directory, which a failure or Ctrl-C removes, and which the next
attempt removes if the process was killed; every attempt starts clean.
"""

import errno
import gc
import logging
import math
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_omni.checkpoint import commit
from megatron_omni.checkpoint.ahead import made_ahead
from megatron_omni.checkpoint.commit import CheckpointError
from megatron_omni.checkpoint.families import Part, carried_name
from megatron_omni.checkpoint.layout import Layout, blocks, check_layout
from megatron_omni.checkpoint.ledger import dtype_name, tensor_digest, tensor_line, write_ledger
from megatron_omni.checkpoint.names import Row, expand
from megatron_omni.checkpoint.plan import Job, Plan, make_plan
from megatron_omni.checkpoint.progress import ByteProgress
from megatron_omni.checkpoint.sources import Digests, HuggingFaceSource, check_finite
from megatron_omni.checkpoint.tensor_files import ConversionError, SafetensorsWriter
from megatron_omni.checkpoint.tokenizer_files import copy_tokenizer, read_vocabulary
from megatron_omni.checkpoint.torch_dist import COMMON_STATE, TorchDistWriter
from megatron_omni.checkpoint.uni_moe import GENERATORS
from megatron_omni.config.load import recipe_to_yaml
from megatron_omni.config.model import ModelConfig
from megatron_omni.config.run import Recipe

CARRIED = "carried.safetensors"
DOCUMENTS = "hf"
RUN_CONFIG, TOKENIZER = "run_config.yaml", "tokenizer"

EXTRA_STATE = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

logger = logging.getLogger(__name__)


# ------------------------------------------------------------------------------------------------ import


def import_checkpoint(
    parts: Sequence[Part],
    recipe: Recipe,
    out: Path,
    *,
    wanted: Sequence[Row],
    layout: Layout | None = None,
    dtype: str = "auto",
    tokenizer: Path | None = None,
    command: str = "import",
    finishing: Callable[[Path, dict[str, Any]], None] | None = None,
) -> Path:
    """Write ``out/checkpoints/iter_0000000``, which ``init_from=out`` loads at any layout; the directory.

    ``recipe.model`` describes the model, ``wanted`` its rows, all of which ``parts`` must fill. ``dtype``: ``bf16``,
    ``fp32``, or ``auto`` (bf16 where every source is, else fp32: no value is rounded). ``finishing(directory, ledger)``
    may add files before the checkpoint becomes visible. ConversionError for sources that do not fit, CheckpointError for
    a disk that cannot take the result.
    """
    layout = layout if layout is not None else Layout()
    plan = make_plan(parts, wanted)
    if any(entry.ours.startswith("language.") for entry in expand(wanted)):
        check_layout(layout, recipe.model)
    target = _target_dtype(plan, dtype)
    _note_rounding(plan, target)
    _note_generators(plan)
    root = out / commit.CHECKPOINTS
    if commit.steps(root) or commit.tracked_step(root) is not None:  # a tracker that said 0 would roll a run back
        raise ConversionError(f"{out}: holds a checkpoint already; choose another --out or remove it")
    recipe.optim.precision = "bf16" if target == torch.bfloat16 else "fp32"
    vocabulary = read_vocabulary(tokenizer) if tokenizer is not None else None
    speech = recipe.model.speech
    num_rows = recipe.model.vocab_size if speech is None else speech.text_vocab_size
    if vocabulary is not None and vocabulary.size > num_rows:
        raise ConversionError(
            f"{vocabulary.path}: has {vocabulary.size} ids with the special tokens of this model, and the embedding has "
            f"{num_rows} rows; add rows where the weights come from (transformers: "
            f"model.resize_token_embeddings({vocabulary.size}), then save_pretrained)"
        )
    size = sum(math.prod(job.entry.shape) * target.itemsize for job in plan.jobs)
    check_space(out, size + sum(part.source.infos()[key].num_bytes for part, key in plan.carried))
    digests = Digests(file for part in parts for file in part.source.files())
    made = [place for place in (root, out) if not place.exists()]
    directory = commit.begin(root, 0)
    try:
        with disk_errors(out):
            progress = ByteProgress(command, plan.num_bytes())
            known, lines = _write_tensors(directory, plan, layout, target, recipe.model, digests, progress)
            files, carried = _write_carried(directory, plan, progress)
            known |= files
            progress.finish()
            _check_twins(plan)
            _write_documents(directory, parts, recipe, tokenizer)
            sources = [{"file": str(p), "bytes": p.stat().st_size, "sha256": d} for p, d in digests.result().items()]
            ledger = {
                "command": command,
                "layout": vars(layout),
                "dtype": dtype_name(target),
                "parts": [_said(part) for part in parts],
                "sources": sources,
                "tensors": lines,
                "carried": carried,
                "twins": [{"key": key, "equal_to": other} for _, key, other in plan.twins],
                "appended_tokens": vocabulary.appended if vocabulary is not None and speech is None else {},
            }
            write_ledger(directory, ledger)
            if finishing is not None:
                finishing(directory, ledger)
            return commit.publish(root, 0, keep=0, digests=known)
    except BaseException:
        digests.stop()
        commit.withdraw(root, 0)
        for place in made:
            with suppress(OSError):  # somebody else's file is in it
                place.rmdir()
        raise


def _write_tensors(
    directory: Path,
    plan: Plan,
    layout: Layout,
    target: torch.dtype,
    model: ModelConfig,
    digests: Digests,
    progress: ByteProgress,
) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Every block of the layout; SHA-256 of the files and the ledger's lines."""
    writer, lines, hasher = TorchDistWriter(directory), [], ThreadPoolExecutor(1)
    try:
        writer.write_object(COMMON_STATE, [{}])
        with made_ahead(lambda job: _made(job, target), plan.jobs) as made:
            for job, tensor in made:
                entry, infos = job.entry, job.part.source.infos()
                digest = hasher.submit(tensor_digest, tensor)
                for block, offsets, rank in blocks(entry, tensor, layout=layout, num_layers=model.num_layers):
                    writer.write(entry.ours, block, shape=entry.global_shape, offsets=offsets, rank=rank)
                for module in EXTRA_STATE:  # Megatron's linear layers ask for it; without fp8 it is empty
                    if entry.ours.endswith(f"{module}.weight"):
                        writer.write_object(f"{entry.ours.removesuffix('weight')}_extra_state/shard_0_1", [None])
                if entry.ours == "language.decoder.final_norm.weight":
                    writer.write_object("language.output_layer._extra_state/shard_0_1", [None])
                dtypes = [infos[key].dtype for key in entry.theirs]
                lines.append(
                    tensor_line(
                        entry, tensor, digest=digest.result(), source=job.part.source.label, source_dtypes=dtypes
                    )
                )
                del tensor, block
                progress.add(sum(infos[key].num_bytes for key in entry.theirs))
                digests.follow(progress.done / max(1, progress.total))
        return writer.finish(), lines
    except BaseException:
        writer.close()
        raise
    finally:
        hasher.shutdown()


def _made(job: Job, target: torch.dtype) -> Tensor:
    """Our tensor of a job, contiguous; ConversionError where a part of it is not finite before or after rounding."""
    infos, parts = job.part.source.infos(), []
    for key in job.entry.theirs:
        part = job.part.source.read(key)
        check_finite(part, infos[key])
        parts.append(part.to(target))
        if target.itemsize < part.dtype.itemsize:
            check_finite(parts[-1], infos[key])
        del part
    return job.entry.transform.to_ours(parts).to(target).contiguous()


def _said(part: Part) -> dict[str, Any]:
    """The ledger's line of a source; ``is_path`` where ``source`` is the place that it can be read from again."""
    is_path = isinstance(part.source, HuggingFaceSource)
    return {"family": part.family, "source": part.source.label, "is_path": is_path, "options": part.options}


def _write_carried(directory: Path, plan: Plan, progress: ByteProgress) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """SHA-256 of the file of carried weights, and the ledger's line of each."""
    lines: list[dict[str, Any]] = []
    if not plan.carried:
        return {}, lines
    infos = [(carried_name(p.family, p.options, key), p.source.infos()[key]) for p, key in plan.carried]
    writer = SafetensorsWriter(directory / CARRIED, [(name, info.dtype, info.shape) for name, info in infos])
    try:
        for (part, key), (name, info) in zip(plan.carried, infos):
            tensor = part.source.read(key).contiguous()
            writer.write(name, tensor)
            said = {"dtype": dtype_name(info.dtype), "shape": list(info.shape), "sha256": tensor_digest(tensor)}
            lines.append({"key": key, "source": part.source.label, "as": name, **said})
            progress.add(info.num_bytes)
        return {CARRIED: writer.finish()}, lines
    except BaseException:
        writer.close()
        raise


def _check_twins(plan: Plan) -> None:
    for part, key, other in plan.twins:
        first, second = part.source.read(key), part.source.read(other)
        if first.dtype != second.dtype or not torch.equal(first, second):
            raise ConversionError(
                f"{part.source.infos()[key].path}: {key!r}: expected the values of {other!r}, to which config.json ties "
                "it, found others; set tie_word_embeddings to false there if both matrices are meant"
            )


def _write_documents(directory: Path, parts: Sequence[Part], recipe: Recipe, tokenizer: Path | None) -> None:
    for part in parts:
        for file in part.source.files():
            if file.suffix == ".json":
                folder = directory / DOCUMENTS / part.family
                folder.mkdir(parents=True, exist_ok=True)
                for name in ("config.json", "generation_config.json", "preprocessor_config.json"):
                    if (file.parent / name).is_file():
                        shutil.copyfile(file.parent / name, folder / name)
    if tokenizer is not None:
        copy_tokenizer(tokenizer, directory / TOKENIZER)
    recipe.data.tokenizer = TOKENIZER
    commit.write_text(directory / RUN_CONFIG, recipe_to_yaml(recipe))


def _target_dtype(plan: Plan, dtype: str) -> torch.dtype:
    if dtype != "auto":
        return DTYPES[dtype]
    found = plan.dtypes()
    if torch.float64 in found:
        raise ConversionError(
            "a source holds float64 weights, which are rounded in any run; choose --dtype fp32 or bf16"
        )
    return torch.bfloat16 if found == {torch.bfloat16} else torch.float32


def _note_rounding(plan: Plan, target: torch.dtype) -> None:
    rounded = [d for d in plan.dtypes() if torch.promote_types(d, target) != target]
    if rounded:
        logger.warning("weights of %s are rounded to %s", ", ".join(map(dtype_name, rounded)), dtype_name(target))


def _note_generators(plan: Plan) -> None:
    keys = [key for _, key in plan.carried if any(re.fullmatch(pattern, key) for pattern in GENERATORS)]
    if keys:
        logger.warning(
            "%d weights of generators (%s) are carried along unused, for an export: nothing here computes with them",
            len(keys), ", ".join(sorted({key.split(".")[0] for key in keys})),
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------ disk


def check_space(out: Path, needed: int) -> None:
    """CheckpointError unless ``needed`` bytes are free where ``out`` will lie."""
    place = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise CheckpointError(
            f"{out}: needs {needed / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free; nothing was written"
        )


@contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """A full disk as one CheckpointError. torch's zip writer hides the cause behind an error of its own."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            gc.freeze()  # left in a reference cycle, that writer crashes the process when the collector finds it
            raise CheckpointError(
                f"{out}: {cause.strerror}; what was written is removed, a rerun starts clean"
            ) from error
        raise
